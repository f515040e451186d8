"""The training loader: which sequences make step n, for any worker, in an order that a restart cannot change.

The split's stream is cut into windows of seq_len + 1 ids that share one id with the next (inputs are the first seq_len,
targets the last). Each epoch visits every window once, in a permutation drawn from (seed, epoch). Position is therefore a
pure function of the step: there is no state to save, and the global batch is the same on any number of workers.

Costs: one gather over memory-mapped ids per batch, about 30 us for 8 x 257; the permutation holds 8 bytes per window.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raymill.dataset.shards import TokenStream
from raymill.errors import DataError


class Loader:
    """Batches of one split. Shapes: B sequences, T seq_len."""

    def __init__(self, stream: TokenStream, *, seq_len: int, global_batch_size: int, seed: int) -> None:
        self._stream = stream
        self._seq_len = seq_len
        self._global_batch_size = global_batch_size
        self._seed = seed
        self.num_sequences = (len(stream) - 1) // seq_len
        if self.num_sequences < global_batch_size:
            raise DataError(
                f"the {stream.split} split is too small for one batch",
                why=f"{len(stream):,} tokens make {max(0, self.num_sequences)} sequences of {seq_len}; "
                f"a batch has {global_batch_size}",
                fix="give prepare more text, or lower train.global_batch_size or train.model.max_seq_len",
            )
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, np.int64)

    def sequence_numbers(self, step: int) -> list[int]:
        """The windows that make up the global batch of `step` (from 0), in order."""
        first = step * self._global_batch_size
        return [self._window(position) for position in range(first, first + self._global_batch_size)]

    def batch(self, step: int, first: int, count: int) -> tuple[Tensor, Tensor]:
        """inputs_BT and targets_BT, int64: sequences [first, first + count) of the global batch of `step`."""
        numbers = self.sequence_numbers(step)[first : first + count]
        rows = np.stack([self._stream.read(number * self._seq_len, self._seq_len + 1) for number in numbers])
        ids = torch.from_numpy(rows)
        return ids[:, :-1], ids[:, 1:]

    def _window(self, position: int) -> int:
        epoch, index = divmod(position, self.num_sequences)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self.num_sequences)
            self._epoch = epoch
        return int(self._order[index])
