"""The verbs, one file each, all of one shape (see contract.py)."""
