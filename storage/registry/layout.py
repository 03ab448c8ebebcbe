"""Where a registry keeps what: the names of its objects, relative to its URI.

::

    registry.json                            what this is, and in which format
    registry.json.probe-<id>                 whoever makes the registry tries out the store
    blobs/<2 hex>/<64 hex>/<token>           content by its BLAKE3, shared by all models
    uploads/<id>.json                        lease: content that a pending version will use
    collections/<id>.json                    a collection under way: the blobs it condemned
    collections/<id>.verdict.json            those of them that it removes
    catalog/<model>.json                     that somebody once began to publish a model
    models/<model>/numbers/<number>.json     who took a number
    models/<model>/contents/<content>/<n>.json  the n-th try to publish this content: a version,
                                             which is committed by this, or that it was revoked
    models/<model>/versions/<number>.json    a version under its number; by this it is seen
    models/<model>/deleted/<number>.json     that a version was deleted
    models/<model>/deleting/<number>/<id>.json  that somebody is about to delete a version
    models/<model>/aliases/<alias>/<n>.json  the n-th version that an alias was set to
    models/<model>/attributes/<number>/<n>.json  the n-th change of what is said of a version

Every object but a lease is created once and never written over. A name that was removed is never
used again, so a removal that comes late hits nothing: that is what the token of a blob is for. Only
the attributes of a version may begin again when it was deleted, and nobody sees them.
Numbers, contents and marks of deletion are never removed.
"""

from __future__ import annotations

import re

from storage.errors import InvalidInput, one_line

__all__ = [
    "BLOBS",
    "CATALOG",
    "COLLECTIONS",
    "LATEST",
    "MARKER",
    "MODELS",
    "UPLOADS",
    "alias",
    "aliases",
    "attribute_logs",
    "attributes",
    "blob",
    "blob_digest",
    "blob_incarnations",
    "catalog",
    "check_alias",
    "check_model",
    "collection",
    "content_log",
    "contents",
    "deleted",
    "deleting",
    "deletions",
    "entry",
    "kind_of",
    "last_part",
    "model_of",
    "number",
    "number_of",
    "numbers",
    "parse_reference",
    "probe",
    "upload",
    "verdict",
    "version",
    "version_of",
    "versions",
]

MARKER = "registry.json"
BLOBS = "blobs/"
UPLOADS = "uploads/"
COLLECTIONS = "collections/"
CATALOG = "catalog/"
MODELS = "models/"

LATEST = "latest"
"""The alias that nobody sets: the version with the highest number."""

# Every store keeps such names as they are: Azure drops dots at the end, a command takes a hyphen
# at the beginning for an option, and a dot there hides a file.
_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,198}[A-Za-z0-9_-])?")
_NUMBER = re.compile(r"[0-9]{8,}")
_HEX = re.compile(r"[0-9a-f]{64}")
_TOKEN = re.compile(r"[0-9a-f]{32}")


def check_model(name: str) -> str:
    """Return ``name`` if a model may have it.

    Raises:
        InvalidInput: it may not.
    """
    return _check_name(name, "model")


def check_alias(name: str) -> str:
    """Return ``name`` if an alias may have it.

    Raises:
        InvalidInput: it may not, or is one that nobody sets.
    """
    _check_name(name, "alias")
    if name == LATEST:
        raise InvalidInput(
            f"the alias {LATEST!r} is always the version with the highest number and is not set; "
            "choose another name"
        )
    if name.isdigit():
        raise InvalidInput(f"the alias {name!r} would be taken for a version; choose another name")
    return name


def _check_name(name: str, what: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        article = "an" if what == "alias" else "a"
        raise InvalidInput(
            f"{one_line(repr(name), 80)} cannot be the name of {article} {what}: expected 1 to 200 "
            "of the letters A-Z and a-z, digits, '.', '_' and '-', without '.' or '-' at the "
            "beginning and '.' at the end"
        )
    return name


def parse_reference(reference: int | str) -> int | str:
    """Return what names a version: its number, or an alias (``latest`` too).

    Raises:
        InvalidInput: it is neither.
    """
    if isinstance(reference, str):
        # Python reads no number of thousands of digits; no name is that long either.
        if not (reference.isascii() and reference.isdigit() and len(reference) <= 200):
            return _check_name(reference, "alias")
        reference = int(reference)
    if isinstance(reference, bool) or not isinstance(reference, int) or reference < 1:
        raise InvalidInput(
            f"a version is named by its number from 1 on or by an alias, not by {reference!r}"
        )
    return reference


# -- names -----------------------------------------------------------------------------------


def probe(marker: str, identity: str = "") -> str:
    """Return the name of what a store is tried out with, before a marker is written."""
    return f"{marker}.probe-{identity}"


def blob(digest: str, token: str) -> str:
    """Return the name of one blob with the BLAKE3 ``digest`` (64 hex digits)."""
    return f"{blob_incarnations(digest)}{token}"


def blob_incarnations(digest: str) -> str:
    """Return what the names of all blobs with the BLAKE3 ``digest`` begin with."""
    return f"{BLOBS}{digest[:2]}/{digest}/"


def upload(identity: str) -> str:
    """Return the name of a lease."""
    return f"{UPLOADS}{identity}.json"


def collection(identity: str) -> str:
    """Return the name of a collection under way."""
    return f"{COLLECTIONS}{identity}.json"


def catalog(model: str) -> str:
    """Return the name of a model's entry in the catalog."""
    return f"{CATALOG}{model}.json"


def verdict(identity: str) -> str:
    """Return the name of what a collection decided."""
    return f"{COLLECTIONS}{identity}.verdict.json"


def numbers(model: str) -> str:
    """Return what the names of all claims of numbers of a model begin with."""
    return f"{MODELS}{model}/numbers/"


def number(model: str, index: int) -> str:
    """Return the name of the claim of a number."""
    return entry(numbers(model), index)


def contents(model: str) -> str:
    """Return what the names of the logs of all contents of a model begin with."""
    return f"{MODELS}{model}/contents/"


def content_log(model: str, identity: str) -> str:
    """Return what the names of the entries of a content's log begin with."""
    return f"{contents(model)}{identity}/"


def versions(model: str) -> str:
    """Return what the names of all versions of a model begin with."""
    return f"{MODELS}{model}/versions/"


def version(model: str, index: int) -> str:
    """Return the name of the version with a number."""
    return entry(versions(model), index)


def deletions(model: str) -> str:
    """Return what the names of all marks of deleted versions of a model begin with."""
    return f"{MODELS}{model}/deleted/"


def deleted(model: str, index: int) -> str:
    """Return the name of the mark that a version was deleted."""
    return entry(deletions(model), index)


def deleting(model: str, index: int) -> str:
    """Return what the names begin with by which somebody tells that he will delete a version."""
    return f"{MODELS}{model}/deleting/{index:08}/"


def aliases(model: str) -> str:
    """Return what the names of the logs of all aliases of a model begin with."""
    return f"{MODELS}{model}/aliases/"


def alias(model: str, name: str) -> str:
    """Return what the names of the entries of an alias's log begin with."""
    return f"{aliases(model)}{name}/"


def attribute_logs(model: str) -> str:
    """Return what the names of the logs of what is said of all versions begin with."""
    return f"{MODELS}{model}/attributes/"


def attributes(model: str, index: int) -> str:
    """Return what the names of the changes of what is said of a version begin with."""
    return f"{attribute_logs(model)}{index:08}/"


def entry(prefix: str, index: int) -> str:
    """Return the name of the numbered object below ``prefix``."""
    # Eight digits, so that a listing gives them in their order.
    return f"{prefix}{index:08}.json"


# -- and back --------------------------------------------------------------------------------


def last_part(name: str) -> str:
    """Return what a name ends in, without ``.json``."""
    return name.rpartition("/")[2].removesuffix(".json")


def number_of(name: str) -> int | None:
    """Return the number at the end of a name; ``None`` if it is no name of ours."""
    text = last_part(name)
    return int(text) if name.endswith(".json") and _NUMBER.fullmatch(text) else None


def blob_digest(name: str) -> str | None:
    """Return the digest in the name of a blob; ``None`` if it is no name of ours."""
    digest, _, token = name.removeprefix(BLOBS)[3:].partition("/")
    ours = _HEX.fullmatch(digest) and _TOKEN.fullmatch(token) and name == blob(digest, token)
    return digest if ours else None


def kind_of(name: str) -> str:
    """Return what an object of a model is: ``models/<model>/<kind>/…``."""
    parts = name.split("/", 3)
    return parts[2] if len(parts) == 4 else ""


def version_of(name: str) -> tuple[str, str]:
    """Return what ``models/<model>/<kind>/<number>…`` is about: model and number."""
    parts = name.split("/", 4)
    return parts[1], parts[3].removesuffix(".json")


def model_of(name: str) -> str | None:
    """Return the model that a name below ``models/`` or ``catalog/`` belongs to, if any."""
    first, _, rest = name.partition("/")
    if f"{first}/" == CATALOG and rest.endswith(".json"):
        found = rest.removesuffix(".json")
    else:
        found = rest.partition("/")[0] if f"{first}/" == MODELS else ""
    return found if _NAME.fullmatch(found) else None
