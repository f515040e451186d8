"""Presets are whole recipes of the size they are named for, and anything said beside one wins."""

from __future__ import annotations

import pytest

from raymill.training.config import TrainingConfig
from raymill.training.recipes import PRESETS

PARAMETERS = {"tiny": (4096, 1.8e6, 2.2e6), "small": (8192, 10e6, 15e6), "124m": (50257, 118e6, 130e6)}
PARAMETERS["1b"] = (32768, 0.95e9, 1.15e9)
"""The vocabulary a preset is named at, and what its parameters lie between."""


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_model_of_the_size_it_is_named_for(name: str) -> None:
    vocab_size, low, high = PARAMETERS[name]
    config = TrainingConfig.model_validate({"preset": name})
    assert low < config.model.num_parameters(vocab_size) < high


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_run_whose_batches_and_schedule_hold_together(name: str) -> None:
    config = TrainingConfig.model_validate({"preset": name})
    config.check_layout(1)
    config.check_layout(2)
    assert config.schedule.warmup_steps < config.steps * (1 - config.schedule.decay_fraction)
    assert config.model.qk_norm and config.init.zero_projections


def test_large_presets_see_twenty_tokens_a_parameter() -> None:
    for name in ("124m", "1b"):
        config = TrainingConfig.model_validate({"preset": name})
        tokens = config.steps * config.global_batch_size * config.model.max_seq_len
        assert 18 < tokens / config.model.num_parameters(PARAMETERS[name][0]) < 22


def test_what_is_said_beside_a_preset_wins_and_the_rest_of_its_group_stays() -> None:
    plain = TrainingConfig.model_validate({"preset": "small"})
    own = TrainingConfig.model_validate({"preset": "small", "model": {"num_layers": 2}, "optimizer": {"name": "adamw"}})
    assert own.model.num_layers == 2 and own.model.model_dim == plain.model.model_dim
    assert own.optimizer.name == "adamw" and own.optimizer.learning_rate == plain.optimizer.learning_rate
    assert own.steps == plain.steps


def test_a_preset_changes_more_than_its_name() -> None:
    for name in PRESETS:
        config = TrainingConfig.model_validate({"preset": name})
        assert config.model_dump(exclude={"preset"}) != TrainingConfig().model_dump(exclude={"preset"})


def test_filled_settings_survive_being_written_and_read() -> None:
    config = TrainingConfig.model_validate({"preset": "small", "steps": 7})
    assert TrainingConfig.model_validate(config.model_dump()) == config
