"""The training loader: which sequences make step n, for any worker, in an order that a restart cannot change.

concat: the split's stream is cut into windows of seq_len + 1 ids that share one id with the next (inputs are the first
seq_len, targets the last). No position is empty; documents are cut where windows end.
best_fit: rows of whole documents, as dataset/packing.py makes them; what stays empty (0.1 % at 2,048) is ignored.

Each epoch visits every sequence once, in a permutation drawn from (seed, epoch). Position is therefore a pure function
of the step: there is no state to save, and the global batch is the same on any number of workers.

Costs for 8 x 256 over memory-mapped ids: concat 30 us, best_fit 70 us; a learn mask adds 40 us. At 8 x 2,048: 60, 120
and 100 to 160 us. The permutation holds 8 bytes per sequence; packing.py says what rows cost.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raymill.dataset.shards import PackingMethod, Place, TokenStream
from raymill.errors import DataError

if TYPE_CHECKING:
    from raymill.dataset.packing import Packing

IGNORE = -100
"""The target of a position that nothing is learned from; torch's own default."""

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Some sequences of one step. Shapes: B sequences, T seq_len; all int64."""

    inputs_BT: Tensor
    """Ids; where nothing stands, the end-of-document id."""
    targets_BT: Tensor
    """The id that follows each input; IGNORE where it is not to be learned."""
    documents_BT: Tensor
    """The number, in its row, of the document that the target belongs to: attention that stays in a document keeps to
    positions of equal number. An end-of-document id as input begins the next document. Empty positions have their own."""


class Loader:
    """Batches of one split. DataError when it is too small for one; ArtifactError when best_fit finds no lengths."""

    def __init__(
        self, stream: TokenStream, *, seq_len: int, global_batch_size: int, seed: int, packing: PackingMethod = "concat"
    ) -> None:
        self._stream = stream
        self._seq_len = seq_len
        self._global_batch_size = global_batch_size
        self._seed = seed
        self._packed: list[Packing] = []
        if packing == "best_fit":
            from raymill.dataset.packing import pack_stream  # brings numba, which concat can do without

            self._packed = pack_stream(stream, seq_len)
        self._first_rows = [0, *accumulate(map(len, self._packed))]
        self.num_sequences = self._first_rows[-1] if packing == "best_fit" else (len(stream) - 1) // seq_len
        if self.num_sequences < global_batch_size:
            raise DataError(
                f"the {stream.split} split is too small for one batch",
                why=f"{len(stream):,} tokens make {max(0, self.num_sequences)} sequences of {seq_len}; "
                f"a batch has {global_batch_size}",
                fix="give prepare more text, or lower train.global_batch_size or train.model.max_seq_len"
                if stream.split == "train"
                else "raise prepare.val_fraction, give prepare more text, or lower train.model.max_seq_len",
            )
        self._epoch = -1
        self._order: Ids = np.empty(0, np.int64)

    def sequence_numbers(self, step: int, first: int = 0, count: int | None = None) -> list[int]:
        """The sequences [first, first + count) of the global batch of `step` (from 0), all of it by default."""
        start = step * self._global_batch_size + first
        count = self._global_batch_size - first if count is None else count
        return [self._number(position) for position in range(start, start + count)]

    def batch(self, step: int, first: int, count: int) -> Batch:
        """Sequences [first, first + count) of the global batch of `step`."""
        assert first + count <= self._global_batch_size, (first, count)
        numbers = self.sequence_numbers(step, first, count)
        inputs, targets, documents = self._read_rows(numbers) if self._packed else self._read_windows(numbers)
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), torch.from_numpy(documents))

    def learned_targets(self, step: int) -> int:
        """Targets of the whole global batch of `step` that are not IGNORE, the same on every worker.

        Reads nothing but the learn mask, where there is one: seq_len bytes per sequence of the global batch.
        """
        masked = self._stream.has_learn_mask
        if not self._packed and not masked:
            return self._global_batch_size * self._seq_len
        learned = 0
        for number in self.sequence_numbers(step):
            if not self._packed:
                learned += int(self._stream.learned(number * self._seq_len + 1, self._seq_len).sum())
            elif masked:
                pieces = self._pieces(number)
                learned += sum(int(self._stream.learned(start, length).sum()) for start, length, _ in pieces)
            else:
                packing, row = self._find(number)
                learned += packing.targets(row)
        return learned

    def places(self, step: int) -> list[Place]:
        """Where the targets of the global batch of `step` stand in the shards, for who has to find them again."""
        found = []
        for number in self.sequence_numbers(step):
            pieces = self._pieces(number) if self._packed else [(number * self._seq_len + 1, self._seq_len, False)]
            found += [place for start, length, _ in pieces for place in self._stream.places(number, start, length)]
        return found

    def _read_windows(self, numbers: list[int]) -> tuple[Ids, Ids, Ids]:
        ids = np.empty((len(numbers), self._seq_len + 1), np.int64)
        for row, number in enumerate(numbers):
            self._stream.read_into(number * self._seq_len, ids[row])
        inputs, targets = ids[:, :-1], ids[:, 1:]
        documents = np.cumsum(inputs == self._stream.index.end_of_document_id, axis=1)
        documents -= documents[:, :1]
        if self._stream.has_learn_mask:
            learned = [self._stream.learned(number * self._seq_len + 1, self._seq_len) for number in numbers]
            targets = np.where(np.stack(learned), targets, IGNORE)
        return inputs, targets, documents

    def _read_rows(self, numbers: list[int]) -> tuple[Ids, Ids, Ids]:
        shape = (len(numbers), self._seq_len)
        inputs = np.full(shape, self._stream.index.end_of_document_id, np.int64)
        targets = np.full(shape, IGNORE, np.int64)
        documents = np.zeros(shape, np.int64)
        masked = self._stream.has_learn_mask
        for row, number in enumerate(numbers):
            at = 0
            for start, length, continues in self._pieces(number):
                stop = at + length
                piece = targets[row, at:stop]
                self._stream.read_into(start, piece)
                inputs[row, at + 1 : stop] = piece[:-1]
                if continues:
                    self._stream.read_into(start - 1, inputs[row, at : at + 1])
                if masked:
                    piece[~self._stream.learned(start, length)] = IGNORE
                documents[row, stop:] += 1
                at = stop
        return inputs, targets, documents

    def _pieces(self, number: int) -> list[tuple[int, int, bool]]:
        packing, row = self._find(number)
        return packing.pieces(row)

    def _find(self, number: int) -> tuple[Packing, int]:
        """The packing that holds a row, and its number there."""
        index = bisect_right(self._first_rows, number) - 1
        return self._packed[index], number - self._first_rows[index]

    def _number(self, position: int) -> int:
        epoch, index = divmod(position, self.num_sequences)
        if epoch != self._epoch:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self.num_sequences)
            self._epoch = epoch
        return int(self._order[index])
