"""The commands that run a job: run, plan, submit, serve, stop."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raymill.cli.arguments import (
    Data,
    JobPath,
    On,
    RunName,
    Set,
    data_override,
    find_folder,
    load_files,
    load_place,
    split_overrides,
)
from raymill.cli.endpoint import detach_endpoint, end_on_sigterm, hold_endpoint

if TYPE_CHECKING:
    from raymill.artifact import Kind
    from raymill.cluster.config import ClusterConfig
    from raymill.pipeline import Job, Result, Step

app = typer.Typer()


@app.command()
def run(
    job: JobPath,
    on: On = None,
    set_: Set = None,
    data: Data = None,
    no_serve: Annotated[bool, typer.Option("--no-serve", help="End before the serve stage.")] = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="Leave the endpoint up in the background; `raymill stop` ends it.")
    ] = False,
) -> None:
    """Run a job: what is done is skipped, what was killed goes on."""
    from raymill.errors import UsageError

    if detach and no_serve:
        raise UsageError("--detach leaves an endpoint up, and --no-serve asks for none", fix="give one of them")
    loaded, cluster = load_files(job, on, set_, data)
    stages = [name for name in loaded.stages() if name not in ("serve", "monitor") or not (no_serve or detach)]
    _run(loaded, cluster, stages)
    if detach and loaded.serve is not None:
        detach_endpoint(loaded, cluster)


@app.command()
def plan(
    job: JobPath,
    on: On = None,
    set_: Set = None,
    data: Data = None,
    write: Annotated[
        Path | None,
        typer.Option(
            "--write",
            metavar="FOLDER",
            help="Write the launcher files of the cluster (Ray cluster launcher or KubeRay).",
        ),
    ] = None,
) -> None:
    """Show what a run would do: stages, inputs, what is cached, workers against the cluster."""
    from raymill import pipeline
    from raymill.cluster.session import Cluster

    loaded, config = load_files(job, on, set_, data)
    cluster = Cluster(config)
    steps = pipeline.plan(loaded, config)
    print(f"run {loaded.name} in {pipeline.run_folder(loaded, config)} on cluster {config.name} ({config.provider})")
    for step in steps:
        stage = step.stage
        state = "cached" if step.cached else "to continue" if step.started else "to run"
        if stage.LIVE and step.final.exists():
            state = "starts again"
        workers = stage.demand(loaded.of(step.name)).workers
        size = config.roles.of(stage.ROLE)
        cpus, gpus = cluster.capacity(stage.ROLE)
        takes = ", ".join(path.name for path in step.inputs.values()) or "raw text"
        print(f"[{step.number}/{step.total}] {step.name:<9} {state:<12} {step.final.name}  from {takes}")
        needs = f"{workers * size.cpus_per_worker:g} of {cpus:g} CPUs"
        if size.gpus_per_worker:
            needs += f" and {workers * size.gpus_per_worker:g} of {gpus:g} GPUs"
        if workers:
            print(f"      {workers} {stage.ROLE} worker{'s' if workers > 1 else ''}: {needs}")
        if step.name == "train":
            for note in pipeline.training_memory(loaded, config, steps):
                print(f"      {note}")
    if write is not None:
        from raymill.cluster.launch import render
        from raymill.config import dump

        write.mkdir(parents=True, exist_ok=True)
        for name, text in render(config, dump(loaded)).items():
            (write / name).write_text(text, encoding="utf-8")
            print(f"wrote {write / name}")
    pipeline.check_capacity(loaded, cluster, steps)


@app.command()
def submit(
    job: JobPath,
    on: On = None,
    set_: Set = None,
    data: Data = None,
    address: Annotated[
        str | None, typer.Option("--address", metavar="URL", help="The cluster's dashboard, http://host:8265.")
    ] = None,
) -> None:
    """Send a job to a running Ray cluster, follow its log and end with its status."""
    from raymill.cluster.submit import submit as send

    load_files(job, on, set_, data)  # a wrong setting is said here, not on the cluster
    overrides = [*(set_ or []), *data_override(data)]
    raise typer.Exit(send(job, on, overrides, address=address, on_line=print))


@app.command()
def serve(
    run_name: RunName = None,
    on: On = None,
    set_: Set = None,
    new_key: Annotated[bool, typer.Option("--new-key", help="Replace the API key and show the new one.")] = False,
) -> None:
    """Serve the newest model of a run, with the run's own settings; nothing else of the job runs."""
    from raymill import config, pipeline, runs
    from raymill.cluster.config import ClusterConfig
    from raymill.errors import UsageError
    from raymill.stages.monitor import Config as MonitorConfig
    from raymill.stages.serve import Config as ServeConfig
    from raymill.stages.serve import forget_keys

    for_job, for_cluster = split_overrides(set_)
    place = pipeline.load_cluster(on, for_cluster)
    folder = find_folder(place, run_name)
    loaded = pipeline.load_job(folder / "run.yaml", for_job)
    asked = {"serve": loaded.serve or ServeConfig(), "monitor": loaded.monitor or MonitorConfig()}
    job = loaded.model_copy(update={"name": folder.name, **asked})
    cluster = place if on else config.load(ClusterConfig, folder / "cluster.yaml", for_cluster)
    cluster = cluster.model_copy(update={"storage": place.storage})
    made = runs.newest(folder, lambda manifest: manifest.kind == "checkpoint")
    if made is None and job.start_from is None:
        raise UsageError(
            f"run {folder.name} has no model to serve", fix="add train to its job and run it: raymill run JOB"
        )
    if new_key:
        with runs.locked(folder):  # not under an endpoint that is up
            forget_keys(folder)
    _run(job, cluster, ["serve", "monitor"], given={"checkpoint": made.path} if made else None)


@app.command()
def stop(run_name: RunName = None, on: On = None, set_: Set = None) -> None:
    """Stop a run, whatever it does; without a name, every endpoint that is up."""
    from raymill import runs

    place = load_place(on, set_)
    if run_name:
        folders = [find_folder(place, run_name)]
    else:
        folders = [folder for folder in runs.list_runs(Path(place.storage)) if runs.read_live(folder)]
    stopped = [folder.name for folder in folders if runs.stop_run(folder)]
    nothing = f"{run_name} is not running" if run_name else "no endpoint is up"
    print(f"stopped {', '.join(stopped)}" if stopped else nothing)


def _run(job: Job, config: ClusterConfig, stages: list[str], *, given: Mapping[Kind, Path] | None = None) -> None:
    from raymill import pipeline
    from raymill.cluster.session import Cluster

    end_on_sigterm()
    with Cluster(config) as cluster:
        pipeline.run(
            job,
            cluster,
            stages=stages,
            given=given,
            on_start=_show_start,
            on_result=_show_result,
            while_live=hold_endpoint,
        )


def _show_start(step: Step) -> None:
    if step.started and not step.cached and not step.stage.LIVE:
        print(
            f"[{step.number}/{step.total}] {step.name:<9} continues where it was cut short", file=sys.stderr, flush=True
        )


def _show_result(result: Result) -> None:
    step = result.step
    took = "cached" if step.cached else f"{result.elapsed_s:.1f} s"
    print(f"[{step.number}/{step.total}] {step.name:<9} {took:>8}  {result.artifact.manifest.summary}", flush=True)
