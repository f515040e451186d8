"""LoRA adapters as PEFT writes them: a folder in, small matrices by the name of the matrix they are added to out.

    adapter_config.json         r, lora_alpha, target_modules, use_rslora
    adapter_model.safetensors   base_model.model.<matrix>.lora_A.weight (r, K) and .lora_B.weight (N, r)

y += scale * B (A x) with scale = lora_alpha / r (Hu et al. 2021, arXiv:2106.09685), or lora_alpha / sqrt(r) with
use_rslora (Kalajdzievski 2023, arXiv:2312.03732). What would be computed otherwise (DoRA, trained biases, whole modules,
adapters of a base model that was changed for them) is refused by name: an adapter that is half applied writes wrong text
without a word. No torch here.

Shapes: r rank, K input channels, N output channels.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raymill.errors import ArtifactError
from raymill.inference.joins import places
from raymill.inference.step import Floats
from raymill.model.config import ModelConfig
from raymill.model.tensor_file import FLOATING, open_tensor_file

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
_MAX_RANK = 1024
_OFF: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "bias": ("none",),
    "modules_to_save": ([],),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "fan_in_fan_out": (False,),
    "layer_replication": ([],),
    "lora_bias": (False,),
    "megatron_config": ({},),
    "trainable_token_indices": ([], {}),
    "alora_invocation_tokens": (),
    # Others change the matrix itself as well: pissa, olora, corda, loftq, lora_ga.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),
}
"""Settings that change what is computed, with the values (besides none) at which they do not."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter, as a step takes it."""

    tensors: dict[str, tuple[Floats, Floats]]
    """(A (r, K), B (N, r)) by the name of the matrix, `model.layers.0.self_attn.q_proj`."""
    scale: float


def load_adapter(folder: Path, config: ModelConfig) -> Adapter:
    """Reads an adapter for a model of this shape. ArtifactError when it is not whole, not for it, or more than LoRA."""
    settings, rank = _read_settings(folder), read_rank(folder)
    alpha = settings.get("lora_alpha")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise _refusal(folder / CONFIG, f"lora_alpha is {alpha!r}", "train it with a number")
    halves: dict[str, dict[str, Floats]] = {}
    for name, tensor in _read_tensors(folder / WEIGHTS).items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise _refusal(
                folder / WEIGHTS, f"{name} is no part of LoRA on a matrix", "train it with target_modules only"
            )
        halves.setdefault(match[1], {})[match[2]] = tensor
    tensors = _checked(halves, rank, folder / WEIGHTS, config)
    return Adapter(tensors, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))


def read_rank(folder: Path) -> int:
    """The rank of the adapter in a folder. The same errors."""
    rank = _read_settings(folder).get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= _MAX_RANK:
        raise _refusal(folder / CONFIG, f"r is {rank!r}", f"train it with a rank from 1 to {_MAX_RANK}")
    return rank


def _checked(
    halves: dict[str, dict[str, Floats]], rank: int, path: Path, config: ModelConfig
) -> dict[str, tuple[Floats, Floats]]:
    """Both halves of every matrix, which the model has and they fit."""
    shapes = {name: place.shape for name, place in places(config).items()}
    tensors = {}
    for matrix, half in sorted(halves.items()):
        if matrix not in shapes:
            known = ", ".join(sorted({name.rsplit(".", 1)[1] for name in shapes}))
            raise _refusal(path, f"{matrix} is no matrix of this model's blocks", f"target only {known}")
        outputs, inputs = shapes[matrix]
        found = {side: tensor.shape for side, tensor in half.items()}
        if found != {"A": (rank, inputs), "B": (outputs, rank)}:
            why = f"{matrix} has {found}; needed are A {(rank, inputs)} and B {(outputs, rank)}"
            raise _refusal(path, why, "name an adapter of this checkpoint")
        if not all(np.isfinite(tensor).all() for tensor in half.values()):
            raise _refusal(path, f"{matrix} holds numbers that are not finite", "train it again")
        tensors[matrix] = (half["A"], half["B"])
    if not tensors:
        raise _refusal(path, "it holds no matrix", "name an adapter that was trained")
    return tensors


def _read_settings(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(
            f"there is no adapter in {folder}", why=f"it has no {CONFIG}", fix="name a folder that PEFT saved"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise _refusal(path, str(error), "save the adapter again") from None
    if not isinstance(settings, dict):
        raise _refusal(path, "it holds no settings", "save the adapter again")
    if settings.get("peft_type") != "LORA":
        raise _refusal(path, f"peft_type is {settings.get('peft_type')!r}", "train a LORA adapter, or merge this one")
    for name, values in _OFF.items():
        if settings.get(name) is not None and settings[name] not in values:
            raise _refusal(
                path, f"{name} is {settings[name]!r}", f"train it without {name}, or merge it into a checkpoint"
            )
    return settings


def _read_tensors(path: Path) -> dict[str, Floats]:
    stored = open_tensor_file(path)
    odd = {name: tensor.kind for name, tensor in stored.items() if tensor.kind not in FLOATING}
    if odd:
        raise _refusal(path, f"of types that are no weights: {odd}", "save it in fp32, fp16 or bf16")
    return {name: tensor.read_floats() for name, tensor in stored.items()}


def _refusal(path: Path, why: str, fix: str) -> ArtifactError:
    return ArtifactError(f"{path} cannot be used as a LoRA adapter", why=why, fix=fix)
