"""Git repositories over HTTP, read only."""
