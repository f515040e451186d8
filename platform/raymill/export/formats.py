"""The formats a checkpoint can be written in, and the one way to write any of them.

In: a checkpoint folder and the name of a format. Out: a folder of that format's files, written aside and put in place by
one rename, so that a kill leaves nothing under the name. Costs: the weights in memory twice, and the new files.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from raymill import runs
from raymill.artifact import sync, sync_folder
from raymill.errors import UsageError
from raymill.export.source import Source, read_source
from raymill.model.files import CONFIG

Write = Callable[[Source, Path, str], list[str]]
"""Writes a source into an empty folder at a precision; gives what the user has to know of the result."""


@dataclass(frozen=True)
class Format:
    """One format: what it is for, and what it can hold."""

    room: str
    """Module below raymill.export whose `write` makes it."""
    read_by: str
    """Who loads it."""
    precisions: dict[str, tuple[str, ...]]
    """What weights may be written as, by the checkpoint's method; the first is taken unless another is asked for."""
    architectures: tuple[str, ...] = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
    """Those it can hold."""
    may_lack_tokenizer: bool = False
    """Whether it can hold a model that is fed with ids alone."""
    packages: tuple[str, ...] = ()
    """What has to be installed to write it."""


_FLOATS = ("fp32", "bf16", "fp16")
FORMATS = {
    "hugging_face": Format(
        "hugging_face", "transformers, vLLM, SGLang", dict.fromkeys(("fp32", "int8", "int4"), _FLOATS)
    ),
    "gguf": Format(
        "gguf",
        "llama.cpp, Ollama, LM Studio, OpenVINO GenAI",
        {
            "fp32": ("fp32", "fp16", "q8_0", "q4_0"),
            "int8": ("q8_0", "fp32", "fp16", "q4_0"),
            "int4": ("q4_0", "fp32", "fp16", "q8_0"),
        },
        packages=("gguf",),
        may_lack_tokenizer=True,
    ),
    "compressed_tensors": Format(
        "compressed_tensors",
        "vLLM, transformers with compressed-tensors",
        dict.fromkeys(("int8", "int4"), _FLOATS),
        architectures=("llama", "mistral", "qwen2", "qwen3"),
    ),
    "onnx": Format(
        "onnx",
        "onnxruntime, and Optimum by the names of its inputs",
        {"fp32": ("fp32",), "int8": ("int8", "fp32"), "int4": ("fp32",)},
        packages=("onnx",),
    ),
}


@dataclass(frozen=True)
class Export:
    """What was written."""

    folder: Path
    precision: str
    size_bytes: int
    notes: tuple[str, ...]
    """What the user has to know of it."""


def find_checkpoint(storage: Path, name: str) -> Path:
    """The folder of `<run>` (its last checkpoint), `<run>/<stage>`, or a checkpoint's folder; UsageError else."""
    if (Path(name) / CONFIG).is_file():
        return Path(name)
    run_name, _, stage = name.partition("/")
    run = runs.find_run(storage, run_name)
    chosen = runs.newest(run, lambda manifest: manifest.kind == "checkpoint" and stage in ("", manifest.stage))
    if chosen is None:
        found = [each.manifest.stage for each in runs.artifacts(run) if each.manifest.kind == "checkpoint"]
        made = " or ".join(f"{run_name}/{each}" for each in dict.fromkeys(found))
        what = f"run {run_name} has no checkpoint" + (f" of {stage}" if stage else "")
        raise UsageError(what, fix=f"name {made}" if made else "train a model first: raymill run <job>")
    return chosen.path


def export(
    checkpoint: Path, name: str, folder: Path, precision: str | None = None, *, tokenizer: bool = True
) -> Export:
    """Writes `checkpoint` as format `name` into `folder`, which must be empty or not there.

    precision: None takes the nearest to what the checkpoint holds. tokenizer: False leaves it out where the format has
    room for one in the model's file (gguf).
    UsageError for a format, precision or architecture that cannot be; ArtifactError for a checkpoint that is not whole.
    """
    wanted = _check_format(name)
    _check_folder(folder)
    source = read_source(checkpoint)
    chosen = _check_fits(name, wanted, source, precision)
    if not tokenizer:
        if not wanted.may_lack_tokenizer:
            raise UsageError(f"format {name} always comes with its tokenizer", fix="leave --no-tokenizer out")
        source = dataclasses.replace(source, with_tokenizer=False)
    write: Write = importlib.import_module(f"raymill.export.{wanted.room}").write
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    aside.mkdir()
    try:
        notes = write(source, aside, chosen)
        sync_folder(aside)
        size_bytes = sum(file.stat().st_size for file in aside.rglob("*"))
        aside.rename(folder)  # onto an empty folder too
        sync(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Export(folder, chosen, size_bytes, tuple(notes))


def _check_format(name: str) -> Format:
    if name not in FORMATS:
        known = "; ".join(f"{each} ({form.read_by})" for each, form in FORMATS.items())
        raise UsageError(f"there is no format {name}", fix=f"give one of: {known}")
    missing = [package for package in FORMATS[name].packages if importlib.util.find_spec(package) is None]
    if missing:
        what = f"format {name} needs {' and '.join(missing)}, which this Python does not have"
        raise UsageError(what, fix="pip install 'raymill[export]'")
    return FORMATS[name]


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file", fix="name a new folder with --to")
    if folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty", fix="name a new folder with --to, or empty this one")


def _check_fits(name: str, wanted: Format, source: Source, precision: str | None) -> str:
    """The precision to write; UsageError where the format cannot hold the model."""
    architecture = source.config.architecture
    if architecture not in wanted.architectures:
        why = f"it holds {', '.join(wanted.architectures)}"
        raise UsageError(f"format {name} cannot hold {architecture}", why=why, fix=f"choose another of {_names()}")
    choices = wanted.precisions.get(source.method, ())
    if not choices:
        methods = " or ".join(wanted.precisions)
        what = f"format {name} cannot hold a checkpoint in {source.method}"
        raise UsageError(what, fix=f"name one in {methods} (compress makes them), or choose another of {_names()}")
    if precision is not None and precision not in choices:
        what = f"format {name} cannot write a {source.method} checkpoint as {precision}"
        raise UsageError(what, fix=f"give --precision as one of {', '.join(choices)}")
    return precision or choices[0]


def _names() -> str:
    return ", ".join(FORMATS)
