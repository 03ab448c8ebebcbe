"""Moving bytes: plans, ranges in parallel, verification, publishing, retries, progress."""
