"""`raymill config` and `raymill doctor`: settings files and this machine, without running anything."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from raymill.cli.arguments import On, Set, load_place

app = typer.Typer(no_args_is_help=True, help="Check settings files; print their JSON Schema.")


@app.command("check")
def config_check(files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Job or cluster files.")]) -> None:
    """Check job and cluster files without running anything."""
    from raymill import pipeline

    for file in files:
        print(f"{file}: a valid {pipeline.check_file(file)} file")


@app.command("schema")
def config_schema(which: Annotated[str, typer.Argument(metavar="job|cluster")] = "job") -> None:
    """Print the JSON Schema of job or cluster files."""
    import json

    from raymill import pipeline
    from raymill.cluster.config import ClusterConfig
    from raymill.errors import UsageError

    if which not in ("job", "cluster"):
        raise UsageError(f"there is no schema {which}", fix="raymill config schema job, or cluster")
    print(json.dumps(pipeline.job_schema() if which == "job" else ClusterConfig.model_json_schema(), indent=2))


def doctor(on: On = None, set_: Set = None) -> None:
    """Check this machine: versions, memory, disk, ports, rights; each finding with its fix."""
    from raymill.cluster.doctor import diagnose

    findings = diagnose(load_place(on, set_))
    for finding in findings:
        print(f"{'ok ' if finding.ok else 'BAD'} {finding.name}: {finding.found}")
        if not finding.ok:
            print(f"    hint: {finding.fix}")
    raise typer.Exit(0 if all(finding.ok for finding in findings) else 1)
