"""Presigned URLs of Google Cloud Storage, made with the private key of a service account."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from storage.backends.drivers.obstore import expressible
from storage.errors import (
    ConfigurationError,
    InvalidInput,
    StorageError,
    UnsupportedOperation,
    one_line,
)
from storage.lazy import lazy_property

__all__ = ["Signer"]

_METHODS = ("DELETE", "GET", "HEAD", "PUT")
# Version 4 of the signatures allows no more.
_LONGEST = 7 * 24 * 3600


class Signer:
    """Signs URLs for the objects of one bucket; nobody is asked."""

    def __init__(
        self, bucket: str, endpoint: Callable[[], str], key: Callable[[], str | None]
    ) -> None:
        """Read nothing yet.

        Args:
            bucket: its name.
            endpoint: returns the URL of the service.
            key: returns the JSON text of the credentials, if the config has any.
        """
        self._bucket = bucket
        self._endpoint = endpoint
        self._key = key

    @lazy_property
    def _signing_key(self) -> str | None:
        """The text of a key that can sign, if it is one."""
        try:
            text = self._key()
            info = json.loads(text) if text else None
        except (OSError, ValueError):
            # Whoever needs these credentials will say what is wrong with them.
            return None
        if not isinstance(info, dict) or info.get("type") != "service_account":
            return None
        return text if info.get("private_key") else None

    @property
    def usable(self) -> bool:
        """Whether there is a key to sign with."""
        return self._signing_key is not None

    def __call__(self, key: str, method: str, expires: float) -> str:
        """Return a URL that lets its holder ``method`` the object for ``expires`` seconds.

        Raises:
            UnsupportedOperation: there is no key to sign with, or the object's key cannot be
                signed.
        """
        where = f"gs://{self._bucket}/{key}"
        if self._signing_key is None:
            raise UnsupportedOperation(
                f"{where}: a URL is signed with the private key of a service account; give one "
                "as service_account_key in the GCSConfig"
            )
        if method.upper() not in _METHODS or not key:
            raise InvalidInput(
                f"{where}: a URL can be signed for an object and one of {', '.join(_METHODS)}, "
                f"not for {method}"
            )
        if not 0 < expires <= _LONGEST:
            raise InvalidInput(
                f"{where}: a signature is good for up to {_LONGEST} seconds, not for {expires:g}"
            )
        if not expressible(key):
            raise UnsupportedOperation(
                f"{where}: obstore signs no URL for a key with empty or dot segments, or control "
                "characters"
            )
        try:
            import obstore
        except ImportError as exc:
            raise ConfigurationError(
                "signing needs the package obstore, which is not installed; "
                'run: pip install "modelstorage[gcs]"'
            ) from exc
        try:
            verb: Any = method.upper()
            seconds = timedelta(seconds=max(1, int(expires)))
            url: str = obstore.sign(self._store(self._signing_key), verb, key, seconds)
        except StorageError:
            raise
        except Exception as exc:  # obstore has several
            raise UnsupportedOperation(
                f"{where}: the URL cannot be signed ({one_line(str(exc).partition('Debug')[0])}); "
                "check the key"
            ) from exc
        return url

    def _store(self, key: str) -> Any:
        from obstore.store import GCSStore

        return GCSStore(
            self._bucket,
            service_account_key=key,
            base_url=self._endpoint(),
            skip_signature=False,
        )
