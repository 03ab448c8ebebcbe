"""The stores of the cases: what is put where, and which variables lead a client there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import parse_qs

import pytest

from tests.integrations.kserve.places import ACCOUNT_HOST, Files, Page, Place, write
from tests.integrations.kserve.repositories import Repositories
from tests.servers import Azurite, NginxHTTP, OddHTTP, Reply, Request, S3Server, free_port
from tests.servers.process import HOST
from tests.servers.seaweedfs import PUBLIC_BUCKET, READABLE_BUCKET

BUCKET = "kserve"
S3_HOST = "s3.models.example"
ENTRA = "login.microsoftonline.com"
TENANT, CLIENT = "11111111-1111-1111-1111-111111111111", "22222222-2222-2222-2222-222222222222"
CLIENT_SECRET = "the-secret-of-the-principal"


class Pages:
    """A handler of ``OddHTTP``: pages by their targets."""

    def __init__(self) -> None:
        """Begin with none."""
        self.pages: dict[str, Page] = {}

    def __call__(self, request: Request) -> Reply:
        """Answer a request."""
        page = self.pages.get(request.target)
        if page is None:
            return Reply(404)
        if any(request.headers.get(name) != value for name, value in page.wanted.items()):
            return Reply(401)
        headers = {"Content-Type": page.kind, **page.headers}
        return Reply(page.status, page.body, headers, cut=page.cut)


class Stores(Repositories):
    """All servers that the cases need, and how to fill them."""

    def place(self, store: str, name: str, files: Files, claims: Sequence[Path]) -> Place:
        """Put a case's files into a store.

        Args:
            store: which one, by the name of a method here.
            name: a word that only this case has.
            files: path to content, below the place.
            claims: the volumes that the programs see as ``/mnt/pvc``.
        """
        # On the stores where the old program mixes siblings up, a folder keeps the cases apart.
        put: Callable[..., Place] = getattr(self, f"_{store}")
        return put(name, files, claims)

    def common(self) -> dict[str, str]:
        """Return the names that the templates of every case may hold."""
        shared = self._scratch / "shared"
        write(shared, {"shared.bin": b"shared"})
        return {"closed": str(free_port()), "shared": str(shared)}

    # --- S3 -------------------------------------------------------------------------------------

    def _s3(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        self._once(BUCKET, lambda: self._stack.enter_context(self.seaweedfs.bucket(BUCKET)))
        return self._objects(self.seaweedfs, BUCKET, f"{name}/m", files)

    def _bucket(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        self._stack.enter_context(self.seaweedfs.bucket(name))
        return self._objects(self.seaweedfs, name, "", files)

    def _dotted(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        bucket = f"{name}.models.example"
        self._stack.enter_context(self.moto.bucket(bucket))
        return self._objects(self.moto, bucket, "m", files)

    def _literal(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        """Use an S3 server that keeps every key as it is, and looks at no signature."""
        self._once("moto", lambda: self._stack.enter_context(self.moto.bucket(BUCKET)))
        return self._objects(self.moto, BUCKET, f"{name}/m", files)

    def _public(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        self._get("public_bucket")
        place = self._objects(self.seaweedfs, PUBLIC_BUCKET, f"{name}/m", files)
        return _without_keys(place)

    def _readable(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        """Use keys that may read objects, and neither list nor ask for the bucket."""
        self._get("readable_bucket")
        place = self._objects(self.seaweedfs, READABLE_BUCKET, f"{name}/m", files)
        reader = self.seaweedfs.reader
        place.environment["AWS_ACCESS_KEY_ID"] = reader.access_key
        place.environment["AWS_SECRET_ACCESS_KEY"] = reader.secret_key
        return place

    def _secure(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        """Use S3 over TLS, signed by an authority that nobody knows yet."""
        place = self._s3(name, files, claims)
        front = self._front("s3-tls", self.seaweedfs.endpoint)
        folder = self._bundle("s3-authority", front.ca_file)
        place.environment["AWS_ENDPOINT_URL"] = front.endpoint
        place.names |= {
            "ca": str(front.ca_file),
            "bundles": str(folder),
            "host": f"{HOST}:{front.port}",
        }
        return place

    def _virtual(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        """Use S3 where the bucket is a part of the host's name; a proxy alone knows the hosts."""
        place = self._literal(name, files, claims)
        hosts = {f"{BUCKET}.{S3_HOST}": (HOST, self.moto.port)}
        proxy = self._proxy("s3-proxy", hosts)
        place.environment |= {"AWS_ENDPOINT_URL": f"http://{S3_HOST}", "HTTP_PROXY": proxy.url}
        return place

    def _role(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        """Use what EKS mounts and sets for a service account that has a role."""
        place = self._literal(name, files, claims)
        token = self._scratch / "service-account"
        token.write_text("the.token.of-the-account")
        place.environment |= {
            "AWS_ENDPOINT_URL_STS": self.moto.endpoint,
            "AWS_ROLE_ARN": "arn:aws:iam::123456789012:role/models",
            "AWS_WEB_IDENTITY_TOKEN_FILE": str(token),
        }
        return _without_keys(place)

    def _pod_identity(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        """Use an agent on the node that gives credentials to pods that have a token."""
        place = self._literal(name, files, claims)
        answer = {
            "AccessKeyId": "ASIAEXAMPLE",
            "SecretAccessKey": "SECRETEXAMPLE",
            "Token": "the-token-of-a-session",
            "Expiration": "2099-01-01T00:00:00Z",
        }
        page = Page(json.dumps(answer).encode(), "application/json", wanted={"Authorization": "me"})
        agent = self._http(f"{name}-agent", {"v1/credentials": page}, claims)
        place.environment |= {
            "AWS_CONTAINER_AUTHORIZATION_TOKEN": "me",
            "AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{agent.root}/v1/credentials",
        }
        return _without_keys(place)

    def _amazon(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        """Use the endpoint of Amazon that knows one region alone, but by a bucket's host."""
        place = self._literal(name, files, claims)
        host = "s3.amazonaws.com"
        # That of the region is as good; the endpoint itself would answer with a redirection.
        hosts = (f"{BUCKET}.{host}", f"{BUCKET}.s3.eu-west-1.amazonaws.com")
        front = self._front("amazon-tls", self.moto.endpoint, *hosts)
        proxy = self._proxy("amazon-proxy", dict.fromkeys(hosts, (HOST, front.port)))
        place.environment |= {
            "AWS_CA_BUNDLE": str(front.ca_file),
            "AWS_DEFAULT_REGION": "eu-west-1",
            "AWS_ENDPOINT_URL": f"https://{host}",
            "HTTPS_PROXY": proxy.url,
        }
        return place

    def _objects(self, server: S3Server, bucket: str, prefix: str, files: Files) -> Place:
        for path, content in files.items():
            assert isinstance(content, bytes)
            server.put_raw(bucket, f"{prefix}/{path}".lstrip("/"), content)
        environment = {
            "AWS_ACCESS_KEY_ID": server.access_key,
            "AWS_DEFAULT_REGION": server.region,
            "AWS_ENDPOINT_URL": server.endpoint,
            "AWS_SECRET_ACCESS_KEY": server.secret_key,
        }
        config = {
            "type": "s3",
            "access_key_id": server.access_key,
            "endpoint_url": server.endpoint,
            "region": server.region,
            "secret_access_key": server.secret_key,
        }
        keys = f"aws_access_key_id={server.access_key}\naws_secret_access_key={server.secret_key}"
        (self._scratch / "credentials").write_text(f"[models]\n{keys}\n")
        names = {
            "bucket": bucket,
            "config": json.dumps(config),
            "credentials": str(self._scratch / "credentials"),
            "endpoint": server.endpoint,
            "host": f"{HOST}:{server.port}",
        }
        return Place(f"s3://{bucket}/{prefix}".rstrip("/"), environment, names)

    # --- the others -----------------------------------------------------------------------------

    def _gcs(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        self._once("gcs", lambda: self._stack.enter_context(self.gcs.bucket(BUCKET)))
        return self._gcs_objects(BUCKET, name, files)

    def _gcs_bucket(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        self._stack.enter_context(self.gcs.bucket(name))
        return self._gcs_objects(name, "", files)

    def _gcs_objects(self, bucket: str, prefix: str, files: Files) -> Place:
        for path, content in files.items():
            assert isinstance(content, bytes)
            self.gcs.put_raw(bucket, f"{prefix}/{path}".lstrip("/"), content)
        environment = {"STORAGE_EMULATOR_HOST": self.gcs.endpoint}
        return Place(f"gs://{bucket}/{prefix}".rstrip("/"), environment, {"bucket": bucket})

    def _azure(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        self._once("azure", lambda: self._stack.enter_context(self.azurite.container(BUCKET)))
        return self._blobs(BUCKET, f"{name}/m", files)

    def _azure_container(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        self._stack.enter_context(self.azurite.container(name))
        return self._blobs(name, "", files)

    def _azure_public(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        self._stack.enter_context(self.azurite.container(name, public=True))
        place = self._blobs(name, "m", files)
        del place.environment["AZURE_STORAGE_ACCESS_KEY"]
        return place

    def _azure_principal(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        """Use the same, and Entra at its own address, where a principal has a secret."""
        place = self._azure_token(name, files, claims)
        server = self._get("azurite_tls")
        assert isinstance(server, Azurite)
        entra = self._once("entra", lambda: self._start_entra(server.bearer()))
        front = self._front("entra-tls", entra.url, ENTRA)
        hosts = self._proxy(f"{server.port}-proxy", {}).hosts
        hosts[ENTRA] = (HOST, front.port)
        bundle = self._scratch / "entra.pem"
        bundle.write_text(front.ca_file.read_text() + Path(place.names["ca"]).read_text())
        place.environment |= {"SSL_CERT_FILE": str(bundle), "REQUESTS_CA_BUNDLE": str(bundle)}
        place.names |= {"tenant": TENANT, "client": CLIENT, "secret": CLIENT_SECRET}
        return place

    def _start_entra(self, token: str) -> OddHTTP:
        return self._stack.enter_context(OddHTTP(lambda request: _entra(request, token)))

    def _azure_token(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        """Use an account that takes tokens of Entra, as Azurite does over TLS alone."""
        server = self._get("azurite_tls")
        assert isinstance(server, Azurite)
        self._stack.enter_context(server.container(name))
        place = self._blobs(name, "m", files, server)
        del place.environment["AZURE_STORAGE_ACCESS_KEY"]
        place.names["token"] = server.bearer()
        return place

    def _blobs(
        self, container: str, prefix: str, files: Files, server: Azurite | None = None
    ) -> Place:
        server = server or self.azurite
        for path, content in files.items():
            assert isinstance(content, bytes)
            server.put_raw(container, f"{prefix}/{path}".lstrip("/"), content)
        zone = f"{server.main.name}.z12.blob.storage.azure.net"
        front = self._front(f"{server.port}-tls", server.endpoint, zone)
        where = (HOST, front.port)
        proxy = self._proxy(f"{server.port}-proxy", {ACCOUNT_HOST: where, zone: where})
        environment = {
            "AZURE_STORAGE_ACCESS_KEY": server.main.key,
            "HTTPS_PROXY": proxy.url,
            "SSL_CERT_FILE": str(front.ca_file),
        }
        names = {
            "bundles": str(self._bundle(f"{server.port}-authority", front.ca_file)),
            "ca": str(front.ca_file),
            "container": f"https://{ACCOUNT_HOST}/{container}",
            "sas": server.sas("rl"),
            "zone": f"https://{zone}/{container}/{prefix}",
            "other_key": server.other.key,
        }
        root = f"https://{ACCOUNT_HOST}/{container}/{prefix}".rstrip("/")
        return Place(root, environment, names)

    def _http(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        pages = self._once("pages", Pages)
        server = self._once("http", lambda: self._stack.enter_context(OddHTTP(pages)))
        for path, content in files.items():
            page = content if isinstance(content, Page) else Page(content)
            pages.pages[f"/{name}/{path}"] = page
        host = f"{server.url.partition('://')[2]}/{name}"
        return Place(f"{server.url}/{name}", {}, {"origin": server.url, "host": host})

    def _proxied(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        """Use the same server by a host that a proxy alone knows."""
        place = self._http(name, files, claims)
        port = int(place.names["origin"].rpartition(":")[2])
        proxy = self._proxy("http-proxy", {"models.example": (HOST, port)})
        return Place(f"http://models.example/{name}", {"HTTP_PROXY": proxy.url})

    def _nginx(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        """Use a real web server, over HTTP and TLS."""
        server = self._get("nginx_http")
        assert isinstance(server, NginxHTTP)
        write(server.data / name, files)
        write(server.data / "elsewhere", files)
        names = {
            "bundles": str(self._bundle("nginx-authority", Path(server.ca_file))),
            "ca": server.ca_file,
            "tls": f"{server.tls}/{name}",
            "odd": server.odd,
            "name": name,
        }
        return Place(f"{server.endpoint}/{name}", {}, names)

    def _local(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        folder = self._scratch / "local" / name
        write(folder, files)
        return Place(str(folder))

    def _claim(self, name: str, files: Files, claims: Sequence[Path]) -> Place:
        for claim in claims:
            write(claim / name, files)
        return Place(f"/mnt/pvc/{name}", {}, {"name": name})


def _without_keys(place: Place) -> Place:
    for variable in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        del place.environment[variable]
    return place


def _entra(request: Request, token: str) -> Reply:
    """Answer what clients ask Entra for a principal's token."""
    tenant = f"https://{ENTRA}/{TENANT}"
    status = 200
    if request.method == "POST":
        answer: dict[str, object] = {
            "access_token": token,
            "expires_in": 3600,
            "token_type": "Bearer",
        }
        fields = parse_qs(request.body.decode())
        if (fields.get("client_id"), fields.get("client_secret")) != ([CLIENT], [CLIENT_SECRET]):
            status, answer = 401, {"error": "invalid_client", "error_description": "wrong secret"}
    elif request.path.endswith("/discovery/instance"):
        answer = {"tenant_discovery_endpoint": f"{tenant}/v2.0/.well-known", "metadata": []}
    else:
        answer = {
            "authorization_endpoint": f"{tenant}/oauth2/v2.0/authorize",
            "token_endpoint": f"{tenant}/oauth2/v2.0/token",
            "issuer": f"{tenant}/v2.0",
        }
    return Reply(status, json.dumps(answer).encode(), {"Content-Type": "application/json"})


@contextmanager
def stores(scratch: Path, request: pytest.FixtureRequest) -> Iterator[Stores]:
    """Offer the stores; their servers start when the first case needs them."""
    found = Stores(scratch, request.getfixturevalue)
    try:
        yield found
    finally:
        found.close()
