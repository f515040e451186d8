"""The job file, and the order of its stages: skip what is done, run what is not, take up what was killed.

A stage's artifact lies in `<storage>/<run>/<stage>-<hash8>`; the hash is over its settings, the names of its inputs (which
hold their hashes), the state of its sources and the code version. So an artifact that is there is right, a changed
setting reruns its stage and all after it, and there is no other bookkeeping.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from raymill import __version__, config
from raymill.artifact import MANIFEST, Artifact, Draft, Kind, open_artifact, write_atomic
from raymill.cluster.config import ClusterConfig
from raymill.errors import UsageError, refused_write
from raymill.runs import clear_live, locked, newest, write_live
from raymill.stages.compress import Config as CompressConfig
from raymill.stages.contract import STAGE_NAMES, Inputs, Stage, stage_module
from raymill.stages.evaluate import Config as EvaluateConfig
from raymill.stages.monitor import Config as MonitorConfig
from raymill.stages.prepare import Config as PrepareConfig
from raymill.stages.serve import Config as ServeConfig
from raymill.stages.serve import preflight as preflight_serve
from raymill.stages.tokenize import Config as TokenizeConfig
from raymill.stages.train import Config as TrainConfig
from raymill.stages.train import memory_notes
from raymill.stages.tune import Config as TuneConfig
from raymill.stages.tune import check_space
from raymill.telemetry.progress import Progress

if TYPE_CHECKING:
    from raymill.cluster.session import Cluster


class Job(config.Config):
    """One line of stages, in this order; a stage that is left out does not run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "job"
    """Name of the run; its artifacts lie in `<storage>/<name>`."""
    start_from: str | None = None
    """`<run>/<stage>` or a path: an artifact of another run that this job starts with."""
    prepare: PrepareConfig | None = None
    """Raw text to clean documents."""
    tokenize: TokenizeConfig | None = None
    """Documents to token shards."""
    train: TrainConfig | None = None
    """Token shards to a model."""
    tune: TuneConfig | None = None
    """A search for better settings of train."""
    evaluate: EvaluateConfig | None = None
    """Scores of the model on held-out text."""
    compress: CompressConfig | None = None
    """A smaller, faster model."""
    serve: ServeConfig | None = None
    """The model behind an HTTP API."""
    monitor: MonitorConfig | None = None
    """Scrape configuration, alert rules and a health report for the endpoint."""

    @model_validator(mode="after")
    def _complete(self) -> Job:
        if self.tune is not None and self.tune.train is None:
            if self.train is None:
                raise ValueError("tune has nothing to start its trials from; fix: add train to the job, or tune.train")
            object.__setattr__(self, "tune", self.tune.model_copy(update={"train": self.train}))
        if self.tune is not None:
            check_space(self.tune)
        if not self.stages():
            raise ValueError(f"the job has no stage; fix: add one of {', '.join(STAGE_NAMES)}")
        return self

    def stages(self) -> list[str]:
        """The names of its stages, in order."""
        return [name for name in STAGE_NAMES if getattr(self, name) is not None]

    def of(self, stage: str) -> Any:
        return getattr(self, stage)


def load_job(path: Path | None, overrides: Sequence[str] = ()) -> Job:
    """Reads a job file. Raises ConfigError with every problem at once."""
    return config.load(Job, path, overrides)


def load_cluster(path: Path | None, overrides: Sequence[str] = ()) -> ClusterConfig:
    """Reads a cluster file; without one, this machine."""
    return config.load(ClusterConfig, path, overrides)


def check_file(path: Path) -> Literal["job", "cluster"]:
    """Loads a file as what its keys say it is. Raises what the loader of that kind raises."""
    keys = config.top_keys(path)
    if keys & (ClusterConfig.model_fields.keys() - Job.model_fields.keys()):
        load_cluster(path)
        return "cluster"
    _check_line(load_job(path).stages(), set(get_args(Kind)) if "start_from" in keys else set())
    return "job"


def job_schema() -> dict[str, Any]:
    """JSON Schema of a job file, for editors."""
    return Job.model_json_schema()


@dataclass(frozen=True)
class Step:
    """One stage of one run: where its artifact belongs and whether it is there."""

    number: int
    total: int
    name: str
    final: Path
    cached: bool
    started: bool
    """A draft of an attempt that was cut short is there."""
    inputs: Mapping[Kind, Path]

    @property
    def stage(self) -> Stage:
        return stage_module(self.name)


@dataclass(frozen=True)
class Result:
    """What a step gave."""

    step: Step
    artifact: Artifact
    elapsed_s: float
    """Seconds now; the artifact's manifest holds the seconds of the work itself."""


def run_folder(job: Job, cluster: ClusterConfig) -> Path:
    return Path(cluster.storage) / job.name


def plan(
    job: Job,
    cluster: ClusterConfig,
    stages: Sequence[str] | None = None,
    given: Mapping[Kind, Path] | None = None,
) -> list[Step]:
    """The steps of a job and what of them is done, without running anything.

    `given` are artifacts to begin with; without it, the one that the job's `start_from` names.
    """
    folder = run_folder(job, cluster)
    names = job.stages() if stages is None else list(stages)
    given = _start_artifacts(job, cluster) if given is None else given
    _check_line(names, set(given))
    paths: dict[Kind, Path] = dict(given)
    steps = []
    for number, name in enumerate(names, start=1):
        stage = stage_module(name)
        # A checkpoint a stage MAY_TAKE is only ever the one the user named: train does not go on from its own job's.
        optional = {kind: given[kind] for kind in stage.MAY_TAKE if kind in given}
        inputs = {**optional, **{kind: paths[kind] for kind in stage.TAKES}}
        key = {
            "stage": name,
            "config": job.of(name).model_dump(mode="json"),
            "inputs": {kind: path.name for kind, path in inputs.items()},
            "sources": stage.source_state(job.of(name)),
            "version": __version__,
        }
        final = folder / f"{name}-{config.digest(key)[:8]}"
        cached = (final / MANIFEST).exists() and not stage.LIVE
        started = final.with_name(final.name + ".partial").exists()
        steps.append(Step(number, len(names), name, final, cached, started, inputs))
        paths[stage.GIVES] = final
    return steps


def training_memory(job: Job, cluster: ClusterConfig, steps: Sequence[Step]) -> list[str]:
    """What the train stage will need per worker, as far as its vocabulary is known; see `stages.train.memory_notes`."""
    step = next((step for step in steps if step.name == "train" and not step.cached), None)
    if step is None or job.train is None:
        return []
    vocab_size = job.tokenize.vocab_size if job.tokenize is not None else 0
    if (step.inputs["tokens"] / MANIFEST).exists():
        vocab_size = open_artifact(step.inputs["tokens"], verify=False).figures["vocab_size"]
    return memory_notes(job.train, vocab_size, cluster.roles.train) if vocab_size else []


def check_capacity(job: Job, cluster: Cluster, steps: Sequence[Step]) -> None:
    """CapacityError when the workers of a stage can never run at once; UsageError when a batch cannot be shared out."""
    for step in steps:
        if not step.cached:
            workers = step.stage.demand(job.of(step.name)).workers
            cluster.check_fits(step.stage.ROLE, workers, step.name)
    if job.train is not None:
        job.train.check_layout(job.train.num_workers)


def run(
    job: Job,
    cluster: Cluster,
    *,
    stages: Sequence[str] | None = None,
    given: Mapping[Kind, Path] | None = None,
    on_start: Callable[[Step], None],
    on_result: Callable[[Result], None],
    while_live: Callable[[Result], None],
) -> None:
    """Runs what is not done. Every artifact is on disk, complete, before `on_result` hears of it.

    When the job serves, `while_live` is called last, with the endpoint's result and the run still locked; the endpoint
    is up until it returns. With `given` artifacts only a part of the job runs, and the run's settings stay as they are.
    """
    check_capacity(job, cluster, plan(job, cluster.config, stages, given))  # before the run's folder is made
    folder = run_folder(job, cluster.config)
    with locked(folder):
        steps = plan(job, cluster.config, stages, given)  # again: another process may have finished some
        if any(step.name == "serve" for step in steps):
            preflight_serve(job.of("serve"), cluster.config)
        if given is None:
            write_atomic(folder / "run.yaml", config.dump(job))
            write_atomic(folder / "cluster.yaml", config.dump(cluster.config))
        live: Result | None = None
        made: dict[Path, Artifact] = {}
        try:
            for step in steps:
                began = time.monotonic()
                on_start(step)
                if step.cached:
                    artifact = open_artifact(step.final, step.stage.GIVES)
                else:
                    artifact = _run_step(job, step, made, cluster, folder)
                made[step.final] = artifact
                result = Result(step, artifact, time.monotonic() - began)
                if step.stage.LIVE and step.stage.GIVES == "endpoint":
                    live = result
                on_result(result)
            if live is not None:
                write_live(folder, live.artifact.figures["url"])
                while_live(live)
        finally:
            clear_live(folder)
            cluster.close()


def _run_step(job: Job, step: Step, made: Mapping[Path, Artifact], cluster: Cluster, folder: Path) -> Artifact:
    artifacts = {kind: made.get(path) or open_artifact(path, kind) for kind, path in step.inputs.items()}
    progress = Progress(f"[{step.number}/{step.total}] {step.name}")
    draft = Draft(step.final)
    try:
        return step.stage.run(job.of(step.name), Inputs(artifacts, draft, folder, progress), cluster)
    except OSError as error:
        refused = refused_write(step.name, error, draft.path)
        if refused is None:
            raise
        raise refused from error
    finally:
        progress.close()
        if draft.path.exists():
            draft.checkpoint_clock()


def _start_artifacts(job: Job, cluster: ClusterConfig) -> dict[Kind, Path]:
    """The artifact that `start_from` names, by kind."""
    if job.start_from is None:
        return {}
    path = Path(job.start_from).expanduser()
    if not (path / MANIFEST).exists():
        run_name, _, stage = job.start_from.rpartition("/")
        found = newest(Path(cluster.storage) / run_name, lambda manifest: manifest.stage == stage)
        if found is None:
            raise UsageError(
                f"start_from {job.start_from} is neither an artifact's folder nor <run>/<stage>",
                fix="`raymill runs ls` and `raymill runs show <run>` list what there is",
            )
        path = found.path
    artifact = open_artifact(path, verify=False)
    return {artifact.manifest.kind: path}


def _check_line(names: Sequence[str], kinds: set[Kind]) -> None:
    """UsageError when a stage needs a kind that nothing before it gives."""
    have = set(kinds)
    for name in names:
        stage = stage_module(name)
        for kind in stage.TAKES:
            if kind not in have:
                makers = [other for other in STAGE_NAMES if kind == stage_module(other).GIVES]
                raise UsageError(
                    f"stage {name} takes a {kind} artifact, and nothing before it gives one",
                    fix=f"add {' or '.join(makers)} to the job, or name an artifact with start_from",
                )
        have.add(stage.GIVES)
