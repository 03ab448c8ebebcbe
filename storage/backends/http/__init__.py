"""Plain HTTP and HTTPS."""
