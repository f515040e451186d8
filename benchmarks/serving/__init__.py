"""Serving: tokens per second, memory, start and the path through HTTP, beside the engines a model could be served by."""
