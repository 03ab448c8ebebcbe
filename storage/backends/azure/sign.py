"""Shared access signatures: URLs that let their holder do one thing to one blob."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from storage.errors import InvalidInput, UnsupportedOperation

if TYPE_CHECKING:
    from storage.backends.azure.credentials import Access

__all__ = ["check_signing", "sas_url"]

# A user delegation key, which signs for those who have no account key, lasts so long at most.
_LONGEST_DELEGATION = timedelta(days=7)
_CLOCK_SKEW = timedelta(minutes=5)


def check_signing(where: str, access: Access, expires: float) -> tuple[datetime, datetime]:
    """Return from when to when a URL that is good for ``expires`` seconds is to be good.

    Raises:
        UnsupportedOperation: there is nothing to sign with.
        InvalidInput: nothing may be signed for so long.
    """
    if access.key is None and access.tokens is None:
        raise UnsupportedOperation(
            f"{where}: a URL can be signed with an account key or an Entra identity, "
            f"not with {'a SAS token' if access.sas is not None else 'no credential'}"
        )
    begin = datetime.now(UTC) - _CLOCK_SKEW
    end = datetime.now(UTC) + timedelta(seconds=max(1, int(expires)))
    if access.key is None and end - begin > _LONGEST_DELEGATION:
        raise InvalidInput(f"{where}: without an account key a URL lasts less than seven days")
    return begin, end


async def sas_url(
    blob: Any, service: Any, access: Access, permission: str, begin: datetime, end: datetime
) -> str:
    """Return the URL of a blob with a signature.

    Args:
        blob: the client of the blob.
        service: the client of its account.
        access: the account and its credential.
        permission: what the holder may do, in Azure's letters.
        begin: from when.
        end: to when.
    """
    from azure.storage.blob import generate_blob_sas

    signer: dict[str, Any] = {"account_key": access.key}
    if access.key is None:
        signer = {"user_delegation_key": await service.get_user_delegation_key(begin, end)}
    signature = generate_blob_sas(
        access.account,
        blob.container_name,
        blob.blob_name,
        permission=permission,
        start=begin,
        expiry=end,
        **signer,
    )
    return f"{blob.url.partition('?')[0]}?{signature}"
