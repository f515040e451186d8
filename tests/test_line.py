"""The whole line as a newcomer runs it, on a small job: one command, an endpoint that answers, a second run that is
cached, a kill in the middle, one changed setting.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import openai
import pytest

from raymill.runs import artifacts, read_live

JOB = """
name: line
prepare: {sources: [texts], val_fraction: 0.2}
tokenize: {vocab_size: 512}
train:
  model: {num_layers: 1, model_dim: 32, num_heads: 2, num_kv_heads: 1, hidden_dim: 64, max_seq_len: 64}
  steps: 40
  global_batch_size: 8
  microbatch_size: 4
  checkpoint_every_steps: 10
  validate_every_steps: 20
  validation_sequences: 8
tune:
  space: {optimizer.learning_rate: {log_uniform: [1e-3, 1e-2]}, model.num_layers: {choice: [1, 2]}}
  num_trials: 2
  steps: 6
  first_rung_steps: 3
evaluate: {}
compress: {max_quality_loss: 0.05}
serve: {replicas: 2}
monitor: {}
"""


KEY = r"sk-[\w-]{20,}"


class Place:
    """A folder with a job, some text and a free port, and the command that runs there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []
        (folder / "texts").mkdir()
        library = Path(sysconfig.get_paths()["stdlib"])
        for module in sorted(library.glob("*.py"))[:60]:
            shutil.copy(module, folder / "texts")
        (folder / "job.yaml").write_text(JOB)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "raymill.cli", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen(command, cwd=self.folder, preexec_fn=_as_in_a_terminal, **pipes)
        self.started.append(process)
        return process

    def clean_up(self) -> None:
        """Nothing of a test that failed may stay up."""
        for process in self.started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        live = read_live(self.folder / "runs" / "line")
        if live is not None:
            os.kill(live.pid, signal.SIGKILL)

    def run_command(self, *arguments: str) -> list[str]:
        return ["run", "job.yaml", "--set", f"cluster.endpoint.port={self.port}", *arguments]

    def run(self, *arguments: str) -> str:
        process = self.start(*self.run_command(*arguments))
        out, err = process.communicate(timeout=400)
        assert process.returncode == 0, err
        return out


def _as_in_a_terminal() -> None:
    """A session of its own, in which Ctrl-C counts: a shell without a terminal has its children ignore it."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("line"))
    yield place
    place.clean_up()


def read_until(process: subprocess.Popen[str], mark: str) -> str:
    """What the process prints, up to the line that holds `mark`."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if mark in line:
            return "".join(lines)
    assert process.stderr is not None
    pytest.fail(f"ended before {mark!r}:\n{''.join(lines)}\n{process.stderr.read()}")


def states(text: str) -> dict[str, str]:
    """Stage to `cached` or its seconds, from the result lines."""
    return dict(re.findall(r"^\[\d/\d\] (\w+) +(cached|[\d.]+ s)  ", text, re.MULTILINE))


def test_killed_in_the_middle_it_goes_on_and_ends_with_an_endpoint(place: Place) -> None:
    killed = place.start(*place.run_command())
    read_until(killed, "] tokenize")
    deadline = time.monotonic() + 120
    while not list(place.folder.glob("runs/line/train-*.partial/.work/checkpoints/step-*")):
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()

    served = place.start(*place.run_command())
    try:
        text = read_until(served, "Ctrl-C stops it")
        done = states(text)
        assert list(done) == ["prepare", "tokenize", "train", "tune", "evaluate", "compress", "serve", "monitor"]
        assert done["prepare"] == done["tokenize"] == "cached" and done["train"] != "cached"
        _call_endpoint(place, text)
    finally:
        served.send_signal(signal.SIGINT)
        _, err = served.communicate(timeout=60)
    assert served.returncode == 0, err
    assert "Traceback" not in err
    assert not list(place.folder.glob("runs/line/*.partial"))
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", place.port)) != 0


def _call_endpoint(place: Place, text: str) -> None:
    key = re.search(KEY, text)
    assert key is not None
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{place.port}/v1", api_key=key[0])
    model = client.models.list().data[0].id
    whole = client.completions.create(model=model, prompt="def main(", max_tokens=8, temperature=0)
    stream = client.completions.create(model=model, prompt="def main(", max_tokens=8, temperature=0, stream=True)
    assert whole.choices[0].text == "".join(chunk.choices[0].text for chunk in stream if chunk.choices)
    assert whole.usage is not None and whole.usage.completion_tokens <= 8
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=str(client.base_url), api_key="sk-wrong").models.list()
    curl = re.search(r"^curl .*(?:\\\n.*)*", text, re.MULTILINE)
    assert curl is not None
    answer = subprocess.run(["bash", "-c", curl[0]], capture_output=True, text=True, timeout=30, check=True)
    assert json.loads(answer.stdout)["choices"]
    snippet = text[text.index("from openai") : text.index("Ctrl-C stops it")]
    ran = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True, timeout=30, check=True)
    assert ran.stdout.strip()


def test_run_again_everything_is_cached_and_one_setting_reruns_what_follows(place: Place) -> None:
    began = time.monotonic()
    assert set(states(place.run("--no-serve")).values()) == {"cached"}
    assert time.monotonic() - began < 30
    planned = place.start("plan", "job.yaml", "--set", "train.optimizer.learning_rate=1e-3")
    out, err = planned.communicate(timeout=60)
    assert planned.returncode == 0, err
    cached = dict(re.findall(r"^\[\d/\d\] (\w+) +(cached|to run|starts again)", out, re.MULTILINE))
    assert [name for name, state in cached.items() if state == "cached"] == ["prepare", "tokenize"]
    assert set(cached) == {"prepare", "tokenize", "train", "tune", "evaluate", "compress", "serve", "monitor"}


def test_a_damaged_artifact_is_named_and_nothing_is_built_on_it(place: Place) -> None:
    (weights,) = place.folder.glob("runs/line/train-*/model.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    process = place.start(*place.run_command("--no-serve"))
    _, err = process.communicate(timeout=60)
    weights.write_bytes(whole)
    assert process.returncode == 1 and "Traceback" not in err
    assert "model.safetensors is damaged" in err and "sha256" in err and "hint: delete runs/line/train-" in err


def test_detached_it_stays_up_until_it_is_stopped(place: Place) -> None:
    text = place.run("--detach")
    assert not re.search(KEY, text)  # the key was shown once, by the first run
    shown = place.start("runs", "ls").communicate(timeout=60)[0]
    assert f"up at http://127.0.0.1:{place.port}" in shown
    again = place.start(*place.run_command())
    _, err = again.communicate(timeout=60)
    assert again.returncode == 1 and "is in use by process" in err and "raymill stop line" in err
    assert "stopped line" in place.start("stop").communicate(timeout=90)[0]
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", place.port)) != 0
    log = (place.folder / "runs/line/logs/serve.log").read_text()
    assert not re.search(KEY, log) and "Traceback" not in log and "SIGTERM" not in log


@pytest.mark.chaos
def test_killed_at_random_points_it_ends_with_the_same_bytes(tmp_path_factory: pytest.TempPathFactory) -> None:
    whole, killed = Place(tmp_path_factory.mktemp("whole")), Place(tmp_path_factory.mktemp("killed"))
    try:
        whole.run("--no-serve")
        generator = random.Random(20261121)
        kills = 0
        for _ in range(12):
            process = killed.start(*killed.run_command("--no-serve"))
            with suppress(subprocess.TimeoutExpired):
                process.wait(generator.uniform(3, 18))
            process.kill()
            process.communicate()
            kills += process.returncode == -signal.SIGKILL
        assert kills >= 3
        killed.run("--no-serve")
        made = {stage: _sha256s(whole, stage) for stage in ("prepare", "tokenize", "train", "evaluate")}
        assert all(made.values())
        assert {stage: _sha256s(killed, stage) for stage in made} == made
        assert not list(killed.folder.glob("runs/line/*.partial"))
    finally:
        whole.clean_up()
        killed.clean_up()


def _sha256s(place: Place, stage: str) -> dict[str, str]:
    """File to sha256 of a stage's artifact; metrics.jsonl holds wall times, so its losses stand for it."""
    (artifact,) = [made for made in artifacts(place.folder / "runs" / "line") if made.manifest.stage == stage]
    hashes = {entry.path: entry.sha256 for entry in artifact.manifest.files}
    if hashes.pop("metrics.jsonl", None):
        rows = [json.loads(line) for line in artifact.file("metrics.jsonl").read_text().splitlines()]
        hashes["losses"] = json.dumps([(row["step"], row["loss"], row.get("validation")) for row in rows])
    return hashes
