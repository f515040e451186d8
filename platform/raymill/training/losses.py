"""Objectives: what a batch is judged by. Each is made of a batch's targets and given to the model's forward.

The head makes vocab_size numbers of each position, by far the widest tensor of a step, so the loss over it is made in
chunks of CHUNK_ROWS positions: their logits, their losses and, where gradients are on, the gradients of hidden states and
head at once, while the logits lie in the cache. The backward pass only multiplies by what comes in. Whole logits are never
held. At 2048 positions, 384 wide, vocabulary 8,192 it takes 393 ms on one core, 345 of which the products alone would.

Positions without a target are left out before the product: a batch whose documents are mostly prompts costs what it learns.
The chunk does not change a row's loss; sums over rows (the loss, the head's gradient) are the same within rounding.

Shapes: B batch, T sequence, N positions to be learned, D model_dim, V vocab_size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from raymill.dataset.loader import IGNORE
from raymill.model.kernels import array, is_plain, split_rows
from raymill.model.linear import Linear, multiply
from raymill.model.transformer import Objective

CHUNK_ROWS = 256
"""Positions whose logits are held at once: 8 MB at a vocabulary of 8,192. 128, 512 and 1024 take 4 to 8 % longer."""
GPU_CHUNK_ROWS = 4096
"""The same where a product must be large to fill the device."""


def next_token(targets_BT: Tensor) -> Objective:
    """The summed cross-entropy in nats over the targets that are not IGNORE, in float32 whatever the model's type.

    0, with gradients of 0, when there is none.
    """

    def objective(x_BTD: Tensor, head: nn.Linear) -> Tensor:
        whole = type(head.weight) in (Tensor, nn.Parameter) and type(head) in (nn.Linear, Linear) and head.bias is None
        if not whole or torch.compiler.is_compiling():
            logits_NV = head(x_BTD).flatten(0, 1).float()
            return functional.cross_entropy(logits_NV, targets_BT.flatten(), ignore_index=IGNORE, reduction="sum")
        x_ND, targets_N = x_BTD.flatten(0, 1), targets_BT.flatten()
        learned_N = targets_N != IGNORE
        if not bool(learned_N.all()):
            x_ND, targets_N = x_ND[learned_N], targets_N[learned_N]
        loss: Tensor = _LinearCrossEntropy.apply(x_ND, head.weight, targets_N)
        return loss

    return objective


class _LinearCrossEntropy(torch.autograd.Function):
    """Logits, losses and gradients chunk by chunk; under autocast the products run in its type, the rest in float32."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        kind = x_ND.device.type
        if torch.is_autocast_enabled(kind):
            x, weight = (each.to(torch.get_autocast_dtype(kind)) for each in (x_ND, weight_VD))
        else:
            x, weight = x_ND.contiguous(), weight_VD
        x_needed, weight_needed, _ = ctx.needs_input_grad
        dx_ND = torch.empty_like(x_ND) if x_needed else None
        dweight_VD = torch.zeros_like(weight_VD) if weight_needed else None
        losses_N = torch.empty(len(x), device=x.device)
        with torch.autocast(kind, enabled=False):
            size = CHUNK_ROWS if kind == "cpu" else GPU_CHUNK_ROWS
            for first in range(0, len(x), size):
                chunk = slice(first, first + size)
                logits_NV = multiply(x[chunk], weight.t())
                slopes_NV = _judge(logits_NV, targets_N[chunk], losses_N[chunk], x_needed or weight_needed)
                if dx_ND is not None:
                    dx_ND[chunk] = multiply(slopes_NV, weight)
                if dweight_VD is not None:
                    _add_product(dweight_VD, slopes_NV.t(), x[chunk])
        ctx.gradients = dx_ND, dweight_VD
        return losses_N.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of a loss were asked for twice")
        dx_ND, dweight_VD = ctx.gradients
        ctx.gradients = None  # scaled where they are, so that no second copy stands beside all activations
        dx = None if dx_ND is None else dx_ND.mul_(dloss.to(dx_ND.dtype))
        dweight = None if dweight_VD is None else dweight_VD.mul_(dloss.to(dweight_VD.dtype))
        return dx, dweight, None


def _add_product(sum_VD: Tensor, a_VN: Tensor, b_ND: Tensor) -> None:
    """sum += a b, summed in the type of the sum."""
    if a_VN.dtype == sum_VD.dtype:
        sum_VD.addmm_(a_VN, b_ND)
    else:
        sum_VD.add_(a_VN @ b_ND)


def _judge(logits_NV: Tensor, targets_N: Tensor, losses_N: Tensor, differentiated: bool) -> Tensor:
    """Writes each row's loss; returns its slopes, softmax less one at the target, in the logits' type."""
    if is_plain(logits_NV):
        from raymill.model import loops

        logits, targets, losses = array(logits_NV), array(targets_N.contiguous()), array(losses_N)
        split_rows(
            logits.shape, lambda i, j: loops.cross_entropy(logits[i:j], targets[i:j], differentiated, losses[i:j])
        )
        return logits_NV
    kept_NV = logits_NV.float()
    logs_N1 = kept_NV.logsumexp(1, keepdim=True)
    losses_N.copy_((logs_N1 - kept_NV.gather(1, targets_N[:, None]))[:, 0])
    if not differentiated:
        return logits_NV
    slopes_NV = (kept_NV - logs_N1).exp_()
    slopes_NV.scatter_add_(1, targets_N[:, None], slopes_NV.new_full((len(slopes_NV), 1), -1.0))
    return slopes_NV.to(logits_NV.dtype)
