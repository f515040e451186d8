"""The files of a model on disk, and its config.json in Hugging Face's words. No torch here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raymill.errors import ArtifactError
from raymill.model.config import ModelConfig
from raymill.model.hugging_face import config_from_hugging_face

WEIGHTS = "model.safetensors"
SHARDS = "model.safetensors.index.json"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
ANEW = "copy it here again; where a job made it, delete its folder and run the job again"
"""What helps where a file is damaged: any folder can be named, a run's or a user's own."""


def read_config(folder: Path) -> dict[str, Any]:
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{folder} holds no model", why=f"it has no {CONFIG}", fix="name a checkpoint") from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{folder / CONFIG} is damaged", why=str(error), fix=ANEW) from None
    if not isinstance(values, dict):
        raise ArtifactError(f"{folder / CONFIG} is damaged", why="it holds no settings", fix="name a checkpoint")
    return values


def read_model_config(folder: Path, *, exported: bool = False) -> tuple[ModelConfig, int]:
    """The shape of a folder's model and its vocabulary size. ArtifactError when it is not one of ours.

    exported: it may hold matrices as others quantize them, which we do not read.
    """
    values = read_config(folder)
    if exported:
        values.pop("quantization_config", None)
    config = config_from_hugging_face(values, str(folder / CONFIG))
    vocab_size = values.get("vocab_size")
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or vocab_size < 1:
        raise ArtifactError(
            f"vocab_size is {vocab_size!r}", where=str(folder / CONFIG), fix="name a complete checkpoint"
        )
    return config, vocab_size


def write_config(folder: Path, values: dict[str, Any]) -> None:
    (folder / CONFIG).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
