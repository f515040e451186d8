"""The shape every stage has.

TAKES = ("tokens",)            kinds it needs; the nearest earlier artifact of each kind is given
MAY_TAKE = ("checkpoint",)     kinds it uses when the job's `start_from` gives one
GIVES = "checkpoint"           kind it makes
ROLE = "train"                 the role of the cluster file its workers have
LIVE = False                   True: what it gives is a running process, started again on every run
class Config                   its settings
def demand(config) -> Demand   how many workers it asks for
def source_state(config)       what outside the run its result depends on (input files), part of its hash
def run(config, inputs, cluster) -> Artifact
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

from raymill import config
from raymill.artifact import Artifact, Draft, Kind
from raymill.cluster.config import RoleName
from raymill.telemetry.progress import Progress

if TYPE_CHECKING:
    from raymill.cluster.session import Cluster

STAGE_NAMES = ("prepare", "tokenize", "train", "tune", "evaluate", "compress", "serve", "monitor")


@dataclass(frozen=True)
class Demand:
    """What a stage asks of its role: this many workers at once."""

    workers: int


@dataclass(frozen=True)
class Inputs:
    """What a stage is given beside its settings."""

    artifacts: Mapping[Kind, Artifact]
    """The artifacts it takes, by kind."""
    draft: Draft
    """The folder to build the result in. It may hold work of an attempt that was killed."""
    run_folder: Path
    """`<storage>/<run>`: keys and other state that outlives one artifact."""
    progress: Progress

    def __getitem__(self, kind: Kind) -> Artifact:
        return self.artifacts[kind]

    def publish(
        self, stage: str, kind: Kind, stage_config: config.Config, summary: str, figures: dict[str, Any]
    ) -> Artifact:
        """Publishes the draft with the names of its inputs."""
        names = {str(taken): made.name for taken, made in self.artifacts.items()}
        return self.draft.publish(kind, stage, config=stage_config, inputs=names, summary=summary, figures=figures)


class Stage(Protocol):
    """What `stages.<name>` must offer; mypy checks each file against it in tests/house."""

    TAKES: tuple[Kind, ...]
    MAY_TAKE: tuple[Kind, ...]
    GIVES: Kind
    ROLE: RoleName
    LIVE: bool

    @property  # read-only: a module's own subclass may stand here
    def Config(self) -> type[config.Config]: ...  # noqa: N802

    def demand(self, config: Any) -> Demand: ...
    def source_state(self, config: Any) -> Any: ...
    def run(self, config: Any, inputs: Inputs, cluster: Cluster) -> Artifact: ...


def stage_module(name: str) -> Stage:
    """The stage of this name; its Ray library is imported only when it runs."""
    import importlib

    module: ModuleType = importlib.import_module(f"raymill.stages.{name}")
    return module


__all__ = ["STAGE_NAMES", "Demand", "Inputs", "Stage", "stage_module"]
