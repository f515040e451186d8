"""One microbatch forward and backward, the same for every layout that holds a whole copy of the model's code path.

Its loss is its part of the mean over the `learned` targets of the whole step, so parts are added, never averaged.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from raymill.dataset.loader import Batch
from raymill.training.config import TrainingConfig
from raymill.training.losses import next_token


def mixed_precision(config: TrainingConfig, device: torch.device) -> AbstractContextManager[object]:
    """Where matrices are multiplied in bf16: on GPUs unless told otherwise. fp8 layers leave the rest to bf16."""
    precision = config.precision or ("bf16" if device.type == "cuda" else "fp32")
    return torch.autocast(device.type, torch.bfloat16) if precision in ("bf16", "fp8") else nullcontext()


def seed_dropout(seed: int, step: int, number: int) -> None:
    """What microbatch `number` of `step` drops, on whichever worker it runs and after whatever restart."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, number]).generate_state(1, np.uint64)[0] >> 1))


def backward_microbatch(
    model: nn.Module,
    batch: Batch,
    config: TrainingConfig,
    device: torch.device,
    *,
    learned: int,
    step: int,
    number: int,
) -> Tensor:
    """Adds the microbatch's gradient to `.grad`; returns its loss, detached, on the model's device."""
    if config.model.dropout:
        seed_dropout(config.seed, step, number)
    documents_BT = batch.documents_BT.to(device) if config.mask_documents else None
    with mixed_precision(config, device):
        objective = next_token(batch.targets_BT.to(device))
        total: Tensor = model(batch.inputs_BT.to(device), documents_BT, objective)
    loss = total.float() / max(1, learned)
    loss.backward()
    return loss.detach()
