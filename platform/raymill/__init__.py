"""raymill: raw text shards in, a monitored, quantized language-model endpoint out, on one Ray cluster."""

__version__ = "0.4.0"
