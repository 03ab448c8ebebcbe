"""The cache: content by its digest, kept once, checked before each use, found without a store."""
