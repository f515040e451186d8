"""What a model's matrices read on real text: the calibration sequences walked through it block by block.

In: windows of the train split (held-out text must not shape what it later scores). Out: for each matrix the second
moments X^T X of its inputs, which GPTQ, Wanda and structured pruning decide by. A block's inputs are those that the
blocks before it, quantized or pruned already, give: its choices make up for their errors.

Memory: hidden states of all sequences, twice, in fp32 (64 x 1,024 x 768: 400 MB), and one (K, K) matrix in fp64.

Shapes: S sequences, T positions, D model_dim, K inputs of a matrix, N its outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from raymill.dataset.shards import TokenStream
from raymill.errors import DataError, QualityError
from raymill.model.transformer import Block, GatedFeedForward, Transformer

_AT_ONCE = 8
"""Sequences run at once."""


@dataclass(frozen=True)
class Calibration:
    """Token sequences to measure inputs on."""

    ids_ST: Tensor
    documents_ST: Tensor
    """Document number of each position; attention stays inside a document, as in training."""


def read_calibration(stream: TokenStream, sequences: int, seq_len: int) -> Calibration:
    """Windows of the train split, spread evenly over it; fewer where it is shorter. DataError without a single one."""
    assert stream.split == "train", stream.split
    windows = range(len(stream) // seq_len)
    if not windows:
        raise DataError(
            f"the train split has {len(stream):,} tokens: no calibration sequence",
            why=f"one has {seq_len:,}",
            fix="give prepare more text, or set compress.calibration_sequences to null",
        )
    count = min(sequences, len(windows))
    numbers = [len(windows) * index // count for index in range(count)]
    ids = torch.from_numpy(np.stack([stream.read(number * seq_len, seq_len) for number in numbers]))
    return Calibration(ids, (ids == stream.index.end_of_document_id).cumsum(1))


class Walk:
    """The calibration sequences on their way through a model's blocks."""

    def __init__(self, model: Transformer, calibration: Calibration) -> None:
        self._cos_TC, self._sin_TC = model.cos_TC, model.sin_TC
        documents = calibration.documents_ST.split(_AT_ONCE)
        with torch.no_grad():
            embedded = [
                model.embed(ids, of) for ids, of in zip(calibration.ids_ST.split(_AT_ONCE), documents, strict=True)
            ]
        self.states = list(zip(embedded, documents, strict=True))
        """What the next block reads, with document numbers, some sequences at a time."""

    def moments(self, block: Block, layer: nn.Module) -> Tensor:
        """X^T X (K, K), fp64, of all that `layer`, a part of `block`, reads. QualityError where that is not finite."""
        sums: list[Tensor] = []

        def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x_MK = inputs[0].flatten(0, -2)
            sums.append((x_MK.t() @ x_MK).double())
            if len(sums) > 1:
                sums[0] += sums.pop()

        hook = layer.register_forward_pre_hook(add)
        try:
            for state in self.states:
                self._run(block, *state)
        finally:
            hook.remove()
        if not bool(torch.isfinite(sums[0]).all()):
            raise QualityError(
                "the model cannot be calibrated",
                where="compress",
                why="what a matrix reads is not finite, or too large to be squared",
                fix="train again: weights that are not finite are lost, ones this large are a sign of trouble",
            )
        return sums[0]

    def advance(self, block: Block) -> None:
        """To the next block."""
        self.states = [(self._run(block, x_STD, of), of) for x_STD, of in self.states]

    @torch.no_grad()
    def _run(self, block: Block, x_STD: Tensor, documents_ST: Tensor) -> Tensor:
        length = x_STD.shape[1]
        y_STD: Tensor = block(x_STD, self._cos_TC[:length], self._sin_TC[:length], documents_ST)
        return y_STD


def readers(block: Block) -> list[tuple[nn.Module, tuple[str, ...]]]:
    """A block's matrices as (their module, names), those that read one input together, in the order they are run."""
    attention, mlp = block.self_attn, block.mlp
    first = ("gate_proj", "up_proj") if isinstance(mlp, GatedFeedForward) else ("up_proj",)
    return [
        (attention, ("q_proj", "k_proj", "v_proj")),
        (attention, ("o_proj",)),
        (mlp, first),
        (mlp, ("down_proj",)),
    ]
