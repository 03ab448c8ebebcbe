"""Attributes that are computed on first use, also in processes that fork."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar, overload

__all__ = ["lazy_property"]

T = TypeVar("T")


class lazy_property(Generic[T]):  # noqa: N801 -- used as a decorator, like property
    """A property that is computed once for each object.

    That is ``functools.cached_property`` without its lock. In Python 3.11 one lock is shared by
    all objects of a class and held while a value is computed: a process that is forked
    meanwhile would wait for it for ever. Here two threads may both compute; both get the
    value of one of them.
    """

    def __init__(self, compute: Callable[[Any], T]) -> None:
        """Wrap a method that takes no arguments."""
        self._compute = compute
        self._name = compute.__name__
        self.__doc__ = compute.__doc__

    @overload
    def __get__(self, instance: None, owner: type | None = None) -> Self: ...

    @overload
    def __get__(self, instance: object, owner: type | None = None) -> T: ...

    def __get__(self, instance: object | None, owner: type | None = None) -> Self | T:
        if instance is None:
            return self
        # From now on the attribute of that name is found before this descriptor.
        value: T = instance.__dict__.setdefault(self._name, self._compute(instance))
        return value
