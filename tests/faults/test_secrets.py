"""No credential is ever told: canaries in every place where one can be, faults of every kind.

What is searched: errors (text, ``repr``, arguments, the whole traceback with the exceptions of
SDKs that caused them), every record of every logger at DEBUG, progress, spans and metrics of
OpenTelemetry, the ``repr`` of configs, clients and backends, and every file that is left on
disk. Local variables are not searched: those of an SDK's frames are its own, and a tool that
collects them (``capture_locals``) has to leave out what holds a request.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_plus

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from storage import AzureConfig, GCSConfig, HFConfig, HTTPConfig, S3Config
from storage.client import StorageClient
from storage.config import load_settings
from storage.errors import StorageError
from storage.testing.fault_proxy import FaultProxy
from storage.testing.fault_script import Fault, Request
from tests.servers.forward_proxy import ForwardProxy
from tests.servers.odd_http import OddHTTP, Reply
from tests.servers.odd_http import Request as OddRequest
from tests.transfer.support import KIB
from tests.transfer.test_telemetry import Seen, seen

__all__ = ["seen"]

DATA = bytes(range(256)) * KIB


def canary(name: str) -> str:
    """Return a secret that is nowhere else: long enough, and nothing that has to be quoted."""
    return f"canary{name}{base64.b32encode(os.urandom(15)).decode()}"


# -- the stores ----------------------------------------------------------------------------


def s3_case(endpoint: str, driver: str) -> tuple[Any, list[str]]:
    secret, token = canary("SECRET"), canary("TOKEN")
    config = S3Config(
        "AKIDEXAMPLE",
        secret,
        session_token=token,
        endpoint_url=endpoint,
        driver=driver,  # type: ignore[arg-type]
    )
    return config, [secret, token]


_key: list[str] = []


def service_account(endpoint: str) -> tuple[str, list[str]]:
    if not _key:
        made = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        text = made.private_bytes(encoding, form, serialization.NoEncryption()).decode()
        _key.append(text)
    lines = _key[0].splitlines()
    key = {
        "type": "service_account",
        "project_id": "p",
        "private_key_id": "1234",
        "private_key": _key[0],
        "client_email": "someone@p.iam.gserviceaccount.com",
        "client_id": "1",
        "token_uri": f"{endpoint}/token",
        "gcs_base_url": endpoint,
    }
    return json.dumps(key), [lines[1], lines[5]]


STORES = (
    "s3-obstore",
    "s3-fsspec",
    "gcs-obstore-token",
    "gcs-fsspec-token",
    "gcs-obstore-key",
    "gcs-fsspec-key",
    "azure-obstore-key",
    "azure-fsspec-key",
    "azure-obstore-sas",
    "azure-fsspec-sas",
    "azure-fsspec-string",
    "hf",
    "http-bearer",
    "http-basic",
    "http-header",
    "http-query",
    "http-userinfo",
)


def make(name: str, endpoint: str) -> tuple[str, Any, list[str]]:
    """Return the URI of a tree (of an object for HTTP), the config, and the canaries in them."""
    kind, _, rest = name.partition("-")
    driver: Any = rest.partition("-")[0]
    if kind == "s3":
        config, canaries = s3_case(endpoint, driver)
        return "s3://bucket/model", config, canaries
    if name.startswith("gcs") and name.endswith("token"):
        token = canary("TOKEN")
        return (
            "gs://bucket/model",
            GCSConfig(token=token, project_id="p", endpoint_url=endpoint, driver=driver),
            [token],
        )
    if kind == "gcs":
        key, canaries = service_account(endpoint)
        return (
            "gs://bucket/model",
            GCSConfig(key, "p", endpoint_url=endpoint, driver=driver),
            canaries,
        )
    if kind == "azure":
        key = base64.b64encode(canary("KEY").encode()).decode()
        url = f"{endpoint}/account"
        if name.endswith("key"):
            return (
                "azure://box/model",
                AzureConfig("account", key, endpoint_url=url, driver=driver),
                [key],
            )
        if name.endswith("sas"):
            signature = canary("SIG")
            sas = f"sv=2024-11-04&ss=b&srt=sco&sp=rwdl&se=2099-01-01T00:00:00Z&sig={signature}"
            return (
                "azure://box/model",
                AzureConfig("account", sas_token=sas, endpoint_url=url, driver=driver),
                [signature],
            )
        text = (
            f"DefaultEndpointsProtocol=http;AccountName=account;AccountKey={key};"
            f"BlobEndpoint={url};"
        )
        return "azure://box/model", AzureConfig(connection_string=text, driver=driver), [key, text]
    if kind == "hf":
        token = f"hf_{canary('TOKEN')}"
        return "hf://owner/model", HFConfig(token, endpoint), [token]
    secret = canary("SECRET")
    url = f"{endpoint}/model.bin"
    if rest == "bearer":
        return url, HTTPConfig(token=secret), [secret]
    if rest == "basic":
        coded = base64.b64encode(f"user:{secret}".encode()).decode()
        return url, HTTPConfig(username="user", password=secret), [secret, coded]
    if rest == "header":
        cookie = canary("COOKIE")
        headers = {"X-Api-Key": secret, "Cookie": f"session={cookie}"}
        return url, HTTPConfig(headers), [secret, cookie]
    if rest == "query":
        return f"{url}?X-Amz-Signature={secret}&X-Amz-Expires=60", None, [secret]
    host = endpoint.removeprefix("http://")
    coded = base64.b64encode(f"user:{secret}".encode()).decode()
    return f"http://user:{secret}@{host}/model.bin", None, [secret, coded]


# -- what goes wrong -----------------------------------------------------------------------


class Echoing:
    """A store that tells back whatever it was told, in the words of an error."""

    def __init__(self, canaries: list[str], status: int) -> None:
        self._canaries = canaries
        self._status = status

    def text(self, request: OddRequest) -> str:
        told = [f"{name}: {value}" for name, value in request.headers.items()]
        return " ".join([*told, request.target, *self._canaries])

    def __call__(self, request: OddRequest) -> Reply:
        text = self.text(request)
        escaped = text.replace("&", "&amp;").replace("<", "&lt;")
        headers = {
            "Content-Type": "application/xml",
            "x-ms-error-code": "AuthenticationFailed",
            "X-Error-Message": text[:900].replace("\n", " "),
            "WWW-Authenticate": f'Bearer realm="{self._canaries[0]}"',
        }
        body = f"<Error><Code>AccessDenied</Code><Message>{escaped}</Message></Error>"
        if "json" in request.headers.get("accept", "") or "/storage/v1" in request.target:
            headers["Content-Type"] = "application/json"
            body = json.dumps({"error": {"code": self._status, "message": text}})
        return Reply(self._status, body.encode(), headers)


class Redirecting(Echoing):
    """Leads to itself again, by an address in which everything is told."""

    def __call__(self, request: OddRequest) -> Reply:
        place = f"/elsewhere?token={quote(self._canaries[0])}"
        return Reply(307, b"", {"Location": place})


class Garbage(Echoing):
    """Answers well, with nothing that is of any use."""

    def __call__(self, request: OddRequest) -> Reply:
        headers = {"ETag": '"x"', "Content-Type": "text/html"}
        return Reply(200, f"<html>{self.text(request)}</html>".encode(), headers)


class Silent(Echoing):
    """Hangs up in the middle of its answers."""

    def __call__(self, request: OddRequest) -> Reply:
        return Reply(200, self.text(request).encode() * 10, {"ETag": '"x"'})


ANSWERS: dict[str, Callable[[list[str]], Callable[[OddRequest], Reply]]] = {
    "400": lambda canaries: Echoing(canaries, 400),
    "401": lambda canaries: Echoing(canaries, 401),
    "403": lambda canaries: Echoing(canaries, 403),
    "404": lambda canaries: Echoing(canaries, 404),
    "500": lambda canaries: Echoing(canaries, 500),
    "503": lambda canaries: Echoing(canaries, 503),
    "redirect": lambda canaries: Redirecting(canaries, 307),
    "garbage": lambda canaries: Garbage(canaries, 200),
}

CONNECTIONS = ("reset", "truncate", "stall_answer", "refused")


# -- what is seen --------------------------------------------------------------------------


class Everything(logging.Handler):
    """Keeps every record as a program would print it, and with all that it carries."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []
        self.setFormatter(logging.Formatter("%(name)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))
        self.lines.append(f"{record.name} {vars(record)!r}")


@pytest.fixture
def logged() -> Iterator[list[str]]:
    root = logging.getLogger()
    handler, level = Everything(), root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield handler.lines
    root.removeHandler(handler)
    root.setLevel(level)


def shown(error: BaseException) -> Iterator[str]:
    """Yield every text that an error and its causes are printed as."""
    yield from traceback.format_exception(error)
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield from (str(following), repr(following), repr(following.args), repr(vars(following)))
        following = following.__cause__ or following.__context__


def forms(secret: str) -> set[str]:
    """Return how a secret may be written."""
    coded = base64.b64encode(secret.encode()).decode()
    return {secret, quote(secret, safe=""), quote_plus(secret), coded}


class Watch:
    """Does what a program does with a store, and collects all that it could see."""

    def __init__(self, tmp_path: Path, seen: Seen, logged: list[str]) -> None:
        self._folder = tmp_path
        self._seen = seen
        self._logged = logged
        self.texts: list[tuple[str, str]] = []

    def run(self, uri: str, config: Any, only: str | None = None) -> None:
        limits = {
            "attempts": 2,
            "retry_wait": 0.01,
            "throttle_wait": 0.01,
            "retry_timeout": 20,
            "connect_timeout": 2,
            "stall_timeout": 1,
            "part_size": "64KiB",
            "connections": 2,
        }
        source = self._folder / "source.bin"
        source.write_bytes(DATA)
        single = uri.startswith("http")
        target = uri if single else f"{uri}/m.safetensors"
        told: list[Any] = []
        with StorageClient(config, load_settings(transfer=limits)) as client:
            calls: dict[str, Callable[[], object]] = {
                "download": lambda: client.download(
                    target, self._folder / "out", progress=told.append
                ),
                "cached": lambda: client.download(uri, progress=told.append),
                "upload": lambda: client.upload(source, target, progress=told.append),
                "list": lambda: client.list_objects(uri),
                "open": lambda: client.open(target).read(),
                "delete": lambda: client.delete_object(target),
                "copy": lambda: client.copy_object(target, self._folder / "copy"),
            }
            for name, call in calls.items():
                if only not in (None, name):
                    continue
                try:
                    call()
                except StorageError as exc:
                    self.texts += [(f"error of {name}", text) for text in shown(exc)]
            self.texts += [("client", repr(client)), ("config", f"{config!r} {config}")]
            self.texts += [
                ("backend", f"{backend!r} {backend.name}") for backend in client._backends.values()
            ]
        self.texts += [("progress", repr(one)) for one in told]

    def check(self, canaries: list[str]) -> None:
        texts = [*self.texts, *(("log", line) for line in self._logged)]
        texts += [("span", span.to_json()) for span in self._seen.spans]
        data = self._seen.reader.get_metrics_data()
        texts.append(("metrics", "" if data is None else data.to_json()))
        for path in (*self._folder.rglob("*"), *Path(os.environ["STORAGE_CACHE_DIR"]).rglob("*")):
            texts.append(("path", str(path)))
            if path.is_file():
                texts.append((f"file {path}", path.read_bytes().decode("latin-1")))
        assert len(texts) > 12
        found = {
            f"{place}: {text[:60]} … {_around(text, form)}"
            for place, text in texts
            for secret in canaries
            for form in forms(secret)
            if form in text
        }
        assert not found, "\n".join(sorted(found)[:12])


def _around(text: str, secret: str) -> str:
    at = text.index(secret)
    return re.sub(r"\s+", " ", text[max(0, at - 160) : at + len(secret) + 40])


# -- the tests -----------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("name", STORES)
def test_what_a_store_tells_back_is_not_told_on(
    tmp_path: Path, seen: Seen, logged: list[str], name: str, answer: str
) -> None:
    watch = Watch(tmp_path, seen, logged)
    handler: list[Callable[[OddRequest], Reply]] = []
    with OddHTTP(lambda request: handler[0](request)) as server:
        uri, config, canaries = make(name, server.url)
        handler.append(ANSWERS[answer](canaries))
        watch.run(uri, config)
    watch.check(canaries)


@pytest.mark.parametrize("kind", CONNECTIONS)
@pytest.mark.parametrize("name", STORES)
def test_what_breaks_tells_nothing(
    tmp_path: Path, seen: Seen, logged: list[str], name: str, kind: str
) -> None:
    watch = Watch(tmp_path, seen, logged)
    with ExitStack() as stack:
        if kind == "refused":
            with OddHTTP(lambda request: Reply(200, b"")) as server:
                endpoint = server.url
        else:
            server = stack.enter_context(OddHTTP(lambda request: Reply(200, DATA, {"ETag": '"x"'})))
            fault: Callable[[Request], Fault] = lambda request: Fault(kind)  # noqa: E731
            endpoint = stack.enter_context(FaultProxy(server.url, fault)).endpoint
        uri, config, canaries = make(name, endpoint)
        # Waiting is all that this one does.
        watch.run(uri, config, "download" if kind == "stall_answer" else None)
    watch.check(canaries)


@pytest.mark.parametrize(
    "name", ["s3-obstore", "s3-fsspec", "gcs-obstore-token", "hf", "http-bearer"]
)
@pytest.mark.parametrize("let", [True, False], ids=["let through", "refused"])
def test_the_password_of_a_proxy_is_not_told(
    tmp_path: Path, seen: Seen, logged: list[str], name: str, let: bool
) -> None:
    watch = Watch(tmp_path, seen, logged)
    password = canary("PROXY")
    with (
        OddHTTP(Echoing([password], 403)) as server,
        ForwardProxy("user", password if let else "another") as proxy,
    ):
        uri, config, canaries = make(name, server.url)
        where = proxy.url.replace("://", f"://user:{password}@")
        config = config.model_copy(update={"proxy": type(config)(proxy=where).proxy})
        watch.run(uri, config)
    watch.check([*canaries, password])


def test_the_name_of_a_file_is_told_though_the_query_says_it_too() -> None:
    with StorageClient() as client, OddHTTP(lambda request: Reply(404, b"")) as server:
        url = f"{server.url}/models/llama-weights.bin"
        with pytest.raises(StorageError, match=r"/models/llama-weights\.bin") as caught:
            client.get_object_metadata(f"{url}?file=llama-weights.bin&t={canary('T')}")
    assert "canary" not in str(caught.value)
