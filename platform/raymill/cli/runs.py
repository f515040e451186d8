"""`raymill runs`: what is in storage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raymill.cli.arguments import On, RunName, Set, find_folder, load_place

app = typer.Typer(no_args_is_help=True, help="List, show and delete runs.")


@app.command("ls")
def runs_ls(on: On = None, set_: Set = None) -> None:
    """One line per run."""
    from raymill import runs

    for folder in runs.list_runs(Path(load_place(on, set_).storage)):
        made = runs.artifacts(folder)
        live = runs.read_live(folder)
        done = " ".join(dict.fromkeys(artifact.manifest.stage for artifact in made)) or "nothing finished"
        print(
            f"{folder.name:<20} {made[-1].manifest.created_at if made else '-':<20} {done}"
            + (f"  up at {live.url}" if live else "")
        )


@app.command("show")
def runs_show(run_name: RunName = None, on: On = None, set_: Set = None) -> None:
    """The artifacts of a run with their result lines."""
    from raymill import runs

    for artifact in runs.artifacts(find_folder(load_place(on, set_), run_name)):
        size_bytes = sum(entry.size_bytes for entry in artifact.manifest.files)
        made = artifact.manifest
        print(f"{artifact.name}  {made.kind}, {size_bytes / 1e6:.1f} MB, {made.created_at}, {made.duration_s:.1f} s")
        print(f"    {made.summary}")


@app.command("rm")
def runs_rm(
    run_name: Annotated[str, typer.Argument(metavar="RUN")],
    on: On = None,
    set_: Set = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a run and everything in it."""
    from raymill import runs

    folder = find_folder(load_place(on, set_), run_name)
    if not yes:
        typer.confirm(f"delete {folder} and its {len(runs.artifacts(folder))} artifacts?", abort=True)
    runs.remove_run(folder)
    print(f"deleted {folder}")
