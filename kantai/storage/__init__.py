"""Files and folders that are published whole, and fetched once a node."""
