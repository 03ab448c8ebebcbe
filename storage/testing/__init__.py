"""What authors of backends need to test theirs.

:class:`storage.testing.conformance.BackendConformance` is the contract of
:class:`storage.backends.base.Backend` as a pytest class. It needs ``pytest``, which only
its own modules import.
"""
