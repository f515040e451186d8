"""Tokenizers: trained, applied, and the chat template."""
