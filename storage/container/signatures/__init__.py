"""Signatures of containers (Ed25519) and of trees (OpenSSF model-signing bundles)."""
