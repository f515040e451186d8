"""A checkpoint in the formats of other engines."""
