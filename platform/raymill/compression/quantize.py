"""int8: a Transformer's matrices in a quarter of their size, and the layers that run them.

In: a full-precision Transformer. Out: the same Transformer, its matrices int8 with one fp32 scale per output channel
(symmetric, round to nearest). Activations are quantized per token as they come (LLM.int8, SmoothQuant's baseline), so
a product is int8 x int8 summed exactly in int32: the result for one token does not depend on its neighbours in a batch.

On a CPU with VNNI `torch._int_mm` runs a 256 x 1024 product of one row in 6 us where fp32 needs 26. Elsewhere the same
integers are multiplied as fp32: right, without the speed. Weight-only int8 is never used: on CPUs it is slower than fp32.

On disk: `<name>.weight` int8 (N, K) and `<name>.weight_scale` fp32 (N, 1) in model.safetensors, norms fp32, and
`quantization` in config.json. A tied embedding is stored once, int8: the head multiplies it, a look-up dequantizes rows.

Shapes: N output channels, K input channels, M rows (tokens), V vocab_size, D model_dim.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from raymill.errors import ArtifactError
from raymill.model.config import ModelConfig
from raymill.model.files import CONFIG, WEIGHTS, read_config, write_config
from raymill.model.transformer import Transformer, rotary_tables
from raymill.model.weights import load_model, read_tensors

QUANTIZATION = {"method": "int8", "weights": "int8 per output channel", "activations": "int8 per token, dynamic"}
_SMALLEST = 1e-12
"""Scale of a row of zeros; any positive number does."""


class Int8Linear(nn.Module):
    """A linear layer without bias: int8 weights, activations quantized per row as they come."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, weight_NK: Tensor, weight_scale_N1: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight_NK)
        self.register_buffer("weight_scale", weight_scale_N1)
        self._as_float: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) fp32 -> (..., N) fp32."""
        quantized, scale = quantize_rows(x.reshape(-1, x.shape[-1]))
        y_MN = self._product(quantized).float().mul_(self.weight_scale.view(1, -1))
        return y_MN.mul_(scale).view(*x.shape[:-1], -1)

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
                    setattr(part, name, Int8Linear(*quantize_rows(layer.weight.detach())))
        embedding = quantize_rows(model.model.embed_tokens.weight.detach())
        head = embedding if model.config.tie_embeddings else quantize_rows(model.lm_head.weight.detach())
        _set_vocabulary(model, embedding, head)


def _set_vocabulary(model: Transformer, embedding: tuple[Tensor, Tensor], head: tuple[Tensor, Tensor]) -> None:
    model.model.embed_tokens = cast(nn.Embedding, Int8Embedding(*embedding))
    model.lm_head = cast(nn.Linear, Int8Linear(*head))


def save_quantized(folder: Path, model: Transformer, end_id: int) -> None:
    """Writes the weights and config of a quantized model."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("lm_head.")}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
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
    return _load_int8(folder, values)


def _load_int8(folder: Path, values: dict[str, Any]) -> Transformer:
    config = ModelConfig.from_hugging_face(values)
    tensors = read_tensors(folder / WEIGHTS)
    with torch.device("meta"):  # shapes only: every tensor comes from the file
        model = Transformer(config, values["vocab_size"])
    model.cos_TC, model.sin_TC = rotary_tables(config)
    try:
        for name, shape in [(name, parameter.shape) for name, parameter in model.named_parameters()]:
            _place(model, name, shape, tensors)
        embedding = _pair("model.embed_tokens.weight", (values["vocab_size"], config.model_dim), tensors)
        head = embedding
        if not config.tie_embeddings:
            head = _pair("lm_head.weight", (values["vocab_size"], config.model_dim), tensors)
    except (KeyError, ValueError) as error:
        why = f"{error.args[0]} is missing or of another shape or type"
        raise ArtifactError(
            f"{folder / WEIGHTS} does not match {CONFIG}", why=why, fix="name a complete checkpoint"
        ) from None
    _set_vocabulary(model, embedding, head)
    return model.requires_grad_(False).eval()


def _place(model: Transformer, name: str, shape: torch.Size, tensors: dict[str, Tensor]) -> None:
    """Puts the tensors of one parameter where the full-precision model has it."""
    owner_name, _, leaf = name.rpartition(".")
    if owner_name in ("model.embed_tokens", "lm_head"):
        return
    owner = model.get_submodule(owner_name)
    if len(shape) == 1:
        if tensors[name].shape != shape:
            raise ValueError(name)
        setattr(owner, leaf, nn.Parameter(tensors[name].float(), requires_grad=False))
        return
    parent_name, _, own = owner_name.rpartition(".")
    setattr(model.get_submodule(parent_name), own, Int8Linear(*_pair(name, tuple(shape), tensors)))


def _pair(name: str, shape: tuple[int, ...], tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The int8 weight and its scale, checked."""
    weight, scale = tensors[name], tensors[f"{name}_scale"]
    if tuple(weight.shape) != tuple(shape) or weight.dtype != torch.int8:
        raise ValueError(name)
    if tuple(scale.shape) != (shape[0], 1) or not bool(torch.isfinite(scale).all()):
        raise ValueError(f"{name}_scale")
    return weight, scale.float()
