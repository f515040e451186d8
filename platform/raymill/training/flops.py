"""How much of a machine's arithmetic a run puts to use: MFU, model FLOP utilisation (PaLM, Chowdhery et al. 2022, app. B).

In: the model's shape and the device's name. Out: the arithmetic a token must cost, and what the device could do at most.
What is counted twice in practice (activations computed again) or done for nothing (attention above the diagonal, between
documents) is no useful work, so a run that does it shows a lower MFU. No torch until a CPU is measured, once, for 0.2 s.
"""

from __future__ import annotations

import time
from typing import Literal

from raymill.model.config import ModelConfig

Precision = Literal["fp32", "bf16", "fp8", "int8"]

_NVIDIA_TFLOPS: tuple[tuple[str, dict[Precision, float]], ...] = (
    ("B200", {"fp32": 75, "bf16": 2250, "fp8": 4500}),
    ("GH200", {"fp32": 67, "bf16": 989, "fp8": 1979}),
    ("H200 NVL", {"fp32": 60, "bf16": 836, "fp8": 1671}),
    ("H200", {"fp32": 67, "bf16": 989, "fp8": 1979}),
    ("H100 NVL", {"fp32": 60, "bf16": 836, "fp8": 1671}),
    ("H100 PCIe", {"fp32": 51, "bf16": 756, "fp8": 1513}),
    ("H100", {"fp32": 67, "bf16": 989, "fp8": 1979}),
    ("A100", {"fp32": 19.5, "bf16": 312}),
    ("A40", {"fp32": 37.4, "bf16": 149.7}),
    ("A30", {"fp32": 10.3, "bf16": 165}),
    ("A10G", {"fp32": 35, "bf16": 70}),
    ("A10", {"fp32": 31.2, "bf16": 125}),
    ("RTX A6000", {"fp32": 38.7, "bf16": 154.8}),
    ("L40S", {"fp32": 91.6, "bf16": 362, "fp8": 733}),
    ("L40", {"fp32": 90.5, "bf16": 181, "fp8": 362}),
    ("L4", {"fp32": 30.3, "bf16": 121, "fp8": 242.5}),
    ("RTX 4090", {"fp32": 82.6, "bf16": 165.2, "fp8": 330.3}),
    ("RTX 3090", {"fp32": 35.6, "bf16": 71}),
    ("V100", {"fp32": 15.7}),
    ("T4", {"fp32": 8.1}),
)
"""Dense peaks as the vendor publishes them, sums in fp32; a name of two words stands before its first word.

V100 and T4 have no bf16: it runs there, but by other means than the ones a peak is published for.
"""
_GEMM_WIDTH = 1024
_GEMM_S = 0.2


def training_flops_per_token(model: ModelConfig, vocab_size: int, seq_len: int) -> float:
    """Operations, multiplications and additions, that forward and backward of one token need.

    6 for each weight of the matrices, the output head among them and the embedding, a look-up, not; and 12 for each
    layer, head, unit of its width and position seen: queries times keys and weights times values, 2 each, three times.
    A token sees half of the sequence on average, or its window. PaLM and nanoGPT count the whole of it, so their MFU
    of the same run is higher: by 1 % at 1B and 512 tokens, 7 % at 1B and 2,048.
    """
    heads, keys = model.num_heads * model.head_width, model.num_kv_heads * model.head_width
    block = 2 * model.model_dim * (heads + keys) + (3 if model.gated else 2) * model.model_dim * model.hidden_dim
    window = min(model.sliding_window or seq_len, seq_len)
    seen = window - window * (window - 1) / (2 * seq_len)
    return 6.0 * (model.num_layers * block + vocab_size * model.model_dim) + 12.0 * model.num_layers * heads * seen


def peak_flops(device: str, precision: Precision, threads: int) -> float | None:
    """Operations per second that one worker's device can do at most; None where nobody has said it.

    device: `cpu`, or a GPU's name as the driver tells it. A CPU has no published figure that holds for its clock and
    its neighbours, so it is measured, in fp32 whatever the precision: int8 may come to more than 1.
    """
    if device == "cpu":
        return _measured_gemm(threads)
    words = device.replace("-", " ").split()
    for name, peaks in _NVIDIA_TFLOPS:
        if set(name.split()) <= set(words) and "Laptop" not in words:
            return peaks[precision] * 1e12 if precision in peaks else None
    return None


def utilization(tokens_per_s: float, flops_per_token: float, peak: float | None, num_workers: int) -> float | None:
    """MFU of `num_workers` devices with that peak each; None where the peak is unknown."""
    return None if peak is None else tokens_per_s * flops_per_token / (peak * num_workers)


def _measured_gemm(threads: int) -> float:
    """The best of some products of 1024 x 1024 matrices in fp32."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    a, b = (torch.full((_GEMM_WIDTH, _GEMM_WIDTH), value) for value in (0.5, 0.25))
    out = torch.empty_like(a)
    best_s, until = float("inf"), time.perf_counter() + _GEMM_S
    while time.perf_counter() < until:
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        best_s = min(best_s, time.perf_counter() - started)
    torch.set_num_threads(before)
    return 2.0 * _GEMM_WIDTH**3 / best_s
