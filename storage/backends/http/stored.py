"""Whether a server stored what was sent to it: what is told it, and what it tells."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Mapping

from storage.backends.base import Body, Payload
from storage.backends.http.answers import is_page
from storage.backends.http.headers import digests, hint
from storage.digest import Digest, MultiHasher, hash_file
from storage.errors import (
    StorageError,
    TransferError,
    TransientError,
)

__all__ = ["SIGNED_WITH_HEADERS", "check_stored", "digest_headers", "local_digest"]

# The older way of signing (AWS's version 2, Google's, Alibaba's) covers Content-Type and
# Content-MD5, and who signs names none as a rule.
SIGNED_WITH_HEADERS = re.compile(r"(?:^|&)Signature=")


def local_digest(payload: Payload, algorithm: str) -> Digest | None:
    """Return the digest of a payload that is on this machine; ``None`` for any other.

    To read one twice that comes from another store would fetch it twice.
    """
    if payload.size is None:
        return None
    with payload.open() as stream:
        raw = stream.raw if isinstance(stream, io.BufferedReader) else stream
        if not isinstance(raw, (io.FileIO, io.BytesIO)):
            return None
        return hash_file(stream, (algorithm,))[algorithm]


def digest_headers(digest: Digest, query: str) -> dict[str, str]:
    """Return headers by which a server can check the body of a PUT, if it cares to.

    ``Content-MD5`` is checked by S3, Azure and Google; a signature of theirs does not cover it,
    other than an older one. ``Repr-Digest`` is RFC 9530, and Artifactory checks
    ``X-Checksum-Sha256``.
    """
    if SIGNED_WITH_HEADERS.search(query):
        return {}
    text = base64.b64encode(bytes.fromhex(digest.hex)).decode("ascii")
    if digest.algorithm == "md5":
        return {"Content-MD5": text}
    return {"Repr-Digest": f"sha-256=:{text}:", "X-Checksum-Sha256": digest.hex}


def check_stored(
    headers: Mapping[str, str],
    sent: Digest,
    size: int,
    where: str,
    read: Callable[[], Body] | None,
) -> None:
    """Compare what was sent with what the server says that it stored, else with what it has.

    Args:
        headers: of the answer to the PUT.
        sent: digest of the body.
        size: of the body.
        where: the URL for messages.
        read: reads the file back; ``None`` if that is not to be done.

    Raises:
        TransientError: something else is stored.
    """
    told = _told(headers)
    if sent in (*told, *digests(headers, whole=True)):
        return
    for digest in told:
        if digest.algorithm == sent.algorithm:
            raise TransientError(
                f"{where}: {sent} was sent and the server says that it stored {digest}; the way "
                "to it damages what passes, or its ETag is no MD5: then use "
                "verify_uploads=False of HTTPConfig"
            )
    if read is None:
        return
    try:
        body = read()
    except TransferError:
        raise
    except StorageError as exc:
        if is_page(headers):
            # A portal or a proxy on the way calls everything a success.
            raise TransientError(
                f"{where}: the answer to what was sent is a page, and what is there now cannot be "
                f"read ({exc}); check the URL and the proxy; if it is right, use "
                "verify_uploads=False of HTTPConfig"
            ) from exc
        return  # Who may write there may not read, or it is read elsewhere.
    hasher, count = MultiHasher((sent.algorithm,)), 0
    with body:
        for chunk in body:
            hasher.update(chunk)
            count += len(chunk)
    found = hasher.digests()[sent.algorithm]
    if found != sent:
        raise TransientError(
            f"{where}: {sent} ({size} bytes) was sent and {found} ({count} bytes) is there now; "
            "the way to the server damages what passes, somebody else wrote meanwhile, or it "
            "gives something else than it takes: then use verify_uploads=False of HTTPConfig"
        )


def _told(headers: Mapping[str, str]) -> list[Digest]:
    """Return the digests by which object stores say what they stored.

    Of other servers a digest may as well be that of the answer's own body.
    """
    names = ["X-Goog-Hash"]
    if any(name.lower().startswith("x-ms-") for name in headers):
        names.append("Content-MD5")
    own = {name: headers[name] for name in names if name in headers}
    etag = hint(headers)
    return [*digests(own, whole=True), *([etag] if etag is not None else [])]
