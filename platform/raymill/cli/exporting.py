"""`raymill export`: a checkpoint in another engine's format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raymill.cli.arguments import On, Set, load_place


def export(
    run_name: Annotated[
        str,
        typer.Argument(metavar="RUN", help="Name of the run, <run>/<stage>, or a checkpoint's folder."),
    ],
    format_: Annotated[
        str, typer.Option("--format", metavar="NAME", help="hugging_face, gguf, compressed_tensors or onnx.")
    ],
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="Folder to write; empty, or not there yet.")],
    precision: Annotated[
        str | None,
        typer.Option("--precision", metavar="NAME", help="fp32, bf16, fp16; for gguf also q8_0, q4_0."),
    ] = None,
    no_tokenizer: Annotated[
        bool, typer.Option("--no-tokenizer", help="gguf: the model alone; whoever loads it gives and gets ids.")
    ] = False,
    on: On = None,
    set_: Set = None,
) -> None:
    """Write a run's last checkpoint for other engines: Hugging Face, GGUF, compressed-tensors, ONNX."""
    from raymill.export.formats import export as export_checkpoint
    from raymill.export.formats import find_checkpoint

    checkpoint = find_checkpoint(Path(load_place(on, set_).storage), run_name)
    made = export_checkpoint(checkpoint, format_, to, precision, tokenizer=not no_tokenizer)
    print(f"{made.folder}: {format_}, {made.precision}, {made.size_bytes / 1e6:.1f} MB, from {checkpoint}")
    for note in made.notes:
        print(f"    note: {note}")
