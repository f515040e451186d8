"""The KV cache's memory: pages of PAGE_TOKENS positions, as many as a bound allows, reserved once.

A page holds keys and values of PAGE_TOKENS consecutive positions of one sequence in every layer: 2 x num_layers x
num_kv_heads x head_dim numbers for each position, 4 bytes each in fp32; in int8 1 byte each and one fp32 scale for each
head's key and value (4 layers of 2 heads of 64: 128 KiB a page, or 34). Where pages lie is the step's business.
"""

from __future__ import annotations

from typing import Literal

from raymill.errors import MachineError
from raymill.model.config import ModelConfig

PAGE_TOKENS = 32
KvPrecision = Literal["fp32", "int8"]


def pages_for(tokens: int) -> int:
    """Pages that hold so many positions."""
    return -(-tokens // PAGE_TOKENS)


def page_bytes(config: ModelConfig, precision: KvPrecision = "fp32") -> int:
    """Memory of one page."""
    heads = 2 * config.num_layers * config.num_kv_heads * PAGE_TOKENS
    return heads * (4 * config.head_width if precision == "fp32" else config.head_width + 4)


def fit_pages(config: ModelConfig, slots: int, max_bytes: int, precision: KvPrecision = "fp32") -> int:
    """As many pages as fit into `max_bytes`, at most what `slots` whole sequences need.

    MachineError when one sequence of max_seq_len does not fit.
    """
    whole = pages_for(config.max_seq_len)
    size = page_bytes(config, precision)
    fitting = min(slots * whole, max_bytes // size)
    if fitting < whole:
        need_mib = -(-whole * size // 2**20)
        smaller = ", or serve.kv_cache to int8" if precision == "fp32" else ""
        raise MachineError(
            "the KV cache does not fit",
            why=f"one sequence of {config.max_seq_len} tokens needs {need_mib} MiB; {max_bytes / 2**20:g} MiB are allowed",
            fix=f"set serve.max_kv_cache_mib to at least {need_mib}{smaller}",
        )
    return fitting
