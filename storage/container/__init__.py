"""Model containers and archives."""
