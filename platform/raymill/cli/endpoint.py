"""An endpoint that is up: shown and held until Ctrl-C, or left in the background."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raymill.artifact import Artifact
    from raymill.cluster.config import ClusterConfig
    from raymill.pipeline import Job, Result


def end_on_sigterm() -> None:
    """SIGTERM ends this process as Ctrl-C does."""
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def hold_endpoint(result: Result) -> None:
    """Prints how to call the endpoint, then waits for Ctrl-C."""
    from raymill.stages.serve import new_key

    _show_usage(result.artifact, new_key(result.artifact.path.parent))
    end_on_sigterm()  # again: starting Ray put a handler there that prints its stack
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


def detach_endpoint(job: Job, config: ClusterConfig) -> None:
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
