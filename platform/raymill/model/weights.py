"""A model on disk: `model.safetensors` and `config.json` in Hugging Face's layout, `tokenizer.json` beside them."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from raymill.errors import ArtifactError
from raymill.model.config import ModelConfig
from raymill.model.files import CONFIG, WEIGHTS, read_config, write_config
from raymill.model.transformer import Transformer


def save_model(folder: Path, model: Transformer, end_id: int) -> None:
    """Writes weights and config; a tied head is not stored twice."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in model.state_dict().items()}
    if model.config.tie_embeddings:
        del tensors["lm_head.weight"]
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    write_config(folder, model.config.to_hugging_face(model.vocab_size, end_id))


def load_model(folder: Path) -> Transformer:
    """Reads a full-precision model; ArtifactError when weights and config do not belong together."""
    values = read_config(folder)
    model = Transformer(ModelConfig.from_hugging_face(values), values["vocab_size"])
    tensors = read_tensors(folder / WEIGHTS)
    if model.config.tie_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ArtifactError(
            f"{folder / WEIGHTS} does not match {CONFIG}", why=str(error)[:300], fix="name a complete checkpoint"
        ) from None
    return model


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file's tensors by name."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing", fix="name a complete checkpoint") from None
    except SafetensorError as error:
        raise ArtifactError(
            f"{path} is damaged", why=str(error), fix="delete its folder and run the job again"
        ) from None
    return tensors
