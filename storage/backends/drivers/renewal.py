"""Bearer tokens that a store refuses before their time, where obstore sent them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from storage.errors import AuthenticationError

__all__ = ["renewing"]

T = TypeVar("T")


def renewing(
    call: Callable[[], T], renew: Callable[[float], bool], forget: Callable[[], None]
) -> T:
    """Return what ``call`` does; once more with a new token if the store refused the old one.

    Args:
        call: asks the store.
        renew: gets a new token, if it can; it is told when the refused request began, by
            ``time.monotonic``, because another thread may have renewed it since.
        forget: makes the driver take the new one: obstore keeps a token for as long as it should
            be good.
    """
    begun = time.monotonic()
    try:
        return call()
    except AuthenticationError as exc:
        if not _is_refused(exc.__cause__) or not renew(begun):
            raise
    forget()
    return call()


def _is_refused(cause: BaseException | None) -> bool:
    # A 401, or what Azure says. Another 403 is about permissions, and the next token has the same.
    return type(cause).__name__ == "UnauthenticatedError" or "<Code>AuthenticationFailed<" in str(
        cause
    )
