"""A checkpoint is all there or not there, and a damaged one is passed over aloud."""

import errno
import multiprocessing
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from raymill.errors import MachineError
from raymill.model.config import ModelConfig
from raymill.model.files import CONFIG, WEIGHTS
from raymill.model.transformer import Transformer
from raymill.model.weights import load_model
from raymill.training.checkpoint import (
    EMA,
    OPTIMIZER,
    STATE,
    check_writable,
    load_checkpoint,
    newest_checkpoint,
    only_writer,
    write_checkpoint,
)
from raymill.training.snapshot import Snapshot

FILES = (WEIGHTS, OPTIMIZER, EMA, CONFIG, STATE)


def parts(seed: int, architecture: str = "llama") -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The tensors of a tiny run, weights and all, and its config.json."""
    heads = {"num_heads": 2, "num_kv_heads": 2}
    config = ModelConfig(architecture=architecture, num_layers=1, model_dim=16, hidden_dim=32, max_seq_len=8, **heads)
    model = Transformer(config, 32)
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(each.shape, generator=generator) for name, each in model.named_parameters()}
    moments = {f"exp_avg/{name}": tensor * 0.1 for name, tensor in weights.items()}
    optimizer = {**moments, "step/model.norm.weight": torch.tensor(3.0), "rng/all": torch.arange(5, dtype=torch.uint8)}
    ema = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    return {WEIGHTS: weights, OPTIMIZER: optimizer, EMA: ema}, config.to_hugging_face(32, 0)


def save(folder: Path, *steps: int) -> None:
    for step in steps:
        write_checkpoint(folder, step, *parts(step), {"tokens": 12, "losses": [0.1, 2.5e-17]})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_load_gives_back_every_bit(tmp_path: Path, architecture: str) -> None:
    files, config = parts(5, architecture)
    path = write_checkpoint(tmp_path, 5, files, config, {"tokens": 12, "losses": [0.1, 2.5e-17]})
    assert newest_checkpoint(tmp_path, pytest.fail) == (path, 5)
    loaded = load_checkpoint(path)
    assert (loaded.step, loaded.config) == (5, config)
    assert loaded.state == {"tokens": 12, "losses": [0.1, 2.5e-17]}
    assert {name: set(tensors) for name, tensors in loaded.files.items()} == {
        name: set(tensors) for name, tensors in files.items()
    }
    for name, tensors in files.items():
        for key, tensor in tensors.items():
            assert loaded.files[name][key].dtype == tensor.dtype
            assert torch.equal(loaded.files[name][key], tensor), (name, key)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_it_is_a_model_as_any_other(tmp_path: Path, architecture: str) -> None:
    files, config = parts(5, architecture)
    path = write_checkpoint(tmp_path, 5, files, config, {})
    for name, parameter in load_model(path).named_parameters():
        assert torch.equal(parameter, files[WEIGHTS][name])
    assert load_file(path / OPTIMIZER)["step/model.norm.weight"].shape == ()


def test_two_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_what_lies_after_a_step_written_again_is_forgotten(tmp_path: Path) -> None:
    save(tmp_path, 2, 3)
    (tmp_path / "step-00000003" / WEIGHTS).unlink()
    (tmp_path / "step-00000004.partial").mkdir()
    write_checkpoint(tmp_path, 2, *parts(9), {"again": True})
    assert names(tmp_path) == ["step-00000002"]
    assert load_checkpoint(tmp_path / "step-00000002").state == {"again": True}


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 7)


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_newest_is_found_and_the_one_before_taken(
    tmp_path: Path, damage: Callable[[Path], None], name: str
) -> None:
    save(tmp_path, 1, 2)
    damage(tmp_path / "step-00000002" / name)
    said: list[str] = []
    assert newest_checkpoint(tmp_path, said.append) == (tmp_path / "step-00000001", 1)
    assert len(said) == 1 and "step-00000002 is passed over" in said[0]


def test_every_byte_of_the_state_counts(tmp_path: Path) -> None:
    save(tmp_path, 2)
    state = tmp_path / "step-00000002" / STATE
    whole = state.read_bytes()
    said: list[str] = []
    for place in range(len(whole)):
        state.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        found = newest_checkpoint(tmp_path, said.append)
        assert found is None or load_checkpoint(found[0]).state == {"tokens": 12, "losses": [0.1, 2.5e-17]}
    assert len(said) > len(whole)  # but for spaces between values, which say nothing


def test_two_damaged_ones_mean_a_new_start_and_it_is_said(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    flip(tmp_path / "step-00000001" / OPTIMIZER)
    cut(tmp_path / "step-00000002" / WEIGHTS)
    said: list[str] = []
    assert newest_checkpoint(tmp_path, said.append) is None
    assert [line.split(" ")[1] for line in said[:2]] == ["step-00000002", "step-00000001"]
    assert "starts again from its first step" in said[2]


def test_a_save_cut_short_is_not_seen(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-00000002.partial").mkdir()
    assert newest_checkpoint(tmp_path, pytest.fail) == (tmp_path / "step-00000001", 1)


def test_no_checkpoint_is_no_damage(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "none", pytest.fail) is None


@pytest.mark.parametrize("name", [WEIGHTS, OPTIMIZER, STATE])
def test_a_full_disk_keeps_the_older_ones_and_says_how_much_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    save(tmp_path, 1, 2)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    sync = os.fsync

    def full(descriptor: int) -> None:
        if name in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match="no checkpoint can be written") as error:
        save(tmp_path, 3)
    needed = sum(len(before[tmp_path / "step-00000002" / each]) for each in (WEIGHTS, OPTIMIZER, EMA))
    assert f"No space left on device; a checkpoint takes {needed:,} bytes" in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@contextmanager
def disk(folder: Path, options: str) -> Iterator[None]:
    """A disk of its own at `folder`."""
    mount = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_within_a_file_is_as_it_was(tmp_path: Path) -> None:
    with disk(tmp_path, "size=128k"):
        save(tmp_path, 1, 2)
        free_bytes = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
        (tmp_path / "other").write_bytes(bytes(free_bytes - 20_000))
        with pytest.raises(MachineError, match="no checkpoint can be written") as error:
            save(tmp_path, 3)
        left_bytes = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
        assert 16_000 < left_bytes < 21_000
        assert "No space left on device" in str(error.value)
        assert f" bytes, {left_bytes:,} are free" in str(error.value)
        assert newest_checkpoint(tmp_path, pytest.fail) == (tmp_path / "step-00000002", 2)
        assert names(tmp_path) == ["other", "step-00000001", "step-00000002"]


def test_a_disk_that_takes_nothing_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with disk(tmp_path, "ro"), pytest.raises(MachineError, match="no checkpoint can be written to") as error:
        check_writable(tmp_path / "checkpoints", 10)
    assert "Read-only file system" in str(error.value)


def test_a_folder_that_cannot_be_made_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MachineError, match="no checkpoint can be written to") as error:
        check_writable(tmp_path / "file" / "checkpoints", 10)
    assert "Not a directory" in str(error.value)


def test_a_disk_without_room_for_three_is_refused_before_the_first_step(tmp_path: Path) -> None:
    free_bytes = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    with pytest.raises(MachineError, match="has no room") as error:
        check_writable(tmp_path, free_bytes // 2)
    assert "3 more of" in str(error.value)
    save(tmp_path, 1, 2)
    check_writable(tmp_path, free_bytes // 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_second_process_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    refused = pytest.raises(MachineError, match="another process trains in")
    with _holder(tmp_path) as holder, refused as error, only_writer(tmp_path, patience_s=0.1):
        pass
    assert f"process {holder.pid} holds it" in str(error.value)


def test_one_that_dies_soon_is_waited_for(tmp_path: Path) -> None:
    with _holder(tmp_path) as holder:
        threading.Timer(0.3, lambda: os.kill(holder.pid or 0, signal.SIGKILL)).start()
        started = time.monotonic()
        with only_writer(tmp_path, patience_s=20):
            assert time.monotonic() - started < 15
            assert (tmp_path / ".writer").read_text() == str(os.getpid())


class _holder:  # noqa: N801
    """A process that holds the folder until it is killed."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._ready = context.Event()
        self._process = context.Process(target=_hold, args=(folder, self._ready))

    def __enter__(self) -> Any:
        self._process.start()
        assert self._ready.wait(60)
        return self._process

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.join()


def _hold(folder: Path, ready: Any) -> None:
    with only_writer(folder):
        ready.set()
        time.sleep(60)


def test_a_snapshot_is_of_its_moment_and_uses_its_memory_again() -> None:
    files = {WEIGHTS: {"a": torch.ones(3), "b": torch.tensor(2)}}
    snapshot = Snapshot()
    snapshot.reserve(files)
    first = snapshot.take(files)
    place = first[WEIGHTS]["a"].data_ptr()
    files[WEIGHTS]["a"].mul_(5)
    assert first[WEIGHTS]["a"].tolist() == [1, 1, 1] and first[WEIGHTS]["b"].item() == 2
    snapshot.release()
    second = snapshot.take(files)
    assert second[WEIGHTS]["a"].tolist() == [5, 5, 5] and second[WEIGHTS]["a"].data_ptr() == place


def test_a_snapshot_in_use_is_waited_for() -> None:
    files = {WEIGHTS: {"a": torch.ones(3)}}
    snapshot = Snapshot()
    taken = snapshot.take(files)
    files[WEIGHTS]["a"].zero_()
    seen: list[list[float]] = []

    def write() -> None:
        time.sleep(0.2)
        seen.append(taken[WEIGHTS]["a"].tolist())
        snapshot.release()

    threading.Thread(target=write).start()
    snapshot.take(files)
    assert seen == [[1, 1, 1]]
