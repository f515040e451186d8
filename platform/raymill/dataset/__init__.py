"""Token shards: the format training memory-maps, and the loader that walks them in an exact order."""
