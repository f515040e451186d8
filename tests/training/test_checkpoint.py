"""A checkpoint is all there or not there, and a damaged one is passed over aloud."""

import os
from pathlib import Path

import pytest
import torch

from raymill.errors import MachineError
from raymill.model.config import ModelConfig
from raymill.model.transformer import Transformer
from raymill.training.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from raymill.training.config import OptimizerConfig
from raymill.training.optimizer import build_optimizer


def trained(seed: int) -> tuple[Transformer, torch.optim.Optimizer]:
    model = Transformer(ModelConfig(num_layers=1, model_dim=16, num_heads=2, hidden_dim=32, max_seq_len=8), 32)
    model.initialize(seed)
    optimizer = build_optimizer(model, OptimizerConfig())
    model(torch.arange(8)[None]).square().mean().backward()
    optimizer.step()
    return model, optimizer


def test_load_puts_back_every_bit(tmp_path: Path) -> None:
    model, optimizer = trained(0)
    save_checkpoint(tmp_path, 5, model, optimizer, 0)
    found = newest_checkpoint(tmp_path, pytest.fail)
    assert found is not None and found[1] == 5
    other, other_optimizer = trained(1)
    load_checkpoint(found[0], other, other_optimizer)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
        for name, tensor in optimizer.state[one].items():
            assert torch.equal(tensor, other_optimizer.state[two][name])


def test_two_are_kept(tmp_path: Path) -> None:
    model, optimizer = trained(0)
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, model, optimizer, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "state"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_damaged_newest_is_found_and_the_one_before_taken(tmp_path: Path, damage: str, name: str) -> None:
    model, optimizer = trained(0)
    for step in (1, 2):
        save_checkpoint(tmp_path, step, model, optimizer, 0)
    file = tmp_path / "step-00000002" / name
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif damage == "cut":
        os.truncate(file, len(content) - 7)
    elif damage == "remove":
        file.unlink()
    else:
        os.truncate(tmp_path / "step-00000002" / "state.json", 20)
    said: list[str] = []
    found = newest_checkpoint(tmp_path, said.append)
    assert found is not None and found[1] == 1
    assert len(said) == 1 and "step-00000002" in said[0]


def test_a_save_cut_short_is_not_seen(tmp_path: Path) -> None:
    model, optimizer = trained(0)
    save_checkpoint(tmp_path, 1, model, optimizer, 0)
    (tmp_path / "step-00000002.partial").mkdir()
    found = newest_checkpoint(tmp_path, pytest.fail)
    assert found is not None and found[1] == 1


def test_a_full_disk_keeps_the_older_one_and_says_how_much_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained(0)
    save_checkpoint(tmp_path, 1, model, optimizer, 0)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("raymill.training.checkpoint.sync_folder", full)
    with pytest.raises(MachineError, match="no checkpoint can be written") as error:
        save_checkpoint(tmp_path, 2, model, optimizer, 0)
    assert "bytes" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
