"""What config.json says of a quantized checkpoint. No torch here: native code reads it too.

    int8    `<matrix>.weight` int8 (N, K), `<matrix>.weight_scale` fp32 (N, 1)
    int4    `<matrix>.weight` uint8 (N, K/2), two values a byte: the low half is the even column, stored as q + 8 with q in
            -8..7; `<matrix>.weight_scale` fp16 (N, K/group_size). Embedding and head as in int8

A value is q times its scale. Activations are int8 per row, symmetric, rounded to even as they come; sums are exact in
int32, under int4 per group and then added in fp32 in the order of the groups. A tied head is stored once, as the embedding.
`lm_head.input_scale` fp32 (D), where it is there: what the last norm's gain and bias were divided by and the head's columns
multiplied with. Logits need nothing of it; hidden states leave the model multiplied by it.

Shapes: N output channels, K input channels, D model_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from raymill.errors import ArtifactError, UsageError
from raymill.model.config import ModelConfig

QUANTIZATION = "quantization"
"""The key in config.json."""
HEAD_INPUT_SCALE = "lm_head.input_scale"
"""The one tensor beside matrices and their scales."""
QuantizedMethod = Literal["int8", "int4"]
GroupSize = Literal[32, 64, 128]
_WIDEST = 2**31 // (128 * 127)
"""Input channels whose products of int8 sum up in int32, whatever their values."""


@dataclass(frozen=True)
class Quantization:
    """How the matrices of a checkpoint are stored."""

    method: QuantizedMethod
    group_size: GroupSize = 32
    """int4: consecutive input channels that share one scale."""

    def to_json(self) -> dict[str, Any]:
        if self.method == "int8":
            kind: dict[str, Any] = {"method": "int8", "weights": "int8 per output channel"}
        else:
            weights = f"int4 per group of {self.group_size} input channels; embedding and head int8"
            kind = {"method": "int4", "group_size": self.group_size, "weights": weights}
        return {**kind, "activations": "int8 per token, dynamic"}

    def check_fits(self, config: ModelConfig) -> None:
        """UsageError where the matrices of such a model do not divide into groups."""
        widths = {"model_dim": config.model_dim, "hidden_dim": config.hidden_dim}
        widths["num_heads x head_dim"] = config.num_heads * config.head_width
        for name, width in widths.items():
            if width > _WIDEST:
                raise UsageError(
                    f"sums over the model's {name} {width} do not fit 32 bits; {self.method} takes at most {_WIDEST}",
                    where="compress.method",
                    fix="set compress.method to fp16 or bf16",
                )
        if self.method == "int8":
            return
        for name, width in widths.items():
            if width % self.group_size:
                fits = [size for size in get_args(GroupSize) if all(each % size == 0 for each in widths.values())]
                fix = f"set compress.group_size to {fits[-1]}" if fits else "set compress.method to int8"
                raise UsageError(
                    f"int4 groups of {self.group_size} do not divide the model's {name} {width}",
                    where="compress.group_size",
                    fix=fix,
                )


def read_quantization(values: dict[str, Any], where: str) -> Quantization | None:
    """What a config.json says; None for weights of a floating type. ArtifactError names what is known."""
    found = values.get(QUANTIZATION)
    if found is None:
        return None
    method = found.get("method") if isinstance(found, dict) else found
    if method == "int8":
        return Quantization("int8")
    if method != "int4":
        raise ArtifactError(
            f"{where} names quantization {method!r}",
            why=f"known are {' and '.join(get_args(QuantizedMethod))}, or none",
            fix="name a checkpoint that raymill made, or make this one again with compress",
        )
    size = found.get("group_size")
    if size not in get_args(GroupSize) or isinstance(size, bool):
        raise ArtifactError(
            f"{where} names int4 groups of {size!r}",
            why=f"known are {', '.join(map(str, get_args(GroupSize)))}",
            fix="name a checkpoint that raymill made, or make this one again with compress",
        )
    return Quantization("int4", size)
