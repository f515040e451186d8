"""The small operations between a Transformer's matrices: norms, rotary positions, gated and plain activations.

Each is a function of tensors with its own gradient. fp32 tensors on a CPU go through one compiled loop (model/loops.py)
that reads its input once and keeps as little as the gradient needs; all others (GPUs, other types, DTensors, under
torch.compile) through torch's own operations. Both paths give the same within rounding. A norm of
2048 x 384 takes 0.1 to 0.2 ms on one core, an activation 0.3 to 0.6 ns for each number.

Shapes: B batch, T sequence, N rows, D width, H num_heads, K num_kv_heads, C head_width, P parts.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from raymill.model import rope

_PLAIN = (Tensor, nn.Parameter)
_LEAST_SPLIT = 1 << 16
"""Numbers below which a loop is not worth a second thread."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x over the root of its mean square along the last dimension, times weight (Zhang and Sennrich 2019)."""
    if not is_plain(x, weight):
        return functional.rms_norm(x, weight.shape, weight, eps)
    normed: Tensor = _RMSNorm.apply(x, weight, eps)
    return normed


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y, and its rms_norm: the residual and what the next branch reads, in one pass over memory."""
    if not is_plain(x, y, weight):
        total = x + y
        return total, rms_norm(total, weight, eps)
    summed: tuple[Tensor, Tensor] = _AddRMSNorm.apply(x, y, weight, eps)
    return summed


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x less its mean, over its standard deviation, times weight, plus bias (Ba et al. 2016). Torch's own is one pass."""
    return functional.layer_norm(x, weight.shape, weight, bias, eps)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020)."""
    if not is_plain(gate, up):
        return functional.silu(gate) * up
    y: Tensor = _SwiGLU.apply(gate, up)
    return y


def swiglu_gradients(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """What swiglu passes back to gate, written over dy, and to up; plain tensors all."""
    from raymill.model import loops

    gate, up = gate.contiguous(), up.contiguous()
    dup = torch.empty_like(up)
    dy_N, gate_N, up_N, dup_N = _flat(dy), _flat(gate), _flat(up), _flat(dup)
    split_rows(dy_N.shape, lambda i, j: loops.swiglu_backward(dy_N[i:j], gate_N[i:j], up_N[i:j], dy_N[i:j], dup_N[i:j]))
    return dy, dup


def sum_and_norm(a: Tensor, b: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor | None, Tensor, Tensor]:
    """a + b (None without b), 1 / its root mean square by row, and its rms_norm; plain tensors all."""
    from raymill.model import loops

    a = a.contiguous()
    y, roots_N = torch.empty_like(a), torch.empty(a.numel() // a.shape[-1])
    a_ND, y_ND, weight, roots = _rows(a), _rows(y), weight_array(weight_D), array(roots_N)
    if b is None:
        split_rows(a_ND.shape, lambda i, j: loops.rms_norm(a_ND[i:j], weight, eps, roots[i:j], y_ND[i:j]))
        return None, roots_N, y
    x = torch.empty_like(a)
    b_ND, x_ND = _rows(b.contiguous()), _rows(x)
    split_rows(
        x_ND.shape,
        lambda i, j: loops.add_rms_norm(a_ND[i:j], b_ND[i:j], weight, eps, x_ND[i:j], roots[i:j], y_ND[i:j]),
    )
    return x, roots_N, y


def normed_again(x: Tensor, weight_D: Tensor, roots_N: Tensor) -> Tensor:
    """The rms_norm whose roots sum_and_norm gave."""
    return (x * roots_N.view(*x.shape[:-1], 1)).mul_(weight_D)


def rms_norm_gradients(
    x: Tensor, weight_D: Tensor, roots_N: Tensor, dy: Tensor, dsum: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What the norm of x passes back to x, plus dsum where x is read elsewhere too, and to the weight."""
    from raymill.model import loops

    dy = dy.contiguous()
    summed = dsum is not None
    dx = torch.empty_like(x)
    x_ND, dy_ND, dx_ND, weight, roots = _rows(x), _rows(dy), _rows(dx), weight_array(weight_D), array(roots_N)
    dsum_ND = dy_ND if dsum is None else _rows(dsum.contiguous())
    parts = loops.PART_ROWS
    dweight_PD = torch.empty(-(-len(x_ND) // parts), x.shape[-1])
    dweight = array(dweight_PD)
    split_rows(
        x_ND.shape,
        lambda i, j: loops.rms_norm_backward(
            dy_ND[i:j],
            x_ND[i:j],
            weight,
            roots[i:j],
            dsum_ND[i:j],
            summed,
            dx_ND[i:j],
            dweight[i // parts : -(-j // parts)],
        ),
        parts,
    )
    return dx, dweight_PD.sum(0)


def gelu(x: Tensor) -> Tensor:
    """GELU by tanh, as GPT-2 has it (Hendrycks and Gimpel 2016)."""
    if not is_plain(x):
        return functional.gelu(x, approximate="tanh")
    y: Tensor = _GELU.apply(x)
    return y


def rotate(q_BTHC: Tensor, k_BTKC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary positions of queries and keys; the tables have the halves of C repeated (RoFormer, Llama's layout)."""
    if not is_plain(q_BTHC, k_BTKC, cos_TC, sin_TC):
        cos_T1C, sin_T1C = cos_TC[:, None], sin_TC[:, None]
        return rope.rotate(q_BTHC, cos_T1C, sin_T1C), rope.rotate(k_BTKC, cos_T1C, sin_T1C)
    return _Rotate.apply(q_BTHC, cos_TC, sin_TC, None, 0.0), _Rotate.apply(k_BTKC, cos_TC, sin_TC, None, 0.0)


def norm_rotate(
    q_BTHC: Tensor,
    k_BTKC: Tensor,
    q_weight_C: Tensor,
    k_weight_C: Tensor,
    eps: float,
    cos_TC: Tensor,
    sin_TC: Tensor,
) -> tuple[Tensor, Tensor]:
    """rms_norm of each head of queries and keys (Qwen 3), then rotate."""
    if not is_plain(q_BTHC, k_BTKC, q_weight_C, k_weight_C, cos_TC, sin_TC):
        return rotate(rms_norm(q_BTHC, q_weight_C, eps), rms_norm(k_BTKC, k_weight_C, eps), cos_TC, sin_TC)
    return (
        _Rotate.apply(q_BTHC, cos_TC, sin_TC, q_weight_C, eps),
        _Rotate.apply(k_BTKC, cos_TC, sin_TC, k_weight_C, eps),
    )


def is_plain(*tensors: Tensor) -> bool:
    """Whether all are ordinary fp32 tensors in a CPU's memory, run now rather than traced by a compiler.

    None is under autocast: it would make the products inside a compiled path bf16.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and all(
            type(tensor) in _PLAIN and tensor.device.type == "cpu" and tensor.dtype == torch.float32
            for tensor in tensors
        )
    )


def array(tensor: Tensor) -> Any:
    """A contiguous tensor's memory as numpy has it."""
    return tensor.detach().numpy()


def weight_array(weight: Tensor) -> Any:
    """The same for a weight: `.numpy()` would mark its storage as never to be resized, and FSDP frees weights by that."""
    return np.from_dlpack(weight.detach())


def split_rows(shape: tuple[int, ...], work: Callable[[int, int], None], multiple: int = 1) -> None:
    """Runs work(first, last) over all rows of an array, in as many parts as torch has threads.

    Each part but the last is a multiple of so many rows.
    """
    rows, threads = shape[0], torch.get_num_threads()
    if threads == 1 or math.prod(shape) < _LEAST_SPLIT or rows <= multiple:
        work(0, rows)
        return
    size = -(-rows // (threads * multiple)) * multiple
    jobs = [_pool(os.getpid()).submit(work, first, min(first + size, rows)) for first in range(size, rows, size)]
    work(0, min(size, rows))
    for job in jobs:
        job.result()


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="raymill-loops")


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        _, roots_N, y = sum_and_norm(x, None, weight_D, eps)
        ctx.save_for_backward(x, weight_D, roots_N)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D, roots_N = ctx.saved_tensors
        dx, dweight_D = rms_norm_gradients(x, weight_D, roots_N, dy, None)
        return dx, dweight_D, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x, roots_N, y = sum_and_norm(a, b, weight_D, eps)
        assert x is not None
        ctx.save_for_backward(x, weight_D, roots_N)
        ctx.set_materialize_grads(False)
        return x, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dsum: Tensor | None, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return dsum, dsum, None, None
        x, weight_D, roots_N = ctx.saved_tensors
        dx, dweight_D = rms_norm_gradients(x, weight_D, roots_N, dy, dsum)
        return dx, dx, dweight_D, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        from raymill.model import loops

        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        gate_N, up_N, y_N = _flat(gate), _flat(up), _flat(y)
        split_rows(y_N.shape, lambda i, j: loops.swiglu(gate_N[i:j], up_N[i:j], y_N[i:j]))
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return swiglu_gradients(dy.clone(memory_format=torch.contiguous_format), gate, up)


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        from raymill.model import loops

        x = x.contiguous()
        y = torch.empty_like(x)
        x_N, y_N = _flat(x), _flat(y)
        split_rows(x_N.shape, lambda i, j: loops.gelu(x_N[i:j], y_N[i:j]))
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        from raymill.model import loops

        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        dy_N, x_N, dx_N = _flat(dy.contiguous()), _flat(x), _flat(dx)
        split_rows(x_N.shape, lambda i, j: loops.gelu_backward(dy_N[i:j], x_N[i:j], dx_N[i:j]))
        return dx


class _Rotate(torch.autograd.Function):
    """The result lies in memory as (B, H, T, C), as attention reads it."""

    @staticmethod
    def forward(
        ctx: Any, x_BTHC: Tensor, cos_TC: Tensor, sin_TC: Tensor, weight_C: Tensor | None, eps: float
    ) -> Tensor:
        from raymill.model import loops

        x_BTHC, cos_TC, sin_TC = x_BTHC.contiguous(), cos_TC.contiguous(), sin_TC.contiguous()
        batch, length, heads, width = x_BTHC.shape
        y_BHTC = torch.empty(batch, heads, length, width)
        normed = weight_C is not None
        roots_BTH = torch.empty(batch, length if normed else 0, heads)
        x, cos, sin, roots, y = array(x_BTHC), array(cos_TC), array(sin_TC), array(roots_BTH), array(y_BHTC)
        weight = cos[0] if weight_C is None else weight_array(weight_C)
        split_rows(
            y.shape,
            lambda i, j: loops.rotate(x[i:j], cos, sin, weight, eps, normed, roots[i:j], y[i:j]),
        )
        ctx.save_for_backward(x_BTHC if normed else None, cos_TC, sin_TC, weight_C, roots_BTH)
        return y_BHTC.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTHC: Tensor) -> tuple[Tensor | None, ...]:
        from raymill.model import loops

        x_BTHC, cos_TC, sin_TC, weight_C, roots_BTH = ctx.saved_tensors
        normed = weight_C is not None
        batch, length, heads, width = dy_BTHC.shape
        dy_BHTC = dy_BTHC.transpose(1, 2).contiguous()
        dx_BTHC = torch.empty(batch, length, heads, width)
        dweight_BC = torch.empty(batch, width)
        dy, dx, dweight, roots = array(dy_BHTC), array(dx_BTHC), array(dweight_BC), array(roots_BTH)
        x, cos, sin = array(x_BTHC) if normed else dx, array(cos_TC), array(sin_TC)
        weight = weight_array(weight_C) if normed else cos[0]
        split_rows(
            dx.shape,
            lambda i, j: loops.rotate_backward(
                dy[i:j], x[i:j], cos, sin, weight, normed, roots[i:j], dx[i:j], dweight[i:j]
            ),
        )
        return dx_BTHC, None, None, dweight_BC.sum(0) if normed else None, None


def _rows(tensor: Tensor) -> Any:
    memory = array(tensor)
    return memory.reshape(-1, memory.shape[-1])


def _flat(tensor: Tensor) -> Any:
    return array(tensor).reshape(-1)
