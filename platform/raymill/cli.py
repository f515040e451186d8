"""The `raymill` command: parses, calls, prints. It decides nothing, and imports what it calls only when it is called,
so that `raymill --help` answers at once.

Result lines go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 failed, 2 the command or a file is wrong,
130 interrupted.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from raymill.artifact import Artifact, Kind
    from raymill.cluster.config import ClusterConfig
    from raymill.errors import RaymillError
    from raymill.pipeline import Job, Result, Step

_INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="From raw text to a monitored, quantized language-model endpoint on one Ray cluster.",
)
runs_app = typer.Typer(no_args_is_help=True, help="List, show and delete runs.")
config_app = typer.Typer(no_args_is_help=True, help="Check settings files; print their JSON Schema.")
app.add_typer(runs_app, name="runs")
app.add_typer(config_app, name="config")

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
    typer.Option(
        "--data", metavar="PATH", help="Your text: a file, folder or glob of txt, md, py, jsonl, each also .gz or .zst."
    ),
]
RunName = Annotated[
    str | None, typer.Argument(metavar="[RUN]", help="Name of the run; may be left out when there is one only.")
]


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
    loaded, cluster = _load(job, on, set_, data)
    stages = [name for name in loaded.stages() if name not in ("serve", "monitor") or not (no_serve or detach)]
    _run(loaded, cluster, stages)
    if detach and loaded.serve is not None:
        _detach(loaded, cluster)


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

    loaded, config = _load(job, on, set_, data)
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

    _load(job, on, set_, data)  # a wrong setting is said here, not on the cluster
    overrides = [*(set_ or []), *_data_override(data)]
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

    for_job, for_cluster = _split(set_)
    place = pipeline.load_cluster(on, for_cluster)
    folder = _find(place, run_name)
    loaded = pipeline.load_job(folder / "run.yaml", for_job)
    asked = {"serve": loaded.serve or ServeConfig(), "monitor": loaded.monitor or MonitorConfig()}
    job = loaded.model_copy(update={"name": folder.name, **asked})
    cluster = place if on else config.load(ClusterConfig, folder / "cluster.yaml", for_cluster)
    cluster = cluster.model_copy(update={"storage": place.storage})
    made = [artifact.path for artifact in runs.artifacts(folder) if artifact.manifest.kind == "checkpoint"]
    if not made and job.start_from is None:
        raise UsageError(
            f"run {folder.name} has no model to serve", fix="add train to its job and run it: raymill run JOB"
        )
    if new_key:
        with runs.locked(folder):  # not under an endpoint that is up
            forget_keys(folder)
    _run(job, cluster, ["serve", "monitor"], given={"checkpoint": made[-1]} if made else None)


@app.command()
def stop(run_name: RunName = None, on: On = None, set_: Set = None) -> None:
    """Stop a run, whatever it does; without a name, every endpoint that is up."""
    from raymill import runs

    place = _place(on, set_)
    if run_name:
        folders = [_find(place, run_name)]
    else:
        folders = [folder for folder in runs.list_runs(Path(place.storage)) if runs.read_live(folder)]
    stopped = [folder.name for folder in folders if runs.stop_run(folder)]
    nothing = f"{run_name} is not running" if run_name else "no endpoint is up"
    print(f"stopped {', '.join(stopped)}" if stopped else nothing)


@app.command()
def doctor(on: On = None, set_: Set = None) -> None:
    """Check this machine: versions, memory, disk, ports, rights; each finding with its fix."""
    from raymill.cluster.doctor import diagnose

    findings = diagnose(_place(on, set_))
    for finding in findings:
        print(f"{'ok ' if finding.ok else 'BAD'} {finding.name}: {finding.found}")
        if not finding.ok:
            print(f"    hint: {finding.fix}")
    raise typer.Exit(0 if all(finding.ok for finding in findings) else 1)


@runs_app.command("ls")
def runs_ls(on: On = None, set_: Set = None) -> None:
    """One line per run."""
    from raymill import runs

    for folder in runs.list_runs(Path(_place(on, set_).storage)):
        made = runs.artifacts(folder)
        live = runs.read_live(folder)
        done = " ".join(dict.fromkeys(artifact.manifest.stage for artifact in made)) or "nothing finished"
        print(
            f"{folder.name:<20} {made[-1].manifest.created_at if made else '-':<20} {done}"
            + (f"  up at {live.url}" if live else "")
        )


@runs_app.command("show")
def runs_show(run_name: RunName = None, on: On = None, set_: Set = None) -> None:
    """The artifacts of a run with their result lines."""
    from raymill import runs

    for artifact in runs.artifacts(_find(_place(on, set_), run_name)):
        size_bytes = sum(entry.size_bytes for entry in artifact.manifest.files)
        made = artifact.manifest
        print(f"{artifact.name}  {made.kind}, {size_bytes / 1e6:.1f} MB, {made.created_at}, {made.duration_s:.1f} s")
        print(f"    {made.summary}")


@runs_app.command("rm")
def runs_rm(
    run_name: Annotated[str, typer.Argument(metavar="RUN")],
    on: On = None,
    set_: Set = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Delete a run and everything in it."""
    from raymill import runs

    folder = _find(_place(on, set_), run_name)
    if not yes:
        typer.confirm(f"delete {folder} and its {len(runs.artifacts(folder))} artifacts?", abort=True)
    runs.remove_run(folder)
    print(f"deleted {folder}")


@config_app.command("check")
def config_check(files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Job or cluster files.")]) -> None:
    """Check job and cluster files without running anything."""
    from raymill import pipeline

    for file in files:
        print(f"{file}: a valid {pipeline.check_file(file)} file")


@config_app.command("schema")
def config_schema(which: Annotated[str, typer.Argument(metavar="job|cluster")] = "job") -> None:
    """Print the JSON Schema of job or cluster files."""
    import json

    from raymill import pipeline
    from raymill.cluster.config import ClusterConfig
    from raymill.errors import UsageError

    if which not in ("job", "cluster"):
        raise UsageError(f"there is no schema {which}", fix="raymill config schema job, or cluster")
    print(json.dumps(pipeline.job_schema() if which == "job" else ClusterConfig.model_json_schema(), indent=2))


def main() -> None:
    """The console script: errors of ours and of the machine as one message, anything else with its traceback."""
    from raymill.errors import RaymillError

    try:
        app()
    except RaymillError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno is None:  # a library's own, so not what the machine said
            raise
        print(f"error: {_explain(error)}", file=sys.stderr)
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as end:
        # typer turns Ctrl-C into a silent exit with 130
        if isinstance(end, SystemExit) and end.code != _INTERRUPTED:
            raise
        print("interrupted; the same command continues", file=sys.stderr)
        sys.exit(_INTERRUPTED)


def _explain(error: OSError) -> RaymillError:
    """What the machine refused, as one of our errors."""
    import errno

    from raymill.errors import MachineError

    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    fix = f"{'free space' if full else 'check the path and its rights'}, then run the same command again"
    what = "a file or folder cannot be used" if error.filename is None else f"{error.filename} cannot be used"
    return MachineError(what, why=error.strerror, fix=fix)


def _split(overrides: list[str] | None) -> tuple[list[str], list[str]]:
    """`--set` values for the job and, those that begin with `cluster.`, for the cluster file."""
    given = overrides or []
    prefix = "cluster."
    return [each for each in given if not each.startswith(prefix)], [
        each.removeprefix(prefix) for each in given if each.startswith(prefix)
    ]


def _data_override(data: str | None) -> list[str]:
    import json

    return [] if data is None else [f"prepare.sources={json.dumps([data])}"]


def _load(job: Path, on: Path | None, overrides: list[str] | None, data: str | None) -> tuple[Job, ClusterConfig]:
    from raymill import pipeline

    for_job, for_cluster = _split(overrides)
    return pipeline.load_job(job, [*for_job, *_data_override(data)]), pipeline.load_cluster(on, for_cluster)


def _place(on: Path | None, overrides: list[str] | None) -> ClusterConfig:
    """The cluster file of a command that takes no job."""
    from raymill import pipeline
    from raymill.errors import UsageError

    for_job, for_cluster = _split(overrides)
    if for_job:
        raise UsageError(f"--set {for_job[0]} is of a job, and this command takes none", fix="begin it with cluster.")
    return pipeline.load_cluster(on, for_cluster)


def _find(place: ClusterConfig, name: str | None) -> Path:
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


def _run(job: Job, config: ClusterConfig, stages: list[str], *, given: Mapping[Kind, Path] | None = None) -> None:
    from raymill import pipeline
    from raymill.cluster.session import Cluster

    signal.signal(signal.SIGTERM, _interrupt)
    with Cluster(config) as cluster:
        pipeline.run(
            job,
            cluster,
            stages=stages,
            given=given,
            on_start=_show_start,
            on_result=_show_result,
            while_live=_show_endpoint,
        )


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _show_start(step: Step) -> None:
    if step.started and not step.cached and not step.stage.LIVE:
        print(
            f"[{step.number}/{step.total}] {step.name:<9} continues where it was cut short", file=sys.stderr, flush=True
        )


def _show_result(result: Result) -> None:
    step = result.step
    took = "cached" if step.cached else f"{result.elapsed_s:.1f} s"
    print(f"[{step.number}/{step.total}] {step.name:<9} {took:>8}  {result.artifact.manifest.summary}", flush=True)


def _show_endpoint(result: Result) -> None:
    """Prints how to call the endpoint, then waits for Ctrl-C."""
    from raymill.stages.serve import new_key

    _show_usage(result.artifact, new_key(result.artifact.path.parent))
    signal.signal(signal.SIGTERM, _interrupt)  # again: starting Ray put a handler there that prints its stack
    print("Ctrl-C stops it.", flush=True)
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        print("stopping the endpoint", file=sys.stderr, flush=True)


def _show_usage(endpoint: Artifact, key: str | None) -> None:
    from raymill.stages.serve import usage_lines

    for line in usage_lines(endpoint, key):
        print(line)


def _detach(job: Job, config: ClusterConfig) -> None:
    """Starts `raymill serve` in a session of its own and waits until it answers.

    The key is made here: what the detached process prints goes to a log, where no key may stand.
    """
    import json

    from raymill import pipeline, runs
    from raymill.stages.serve import new_key

    folder = pipeline.run_folder(job, config)
    (folder / "logs").mkdir(exist_ok=True)
    log = folder / "logs" / "serve.log"
    storage = f"cluster.storage={json.dumps(config.storage)}"
    command = [sys.executable, "-m", "raymill.cli", "serve", folder.name, "--set", storage]
    key = new_key(folder)
    try:
        _start_detached(command, folder, log)
    except BaseException:
        if key is not None:
            print(f"API key, good from the next start on (shown once): {key}", flush=True)
        raise
    for line in log.read_text(encoding="utf-8").splitlines():
        if line.startswith("[") and "cached" not in line:
            print(line)
    served = [made for made in runs.artifacts(folder) if made.manifest.kind == "endpoint"]
    _show_usage(served[-1], key)
    print(f"It stays up; `{runs.stop_command(folder)}` ends it. Log: {log}")


def _start_detached(command: list[str], folder: Path, log: Path) -> None:
    """Comes back when the endpoint answers; if it does not come to that, nothing stays up."""
    from raymill import runs
    from raymill.errors import MachineError

    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        while runs.read_live(folder) is None:
            if process.poll() is not None:
                why = _last_error(log)
                fix = "mend that, then run again"
                raise MachineError("the endpoint did not start", where=str(log), why=why, fix=fix)
            time.sleep(0.2)
    except KeyboardInterrupt:
        process.terminate()
        process.wait()
        raise


def _last_error(log: Path) -> str:
    text = log.read_text(encoding="utf-8", errors="replace")
    return text[text.rfind("error:") :].strip()[:500] if "error:" in text else text[-300:].strip()


if __name__ == "__main__":
    main()
