"""What the image of KServe's storage initializer runs, around the library that is installed."""

import importlib
import os
import sys

from kserve_storage import Storage
from kserve_storage.logging import configure_logging, logger


def main():
    """Fetch what the arguments name, pair by pair; the exit status is the answer."""
    configure_logging()
    arguments = sys.argv[1:]
    if not arguments or len(arguments) % 2:
        print("Usage: initializer-entrypoint src_uri dest_path [src_uri dest_path ...]")
        sys.exit(1)
    sources, destinations = arguments[::2], arguments[1::2]
    for destination in filter(None, destinations):
        os.makedirs(destination, exist_ok=True)
    try:
        Storage.download_files(sources, destinations)
    except Exception as exc:  # noqa: BLE001 - the entry point catches all there is
        logger.error("Storage initialization failed: %s", exc)
        sys.exit(1)
    if os.environ.get("CONFIDENTIAL_ENABLED", "").lower() == "true":
        # What it would ask for the key is in the enclaves of some clouds alone.
        importlib.import_module("kserve_storage.confidential")


if __name__ == "__main__":
    main()
