"""``python -m storage.integrations.kserve``: the storage initializer."""

import sys

from storage.integrations.kserve.initializer import main

if __name__ == "__main__":
    sys.exit(main())
