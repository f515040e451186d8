"""int8: a Transformer's matrices in a quarter of their size, and the layers that run them.

In: a full-precision Transformer. Out: the same Transformer, its matrices int8 with one fp32 scale per output channel
(symmetric, round to nearest). Activations are quantized per token as they come (LLM.int8, SmoothQuant's baseline), so
a product is int8 x int8 summed exactly in int32: the result for one token does not depend on its neighbours in a batch.

On a CPU with VNNI `torch._int_mm` runs a 256 x 1024 product of one row in 6 us where fp32 needs 26. Elsewhere the same
integers are multiplied as fp32: right, without the speed. Weight-only int8 is never used: on CPUs it is slower than fp32.

On disk: `<name>.weight` int8 (N, K) and `<name>.weight_scale` fp32 (N, 1) in model.safetensors, norms, biases and
learned positions fp32, all under Llama's names, and `quantization` in config.json. A tied embedding is stored once, int8:
the head multiplies it, a look-up dequantizes rows.

Shapes: N output channels, K input channels, M rows (tokens), V vocab_size, D model_dim.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from raymill.errors import ArtifactError
from raymill.model.files import CONFIG, WEIGHTS, read_config, read_model_config, write_config
from raymill.model.linear import Linear
from raymill.model.rope import rotary_tables
from raymill.model.transformer import Transformer
from raymill.model.weights import load_model, read_tensors, save_tensors

QUANTIZATION = {"method": "int8", "weights": "int8 per output channel", "activations": "int8 per token, dynamic"}
_SMALLEST = 1e-12
"""Scale of a row of zeros; any positive number does."""


class Int8Linear(nn.Module):
    """A linear layer: int8 weights, activations quantized per row as they come; a bias is added in fp32."""

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, weight_NK: Tensor, weight_scale_N1: Tensor, bias_N: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("weight", weight_NK)
        self.register_buffer("weight_scale", weight_scale_N1)
        self.register_buffer("bias", bias_N)
        self._as_float: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) fp32 -> (..., N) fp32."""
        quantized, scale = quantize_rows(x.reshape(-1, x.shape[-1]))
        y_MN = self._product(quantized).float().mul_(self.weight_scale.view(1, -1))
        y_MN.mul_(scale)
        if self.bias is not None:
            y_MN.add_(self.bias)
        return y_MN.view(*x.shape[:-1], -1)

    def _product(self, x_MK: Tensor) -> Tensor:
        if has_int8_products(x_MK.device):
            return torch._int_mm(x_MK, self.weight.t())
        if self._as_float is None or self._as_float.device != x_MK.device:
            self._as_float = self.weight.float()
        return x_MK.float() @ self._as_float.t()


class Int8Embedding(nn.Module):
    """Rows of an int8 matrix, dequantized as they are looked up."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, weight_VD: Tensor, weight_scale_V1: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight_VD)
        self.register_buffer("weight_scale", weight_scale_V1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids] * self.weight_scale[ids]


def quantize_rows(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values and the fp32 scale (M, 1) of each row: x is about values * scale, symmetric around zero."""
    scale_M1 = torch.linalg.vector_norm(x_MK, torch.inf, dim=-1, keepdim=True).div_(127.0).clamp_min_(_SMALLEST)
    return (x_MK / scale_M1).round_().to(torch.int8), scale_M1


def has_int8_products(device: torch.device) -> bool:
    """Whether `torch._int_mm` is fast here."""
    return device.type == "cpu" and bool(torch.cpu._is_vnni_supported())


def quantize_model(model: Transformer) -> None:
    """Replaces every matrix of `model` in place. A tied head and embedding keep sharing one matrix."""
    with torch.no_grad():
        for part in model.model.layers.modules():
            for name, layer in list(part.named_children()):
                if isinstance(layer, nn.Linear):
                    bias = None if layer.bias is None else layer.bias.detach()
                    setattr(part, name, Int8Linear(*quantize_rows(layer.weight.detach()), bias))
        embedding = quantize_rows(model.model.embed_tokens.weight.detach())
        head = embedding if model.config.tie_embeddings else quantize_rows(model.lm_head.weight.detach())
        model.model.embed_tokens = cast(nn.Embedding, Int8Embedding(*embedding))
        model.lm_head = cast(Linear, Int8Linear(*head))


def save_quantized(folder: Path, model: Transformer, end_id: int) -> None:
    """Writes the weights and config of a quantized model."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("lm_head.")}
    save_tensors(folder / WEIGHTS, tensors)
    config = model.config.to_hugging_face(model.vocab_size, end_id)
    write_config(folder, {**config, "quantization": QUANTIZATION})


def load_served_model(folder: Path) -> Transformer:
    """Reads a checkpoint of either precision, ready for evaluation. ArtifactError when it is not whole."""
    values = read_config(folder)
    if "quantization" not in values:
        return load_model(folder).requires_grad_(False).eval()
    if values["quantization"].get("method") != "int8":
        method = values["quantization"].get("method")
        raise ArtifactError(f"{folder / CONFIG} names quantization {method!r}", fix="name an int8 or fp32 checkpoint")
    return _load_int8(folder)


def _load_int8(folder: Path) -> Transformer:
    config, vocab_size = read_model_config(folder)
    tensors = read_tensors(folder / WEIGHTS)
    with torch.device("meta"):  # names, shapes and types only: every tensor comes from the file
        model = Transformer(config, vocab_size).requires_grad_(False).eval()
        quantize_model(model)
    model.cos_TC, model.sin_TC = rotary_tables(config)
    if config.tie_embeddings:
        of_embedding = {name: tensor for name, tensor in tensors.items() if name.startswith("model.embed_tokens.")}
        tensors.update({name.replace("model.embed_tokens", "lm_head"): each for name, each in of_embedding.items()})
    for name, wanted in model.state_dict().items():
        found = tensors.get(name)
        if found is None or found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise _mismatch(folder, f"{name} is missing or of another shape or type")
        if name.endswith("_scale") and not bool(torch.isfinite(found).all()):
            raise _mismatch(folder, f"{name} is not finite")
    model.load_state_dict(tensors, strict=False, assign=True)
    return model


def _mismatch(folder: Path, why: str) -> ArtifactError:
    return ArtifactError(f"{folder / WEIGHTS} does not match {CONFIG}", why=why, fix="name a complete checkpoint")
