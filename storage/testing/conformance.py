"""The contract of a backend as a test class, for those here and for third parties.

Subclass it, give it two fixtures, and run pytest::

    class TestMyStore(BackendConformance):
        exceptions: ClassVar = {
            "test_odd_key_is_written[backslash]": "my store turns backslashes into slashes",
        }

        @pytest.fixture
        def backend(self, bucket):
            backend = MyBackend(bucket)
            yield backend
            backend.close()

        @pytest.fixture
        def raw(self, bucket):
            return MyRaw(bucket)

``backend`` is a backend whose bucket exists and is empty. ``raw`` (see
:class:`~storage.testing.conformance_support.Raw`) reaches the same bucket by other means, so
that two mistakes of one driver cannot cancel out. A third fixture, ``missing_bucket_backend``,
may give a backend whose bucket does not exist.

What a store cannot do is declared in ``exceptions``: the name of a test, with the id of its
parameters where only that case is meant, and the reason. Such a test has to fail, so a
declaration that is no longer true is found; and it has to fail with an assertion, an error
of this library or an ``OSError`` (out of ``raw``), so a crash is not taken for it. A fault of a
server that comes and goes, such as a race within it, is declared with :class:`Sometimes`.
"""

from __future__ import annotations

from typing import ClassVar

import pytest

# Before the imports below, so that their assertions say what they compared.
pytest.register_assert_rewrite(
    "storage.testing.conformance_support",
    "storage.testing.conformance_read",
    "storage.testing.conformance_write",
    "storage.testing.conformance_keys",
)

from storage.backends.base import Backend  # noqa: E402
from storage.errors import StorageError  # noqa: E402
from storage.testing.conformance_keys import Keys  # noqa: E402
from storage.testing.conformance_read import Reading  # noqa: E402
from storage.testing.conformance_support import Raw  # noqa: E402
from storage.testing.conformance_write import Conditions, Writing  # noqa: E402

__all__ = ["BackendConformance", "Raw", "Sometimes"]


class Sometimes(str):
    """The reason of an exception whose test may also pass: the store fails it by chance.

    Nobody notices when such a declaration is no longer true, so it is only for what depends on
    timing within the store::

        exceptions: ClassVar = {
            "test_of_many_creators_one_wins": Sometimes("two at once make my store answer 500"),
        }
    """

    __slots__ = ()


class BackendConformance(Reading, Writing, Conditions, Keys):
    """Every sentence of :class:`~storage.backends.base.Backend`, as tests.

    Attributes:
        exceptions: tests that this store cannot pass, each with the reason; a
            :class:`Sometimes` where it passes now and then.
        count: keys under one prefix in the test of many keys; more than one page of any
            store's listing.
        large: bytes of a payload that has to go in parts.
    """

    exceptions: ClassVar[dict[str, str]] = {}

    @pytest.fixture
    def backend(self) -> Backend:
        """Return the backend under test; its bucket exists and is empty."""
        raise NotImplementedError("the subclass has to define the fixture 'backend'")

    @pytest.fixture
    def raw(self) -> Raw:
        """Return another way into the same bucket."""
        raise NotImplementedError("the subclass has to define the fixture 'raw'")

    @pytest.fixture
    def missing_bucket_backend(self) -> Backend | None:
        """Return a backend whose bucket does not exist, if there can be one."""
        return None

    @pytest.fixture(autouse=True)
    def _as_declared(self, request: pytest.FixtureRequest) -> None:
        """Expect failure where an exception is declared; leave out what is not promised."""
        test = request.node.originalname
        needed = getattr(request.function, "needs_capabilities", ())
        if needed:
            backend: Backend = request.getfixturevalue("backend")
            for capability in needed:
                if not getattr(backend.capabilities, capability):
                    pytest.skip(f"{backend.name}: capabilities.{capability} is false")
        reason = self.exceptions.get(request.node.name, self.exceptions.get(test))
        if reason is not None:
            expected = (AssertionError, StorageError, OSError, pytest.fail.Exception)
            strict = not isinstance(reason, Sometimes)
            mark = pytest.mark.xfail(reason=reason, raises=expected, strict=strict)
            request.node.add_marker(mark)

    def test_declared_exceptions_name_tests(self) -> None:
        for name in self.exceptions:
            test, bracket, case = name.partition("[")
            known = getattr(type(self), test, None)
            assert test.startswith("test_"), f"{name}: that is no test"
            assert callable(known), f"{name}: there is no such test"
            for ids in _parameters(known) if bracket else ():
                assert any(one in case for one in ids), f"{name}: no such case among {ids}"


def _parameters(test: object) -> list[list[str]]:
    """Return the ids of each set of parameters of a test."""
    marks = [mark for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
    return [[str(one) for one in mark.kwargs.get("ids", mark.args[1])] for mark in marks]
