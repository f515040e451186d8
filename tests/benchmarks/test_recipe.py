"""The race to a loss: the reference is what it says, both sides are of one size, and a missed target has no figure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.training.recipe import nanogpt, ours, race, settings, side
from torch.nn import functional

from raymill.dataset.loader import Loader
from raymill.dataset.shards import INDEX, ShardEntry, ShardIndex, TokenStream
from raymill.training.config import TrainingConfig

VOCAB = 64
SHAPE = nanogpt.Shape(vocab_size=VOCAB, num_layers=2, num_heads=2, model_dim=16, max_seq_len=8)
RECIPE = nanogpt.Recipe(learning_rate=1e-2, steps=30, batch_size=4, warmup_steps=4)
CONFIG = TrainingConfig.model_validate(
    settings.OURS.model_dump()
    | {
        "model": settings.OURS.model.model_dump()
        | {"num_layers": 2, "model_dim": 16, "num_heads": 2, "num_kv_heads": 2, "hidden_dim": 16, "max_seq_len": 8},
        "steps": 30,
        "global_batch_size": 4,
    }
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the race; and tiny steps on several threads wait for cores that others use."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A pattern that can be learned: each id is the one before it plus 1."""
    entries = (
        ShardEntry(path="train-00000.bin", split="train", documents=1, tokens=2000, text_bytes=2000),
        ShardEntry(path="val-00000.bin", split="val", documents=1, tokens=400, text_bytes=400),
    )
    for entry in entries:
        (np.arange(entry.tokens) % VOCAB).astype("<u2").tofile(tmp_path / entry.path)
    index = ShardIndex(dtype="uint16", vocab_size=VOCAB, end_of_document_id=0, shards=entries)
    (tmp_path / INDEX).write_text(index.model_dump_json())
    return tmp_path


def loader(shards: Path) -> Loader:
    return Loader(TokenStream(shards, "train"), seq_len=8, global_batch_size=4, seed=0)


def test_the_reference_warms_up_and_falls_to_a_tenth() -> None:
    recipe = nanogpt.Recipe(learning_rate=1.0, steps=100, batch_size=4, warmup_steps=9)
    rates = [nanogpt.learning_rate_at(step, recipe) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[8] == pytest.approx(0.9) and rates[9] == pytest.approx(1.0)
    assert rates[54] == pytest.approx(0.55, abs=0.01) and rates[99] == pytest.approx(0.1, abs=0.001)


def test_the_reference_sees_no_later_position() -> None:
    model = nanogpt.NanoGPT(SHAPE, seed=0)
    ids = torch.arange(8)[None]
    changed = ids.clone()
    changed[0, 5] = 40
    difference = (model(ids) - model(changed)).abs().amax(-1)[0]
    assert not difference[:5].any() and difference[5:].all()


@pytest.mark.parametrize("name", ["raymill", "nanogpt"])
def test_both_sides_learn_and_repeat_themselves(name: str, shards: Path) -> None:
    def run() -> list[float]:
        trainer: side.Trainer = (
            ours.Trainer(CONFIG, VOCAB, loader(shards), seed=1)
            if name == "raymill"
            else nanogpt.Trainer(SHAPE, RECIPE, loader(shards), seed=1)
        )
        losses = []
        for step in range(30):
            trainer.step(step)
            losses.append(_loss(trainer, shards))
        return losses

    losses = run()
    assert losses[-1] < losses[0] - 0.5
    assert run() == losses


def test_both_sides_have_the_same_budget_of_parameters() -> None:
    reference = nanogpt.NanoGPT(settings.reference_shape(settings.VOCAB_SIZE), seed=0)
    theirs = sum(parameter.numel() for parameter in reference.parameters())
    assert settings.OURS.model.num_parameters(settings.VOCAB_SIZE) == pytest.approx(theirs, rel=0.05)
    assert settings.OURS.model.max_seq_len == settings.SEQ_LEN


def test_the_median_of_the_seeds_decides() -> None:
    raced = race.Race([_run(30, 5.2), _run(20, 5.4), _run(22, 5.1)], [_run(80, 5.3), _run(70, 5.2), _run(75, 5.5)])
    made = race.row(raced)
    assert raced.target == 5.3 and made.ours == 22 and made.best_peer == 75
    assert made.ratio == pytest.approx(75 / 22)


def test_a_missed_target_has_no_figure_and_says_so() -> None:
    made = race.row(race.Race([_run(20, 5.4)], [_run(80, 5.3)]))
    assert made.ours is None and made.ratio is None and "missed" in made.note


def _run(cpu_s: float, loss: float) -> dict[str, Any]:
    return {"cpu_s": cpu_s, "val_loss": loss, "parameters": 1, "steps": 1, "tokens": 1}


@torch.no_grad()
def _loss(trainer: side.Trainer, shards: Path) -> float:
    ids = torch.from_numpy(TokenStream(shards, "val").read(0, 9))
    return float(functional.cross_entropy(trainer.logits(ids[None, :-1])[0], ids[1:]))
