"""Validation beside training: the weights of a step are copied into a model of their own, which is scored meanwhile.

The loop pays for the copy. The model costs its size in memory, made when the first validation comes.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from raymill.model.config import ModelConfig
from raymill.model.transformer import Transformer
from raymill.training.background import Background
from raymill.training.metrics import VALIDATION, ValidationMetrics, append_metrics

Validate = Callable[[Transformer, int | None], Mapping[str, float | None]]
"""Scores a model on that many sequences of the val split, None for all of it: loss_nats, bits_per_byte, accuracy."""


class Validations:
    """Those of one run, in the order of their steps, written to `folder`/validation.jsonl as each ends."""

    def __init__(
        self,
        folder: Path,
        config: ModelConfig,
        vocab_size: int,
        device: torch.device,
        background: Background,
        validate: Validate,
    ) -> None:
        self._path = folder / VALIDATION
        self._shape = config, vocab_size
        self._device = device
        self._background = background
        self._validate = validate
        self._model: Transformer | None = None
        self._free = threading.Lock()
        self._done: deque[ValidationMetrics] = deque()

    def submit(self, step: int, elapsed_s: float, weights: Mapping[str, Tensor], max_sequences: int | None) -> None:
        """Scores these weights later. Waits while those before are being scored."""
        self._background.acquire(self._free)
        try:
            if self._model is None:
                self._model = Transformer(*self._shape).to(self._device).requires_grad_(False).eval()
            own = dict(self._model.named_parameters())
            torch._foreach_copy_(list(own.values()), [weights[name].detach() for name in own])
        except BaseException:
            self._free.release()
            raise
        self._background.submit(
            "validate", partial(self._run, step, elapsed_s, max_sequences), after=self._free.release
        )

    def take_done(self) -> list[ValidationMetrics]:
        """Those that ended since the last call."""
        return [self._done.popleft() for _ in range(len(self._done))]

    def _run(self, step: int, elapsed_s: float, max_sequences: int | None) -> None:
        assert self._model is not None
        scores = self._validate(self._model, max_sequences)
        loss, accuracy = scores["loss_nats"], scores["accuracy"]
        assert loss is not None and accuracy is not None
        row = ValidationMetrics(step, loss, scores["bits_per_byte"], accuracy, elapsed_s)
        append_metrics(self._path, row)
        self._done.append(row)
