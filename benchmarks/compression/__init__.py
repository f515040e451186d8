"""What every way to compress a model costs and brings."""
