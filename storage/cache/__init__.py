"""Downloads without a destination: kept below one root, found again by what the source is."""
