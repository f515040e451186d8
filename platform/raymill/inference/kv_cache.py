"""The KV cache: keys and values of every running sequence, one slot each, in one block of memory of fixed size.

A slot holds max_seq_len positions of every layer: 2 x num_layers x num_kv_heads x max_seq_len x head_dim x 4 bytes (1
MiB for 4 layers of 2 heads of 64 at 256 positions). Memory is reserved at once and touched as it is used, so a replica
cannot run out in the middle of a request.

Shapes: L layers, S slots, K num_kv_heads, T max_seq_len, C head_dim, M rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raymill.errors import MachineError
from raymill.model.config import ModelConfig


class KvCache:
    """Keys are stored as queries meet them: normed and rotated, where the model does."""

    def __init__(self, config: ModelConfig, num_slots: int, device: torch.device | None = None) -> None:
        shape = (num_slots, 2 * config.num_kv_heads, config.max_seq_len, config.head_width)
        self.num_slots = num_slots
        self._heads = config.num_kv_heads
        # zeros, not empty: attention multiplies what no one wrote yet by zero, and NaN times zero is NaN.
        self._layers = [torch.zeros(shape, device=device) for _ in range(config.num_layers)]

    def write(self, layer: int, slots_M: Tensor, positions_M: Tensor, kv: Tensor) -> None:
        """kv (M, 2K, C): keys, then values, of M rows."""
        self._layers[layer][slots_M, :, positions_M] = kv

    def read(self, layer: int, slots: slice | Tensor, positions: slice) -> tuple[Tensor, Tensor]:
        """Keys and values (n, K, positions, C) of some slots; a slice of slots costs no copy."""
        block = self._layers[layer][slots, :, positions]
        return block[:, : self._heads], block[:, self._heads :]


def slot_bytes(config: ModelConfig) -> int:
    """Memory of one slot."""
    return 8 * config.num_layers * config.num_kv_heads * config.max_seq_len * config.head_width


def fit_slots(config: ModelConfig, wanted: int, max_bytes: int) -> int:
    """As many slots as wanted, or as fit into `max_bytes`. MachineError when not even one does."""
    fitting = min(wanted, max_bytes // slot_bytes(config))
    if fitting < 1:
        need_mib = -(-slot_bytes(config) // 2**20)
        raise MachineError(
            "the KV cache does not fit",
            why=f"one slot of {config.max_seq_len} tokens needs {need_mib} MiB; {max_bytes / 2**20:g} MiB are allowed",
            fix=f"set serve.max_kv_cache_mib to at least {need_mib}",
        )
    return fitting
