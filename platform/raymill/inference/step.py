"""The seam between the engine and a model: chunks of ids in, logits out, one call per step for all sequences.

`ModelStep` is what the engine needs of a model. TorchStep (torch_step.py) runs everywhere; NativeStep (native_step.py) is
one call into compiled code. Both keep keys and values in pages of PAGE_TOKENS positions (kv_cache.py): which page holds
which positions of which sequence stands in a table that the scheduler writes and the step only reads.

No torch here: a replica with a native step never loads it.

Shapes: N rows of logits asked for, V vocab_size, D model_dim, S slots, P pages of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
PageTable = NDArray[np.int32]
"""(S, P): the page that holds positions p * PAGE_TOKENS and on of the sequence in a slot. Unused entries are 0."""


class Chunk(NamedTuple):
    """Consecutive ids of one sequence to feed in one step: rows (ids[i], slot, start + i)."""

    slot: int
    """The sequence's row in the page table."""
    start: int
    """Position of the first id; everything before it is in the KV cache."""
    ids: tuple[int, ...]
    num_logits: int
    """Logits are asked for after the last so many ids: 1 for the next token, more to check a draft or score a prompt."""
    adapter: int = 0
    """Number of the LoRA adapter (`ModelStep.load_adapter`); 0 is the base model."""
    wants_hidden: bool = False
    """Give the normed last hidden state of every id, for embeddings, instead of logits."""


class StepOutput(NamedTuple):
    """What a step gives back. Arrays may be views of memory that the next step overwrites."""

    logits_NV: Floats
    """Rows in the order of the chunks, and of the ids in each."""
    hidden_ND: Floats | None = None
    """Rows of the chunks that want hidden states, in the same order; None when no chunk does."""


class ModelStep(Protocol):
    """A model with its KV cache."""

    vocab_size: int
    max_seq_len: int
    num_pages: int
    """Pages in the KV cache; the table's entries are below it."""

    def __call__(self, chunks: Sequence[Chunk], table: PageTable) -> StepOutput:
        """Writes the chunks' keys and values into their pages and returns what they ask for.

        A sequence is in at most one chunk of a step. Chunks of one id come first.
        """
        ...

    def load_adapter(self, tensors: dict[str, tuple[Floats, Floats]], scale: float) -> int:
        """Takes a LoRA adapter: (A (r, K), B (N, r)) by the name of the matrix it is added to (`model.layers.0.
        self_attn.q_proj`), y += scale * B A x. Returns its number, from 1."""
        ...
