"""What the commands take, and how it becomes settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from raymill.cluster.config import ClusterConfig
    from raymill.pipeline import Job

JobPath = Annotated[Path, typer.Argument(metavar="JOB", help="Job file, for example jobs/tiny.yaml.")]
On = Annotated[Path | None, typer.Option("--on", metavar="CLUSTER", help="Cluster file; without it, this machine.")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Replace one setting: train.steps=200, or cluster.endpoint.port=8001. May be repeated.",
    ),
]
Data = Annotated[
    str | None,
    typer.Option("--data", metavar="PATH", help="Your text: a file, folder, glob or address; see platform/DATA.md."),
]
RunName = Annotated[
    str | None, typer.Argument(metavar="[RUN]", help="Name of the run; may be left out when there is one only.")
]


def split_overrides(overrides: list[str] | None) -> tuple[list[str], list[str]]:
    """`--set` values for the job and, those that begin with `cluster.`, for the cluster file."""
    given = overrides or []
    prefix = "cluster."
    return [each for each in given if not each.startswith(prefix)], [
        each.removeprefix(prefix) for each in given if each.startswith(prefix)
    ]


def data_override(data: str | None) -> list[str]:
    import json

    return [] if data is None else [f"prepare.sources={json.dumps([data])}"]


def load_files(job: Path, on: Path | None, overrides: list[str] | None, data: str | None) -> tuple[Job, ClusterConfig]:
    from raymill import pipeline

    for_job, for_cluster = split_overrides(overrides)
    return pipeline.load_job(job, [*for_job, *data_override(data)]), pipeline.load_cluster(on, for_cluster)


def load_place(on: Path | None, overrides: list[str] | None) -> ClusterConfig:
    """The cluster file of a command that takes no job."""
    from raymill import pipeline
    from raymill.errors import UsageError

    for_job, for_cluster = split_overrides(overrides)
    if for_job:
        raise UsageError(f"--set {for_job[0]} is of a job, and this command takes none", fix="begin it with cluster.")
    return pipeline.load_cluster(on, for_cluster)


def find_folder(place: ClusterConfig, name: str | None) -> Path:
    from raymill import runs
    from raymill.errors import UsageError

    storage = Path(place.storage)
    if name is not None:
        return runs.find_run(storage, name)
    found = runs.list_runs(storage)
    if len(found) != 1:
        names = ", ".join(folder.name for folder in found)
        raise UsageError(
            "name a run" if found else f"there is no run in {storage}",
            fix=f"runs here: {names or 'none yet; start with raymill run jobs/tiny.yaml'}",
        )
    return found[0]
