"""What authors of backends, and of what uses them, need to test theirs.

:class:`storage.testing.conformance.BackendConformance` is the contract of
:class:`storage.backends.base.Backend` as a pytest class. It needs ``pytest``, which only
its own modules import.

:class:`storage.testing.fault_proxy.FaultProxy` stands before a real HTTP server and lets go
wrong what a script of :mod:`storage.testing.fault_script` says, over a link of
:mod:`storage.testing.fault_link`; :class:`storage.testing.faulty_backend.FaultyBackend` does
the like around a backend, without a network. They need nothing.
"""
