"""The race to a loss, and the courses of a larger size: the reference is what it says, both sides are of one size, a
missed target has no figure, and what tuning changes is what a side then trains with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from benchmarks.training.recipe import curves, nanogpt, ours, race, settings, side
from torch.nn import functional

from raymill.dataset.loader import Loader
from raymill.dataset.shards import INDEX, ShardEntry, ShardIndex, TokenStream
from raymill.training.config import TrainingConfig

VOCAB = 64
SHAPE = nanogpt.Shape(vocab_size=VOCAB, num_layers=2, num_heads=2, model_dim=16, max_seq_len=8)
RECIPE = nanogpt.Recipe(learning_rate=1e-2, steps=30, batch_size=4, warmup_steps=4)
CONFIG = TrainingConfig.model_validate(
    settings.SIZES["race"].ours.model_dump()
    | {
        "model": settings.SIZES["race"].ours.model.model_dump()
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


@pytest.mark.parametrize("size", settings.SIZES.values(), ids=settings.SIZES)
def test_both_sides_have_the_same_budget_of_parameters(size: settings.Size) -> None:
    with torch.device("meta"):
        reference = nanogpt.NanoGPT(size.shape, seed=0)
    theirs = sum(parameter.numel() for parameter in reference.parameters())
    assert size.ours.model.num_parameters(size.shape.vocab_size) == pytest.approx(theirs, rel=0.05)
    assert size.ours.model.max_seq_len == size.shape.max_seq_len == settings.SEQ_LEN


def test_the_small_size_is_the_preset_and_both_sides_see_as_many_tokens() -> None:
    size = settings.SIZES["small"]
    assert size.ours == TrainingConfig.model_validate({"preset": "small"})
    assert size.ours.steps * size.ours.global_batch_size == size.reference.steps * size.reference.batch_size


def test_tuning_changes_the_rate_the_batch_and_the_length() -> None:
    size = settings.SIZES["small"]
    tokens = 64 * settings.SEQ_LEN
    made = settings.changed(size, learning_rate=3e-3, batch_size=2, tokens=tokens)
    assert made.reference == nanogpt.Recipe(learning_rate=3e-3, steps=32, batch_size=2, warmup_steps=3)
    assert (made.ours.steps, made.ours.global_batch_size) == (32, 2)
    ratio = (size.ours.optimizer.adamw_learning_rate or 0) / size.ours.optimizer.learning_rate
    assert made.ours.optimizer.learning_rate == 3e-3
    assert made.ours.optimizer.adamw_learning_rate == pytest.approx(3e-3 * ratio)
    assert settings.changed(size) == size


@pytest.mark.parametrize("name", ["raymill", "nanogpt"])
def test_a_side_tells_its_course_and_its_last_loss(name: str, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "SEQ_LEN", 8)
    size = settings.Size(SHAPE, RECIPE, CONFIG, points=5)
    run = side.train(name, size, shards, seed=1)
    assert [point["step"] for point in run["curve"]] == [6, 12, 18, 24, 30]
    assert run["tokens"] == run["curve"][-1]["tokens"] == 30 * 4 * 8 and run["cpu_s"] == run["curve"][-1]["cpu_s"] > 0
    assert run["val_loss"] == pytest.approx(run["curve"][-1]["val_loss"], rel=1e-6)  # the split has fewer than 64
    assert run["curve"][-1]["val_loss"] < run["curve"][0]["val_loss"]


@pytest.mark.parametrize("name", ["raymill", "nanogpt"])
def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(
    name: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "SEQ_LEN", 8)
    size = settings.Size(SHAPE, RECIPE, CONFIG, points=3)
    whole = side.train(name, size, shards, seed=1)
    kept = tmp_path / "kept.pt"
    with monkeypatch.context() as patch:
        patch.setattr(side, "validate", Mock(side_effect=[whole["curve"][0]["val_loss"], KeyboardInterrupt]))
        with pytest.raises(KeyboardInterrupt):
            side.train(name, size, shards, seed=1, kept=kept)
    trainer = ours.Trainer if name == "raymill" else nanogpt.Trainer
    taken: list[int] = []
    step = trainer.step

    def counted(self: Any, number: int) -> None:
        taken.append(number)
        step(self, number)

    monkeypatch.setattr(trainer, "step", counted)
    resumed = side.train(name, size, shards, seed=1, kept=kept)
    assert taken == [0, *range(10, 30)]  # the first: of the model thrown away
    assert _losses(resumed) == _losses(whole)
    assert resumed["cpu_s"] > resumed["curve"][0]["cpu_s"] > 0
    other = side.train(name, size, shards, seed=2, kept=kept)
    assert _losses(other) == _losses(side.train(name, size, shards, seed=2))


def test_where_a_curve_is_at_a_loss_first() -> None:
    curve = _run(40, 3.0)["curve"]
    assert curves.reach(curve, 4.5) == pytest.approx((250, 25))
    assert curves.reach(curve, 6.0) == pytest.approx((100, 10))
    assert curves.reach(curve, 2.9) is None


def test_the_table_and_the_page_say_how_far_ours_was_at_the_references_last_loss(tmp_path: Path) -> None:
    reference, better, worse = _run(40, 4.0), _run(20, 3.0), _run(20, 4.5)
    told = curves.table({"nanoGPT": reference, "raymill": better})
    assert "4.0000, after 300 tokens, 15 CPU-s: ratios 1.33 and 2.67" in told
    assert "never is at the reference's last loss, 4.0000" in curves.table({"nanoGPT": reference, "raymill": worse})
    curves.draw({"nanoGPT": reference, "raymill": better}, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "CPU-seconds" in page and 'src="http' not in page


def test_the_median_of_the_seeds_decides() -> None:
    raced = race.Race([_run(30, 5.2), _run(20, 5.4), _run(22, 5.1)], [_run(80, 5.3), _run(70, 5.2), _run(75, 5.5)])
    made = race.row(raced)
    assert raced.target == 5.3 and made.ours == 22 and made.best_peer == 75
    assert made.ratio == pytest.approx(75 / 22)


def test_a_missed_target_has_no_figure_and_says_so() -> None:
    made = race.row(race.Race([_run(20, 5.4)], [_run(80, 5.3)]))
    assert made.ours is None and made.ratio is None and "missed" in made.note


def _run(cpu_s: float, loss: float) -> dict[str, Any]:
    curve = [
        {"tokens": 100 * (number + 1), "cpu_s": cpu_s * (number + 1) / 4, "val_loss": value}
        for number, value in enumerate((loss + 3, loss + 2, loss + 1, loss))
    ]
    return {"cpu_s": cpu_s, "val_loss": loss, "parameters": 1, "steps": 1, "tokens": 400, "curve": curve}


def _losses(run: dict[str, Any]) -> list[float]:
    return [point["val_loss"] for point in run["curve"]] + [run["val_loss"]]


@torch.no_grad()
def _loss(trainer: side.Trainer, shards: Path) -> float:
    ids = torch.from_numpy(TokenStream(shards, "val").read(0, 9))
    return float(functional.cross_entropy(trainer.logits(ids[None, :-1])[0], ids[1:]))
