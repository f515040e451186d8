"""Jobs: what is accepted, what a plan says, what a wrong file or a place that is too small says."""

from __future__ import annotations

from pathlib import Path

import pytest

from raymill import pipeline
from raymill.artifact import Artifact
from raymill.cluster.config import ClusterConfig, Role, Roles
from raymill.cluster.session import Cluster
from raymill.errors import CapacityError, ConfigError, MachineError, UsageError
from raymill.runs import locked

JOB = """\
name: small
prepare:
  sources: [texts]
tokenize:
  vocab_size: 300
train:
  num_workers: 2
  steps: 5
"""


@pytest.fixture
def job_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("one text")
    path = tmp_path / "small.yaml"
    path.write_text(JOB)
    return path


def names(job: pipeline.Job) -> list[str]:
    return [step.final.name for step in pipeline.plan(job, ClusterConfig())]


def test_a_changed_setting_changes_its_stage_and_those_after_it(job_path: Path) -> None:
    before = names(pipeline.load_job(job_path))
    rate = names(pipeline.load_job(job_path, ["train.optimizer.learning_rate=1e-4"]))
    words = names(pipeline.load_job(job_path, ["tokenize.vocab_size=400"]))
    assert before == names(pipeline.load_job(job_path))
    assert before[:2] == rate[:2] and before[2] != rate[2]
    assert before[0] == words[0] and before[1] != words[1] and before[2] != words[2]


def test_changed_text_changes_every_stage(job_path: Path) -> None:
    before = names(pipeline.load_job(job_path))
    (job_path.parent / "texts" / "one.txt").write_text("another text")
    assert not set(before) & set(names(pipeline.load_job(job_path)))


def test_a_stage_without_its_input_is_refused(job_path: Path) -> None:
    job_path.write_text("name: x\ntrain: {}\n")
    with pytest.raises(UsageError, match="stage train takes a tokens artifact") as error:
        pipeline.plan(pipeline.load_job(job_path), ClusterConfig())
    assert "add tokenize" in error.value.fix


def test_an_empty_job_and_a_search_without_train_are_refused(job_path: Path) -> None:
    job_path.write_text("name: x\n")
    with pytest.raises(ConfigError, match="has no stage"):
        pipeline.load_job(job_path)
    job_path.write_text("name: x\ntune: {}\n")
    with pytest.raises(ConfigError, match="nothing to start its trials from"):
        pipeline.load_job(job_path)


def test_a_search_over_a_setting_that_is_not_there_is_refused_with_the_file(job_path: Path) -> None:
    with job_path.open("a") as file:
        file.write("tune: {space: {optimizer.learnin_rate: {choice: [1.0]}}}\n")
    with pytest.raises(ConfigError, match="learnin_rate is not a setting") as error:
        pipeline.load_job(job_path)
    assert "tune.space" in str(error.value) and "did you mean learning_rate?" in str(error.value)


def test_given_artifacts_begin_the_line_instead_of_the_job(job_path: Path, tmp_path: Path) -> None:
    job = pipeline.load_job(job_path, ["serve={}"])
    (step,) = pipeline.plan(job, ClusterConfig(), ["serve"], {"checkpoint": tmp_path / "compress-12345678"})
    assert step.inputs == {"checkpoint": tmp_path / "compress-12345678"}


def test_start_from_gives_the_kind_it_names(job_path: Path, tokens: Artifact) -> None:
    job_path.write_text(f"name: x\nstart_from: {tokens.path}\ntrain: {{}}\n")
    (step,) = pipeline.plan(pipeline.load_job(job_path), ClusterConfig())
    assert step.inputs == {"tokens": tokens.path}
    job_path.write_text("name: x\nstart_from: nothing/train\ntrain: {}\n")
    with pytest.raises(UsageError, match="neither an artifact's folder nor"):
        pipeline.plan(pipeline.load_job(job_path), ClusterConfig())


def test_a_cluster_that_cannot_fit_the_job_says_so_before_anything_runs(job_path: Path) -> None:
    job = pipeline.load_job(job_path, ["train.num_workers=500", "train.global_batch_size=4000"])
    place = Cluster(ClusterConfig())
    with pytest.raises(CapacityError, match="500 train workers do not fit on cluster laptop") as error:
        pipeline.check_capacity(job, place, pipeline.plan(job, place.config))
    assert "500 CPUs" in str(error.value) and error.value.exit_code == 2
    job = pipeline.load_job(job_path)
    gpu = Cluster(ClusterConfig(roles=Roles(train=Role(gpus_per_worker=8))))
    with pytest.raises(CapacityError, match="GPUs"):
        pipeline.check_capacity(job, gpu, pipeline.plan(job, gpu.config))
    assert not (job_path.parent / "runs").exists()


def test_a_file_is_checked_as_what_it_is(job_path: Path) -> None:
    assert pipeline.check_file(job_path) == "job"
    place = job_path.parent / "place.yaml"
    place.write_text("name: here\nprovider: local\n")
    assert pipeline.check_file(place) == "cluster"
    place.write_text("name: here\nprovider: moon\n")
    with pytest.raises(ConfigError, match="provider"):
        pipeline.check_file(place)


def test_a_run_in_use_is_refused_until_it_is_let_go(tmp_path: Path) -> None:
    held = locked(tmp_path / "run")
    held.__enter__()
    with pytest.raises(MachineError, match="run run is in use by process"), locked(tmp_path / "run"):
        pytest.fail("two processes have the run")
    held.__exit__(None, None, None)
    with locked(tmp_path / "run"):
        assert (tmp_path / "run" / ".lock").exists()
