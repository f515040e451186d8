"""The end of a run that no longer gets better, decided from its validations alone, so that a restart decides the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raymill.training.config import EarlyStoppingConfig

Validation = Mapping[str, float | None]
"""A row of validation.jsonl."""


def should_stop(history: Sequence[Validation], config: EarlyStoppingConfig) -> bool:
    """Whether the last `patience` validations brought nothing that is better by `min_delta`. `history` is in step order."""
    best, since = _worst(), 0
    for row in history:
        score = _score(row, config)
        since += 1
        if score > best and score - best >= config.min_delta:
            best, since = score, 0
    return since >= config.patience


def _score(row: Validation, config: EarlyStoppingConfig) -> float:
    """Higher is better. A figure that is missing or no number is worse than any."""
    value = row[config.metric]
    if value is None or value != value:
        return _worst()
    return -value if config.metric == "loss_nats" else value


def _worst() -> float:
    return float("-inf")
