"""Decode steps on a GPU as CUDA graphs: launched as one, where each of some hundred operations would be launched by itself.

A graph computes fixed shapes, so steps are padded: to the next power of two of rows, and of pages that the longest of
them has. One graph is recorded for each pair when it is first met. Its inputs lie in one tensor that is filled before it is
replayed: for each row id, position, page and place of its key, then its pages. What pads goes to a page of its own.

To record one stops the step for a moment, at most (log2 slots + 1) (log2 pages + 1) times. All share one pool of memory, as they
run after each other and nothing but their logits outlives them, which are copied out before the next; each for itself would
keep a copy of the keys and values that it gathers, beyond the KV cache's bound.

Shapes: R rows, P pages of the longest row, V vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raymill.inference.kv_cache import PAGE_TOKENS
from raymill.inference.step import Chunk, PageTable

HEADER = 4
"""Columns before the pages: id, position, page, place."""


@dataclass(frozen=True)
class _Recorded:
    inputs_RX: Tensor
    logits_RV: Tensor
    replay: Callable[[], None]


class DecodeGraphs:
    """Steps in which every chunk is one id of which the next token is wanted."""

    def __init__(self, decode: Callable[[Tensor], Tensor], spare_page: int, device: torch.device) -> None:
        """decode: inputs (R, HEADER + P) int64 -> logits (R, V), without a look at any value on the host."""
        self._decode, self._spare_page, self._device = decode, spare_page, device
        self._pool: Any = None
        self._recorded: dict[tuple[int, int], _Recorded] = {}

    def __call__(self, chunks: Sequence[Chunk], table: PageTable) -> Tensor:
        """Logits of every chunk."""
        inputs_RX = self.inputs(chunks, table)
        shape = (inputs_RX.shape[0], inputs_RX.shape[1])
        recorded = self._recorded.get(shape)
        if recorded is None:
            recorded = self._recorded[shape] = self._record(shape)
        recorded.inputs_RX.copy_(torch.from_numpy(inputs_RX))
        recorded.replay()
        return recorded.logits_RV[: len(chunks)]

    def inputs(self, chunks: Sequence[Chunk], table: PageTable) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
        """The step as one array, padded."""
        longest = max(chunk.start for chunk in chunks) // PAGE_TOKENS + 1
        pages = min(_padded(longest), table.shape[1])
        filled = np.zeros((_padded(len(chunks)), HEADER + pages), np.int64)
        filled[:, 2] = filled[:, HEADER:] = self._spare_page
        for row, chunk in enumerate(chunks):
            own = table[chunk.slot, : chunk.start // PAGE_TOKENS + 1]
            filled[row, :HEADER] = (chunk.ids[0], chunk.start, own[-1], chunk.start % PAGE_TOKENS)
            filled[row, HEADER : HEADER + len(own)] = own
        return filled

    def _record(self, shape: tuple[int, int]) -> _Recorded:
        inputs_RX = torch.zeros(shape, dtype=torch.int64, device=self._device)
        inputs_RX[:, 2] = self._spare_page
        inputs_RX[:, HEADER:] = self._spare_page
        beside = torch.cuda.Stream(self._device)
        beside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(beside):  # what allocates or chooses on first use must have done so
            for _ in range(2):
                self._decode(inputs_RX)
        torch.cuda.current_stream(self._device).wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph, pool=self._pool):
            logits_RV = self._decode(inputs_RX)
        return _Recorded(inputs_RX, logits_RV, graph.replay)


def _padded(count: int) -> int:
    return 1 << (count - 1).bit_length()
