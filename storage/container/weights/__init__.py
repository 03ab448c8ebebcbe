"""Weights as arrays: the helpers that write and read them, a module for each format."""
