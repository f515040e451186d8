"""The Transformer: its shape, its forward pass, its weights on disk."""
