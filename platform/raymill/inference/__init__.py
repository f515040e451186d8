"""The engine: many requests, one batched model step at a time."""
