"""Benchmarks against the tools that people use now; ``python -m tests.bench``."""
