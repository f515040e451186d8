"""The files of a model on disk, and its config.json in Hugging Face's words. No torch here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raymill.errors import ArtifactError

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"


def read_config(folder: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{folder} holds no model", why=f"it has no {CONFIG}", fix="name a checkpoint") from None
    except json.JSONDecodeError as error:
        raise ArtifactError(
            f"{folder / CONFIG} is damaged", why=str(error), fix="delete its folder and run again"
        ) from None
    return values


def write_config(folder: Path, values: dict[str, Any]) -> None:
    (folder / CONFIG).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
