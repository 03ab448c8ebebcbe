"""Scripts that run in processes of their own; they import nothing of the harness."""
