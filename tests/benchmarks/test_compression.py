"""The table of compression: each row is a run of the stage with the settings it is named after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.compression import __main__ as quality

from raymill.errors import QualityError
from raymill.stages import compress

FIGURES = {
    "weights_bytes_before": 4e6,
    "weights_bytes": 1e6,
    "perplexity_before": 50.0,
    "perplexity": 50.5,
    "quality_loss": 0.01,
    "accuracy_before": 0.3,
    "accuracy": 0.29,
    "choice_accuracy_before": 0.5,
    "choice_accuracy": 0.25,
    "tokens_per_s_1_sequences_before": 1000.0,
    "tokens_per_s_1_sequences_after": 2500.0,
    "tokens_per_s_8_sequences_before": 4000.0,
    "tokens_per_s_8_sequences_after": 8000.0,
}


class Made:
    """What a run of the stage gives."""

    def __init__(self, path: Path) -> None:
        path.mkdir()
        self.path, self.figures = path, FIGURES


def test_every_method_is_a_setting_of_the_stage_and_no_two_are_the_same() -> None:
    configs = [compress.Config.model_validate(settings) for settings in quality.methods(50).values()]
    assert len({config.model_dump_json() for config in configs}) == len(configs)
    recovered = [config.prune for config in configs if config.prune is not None and config.prune.recovery_steps]
    assert [prune.kind for prune in recovered if prune.recovery_steps == 50] == [
        "heads",
        "neurons",
        "neurons",
        "layers",
    ]


def test_the_original_stands_above_the_rows_and_a_refusal_in_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def run(config: compress.Config, inputs: Any, cluster: Any) -> Made:
        asked.append((config.method, config.max_sequences))
        if config.method == "int4":
            raise QualityError("int4 makes the model +120.00% worse", fix="none")
        return Made(inputs.draft.final)

    monkeypatch.setattr(quality, "open_artifact", lambda path, kind: path)
    monkeypatch.setattr(compress, "run", run)
    options = ["--checkpoint", "c", "--tokens", "t", "--sequences", "7", "--json", str(tmp_path / "rows.json")]
    assert quality.main([*options, "--methods", "int4-32", "int8"]) == 0
    assert asked == [("int4", 7), ("int8", 7)]
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| fp32 | 4.00 | 1,000 | 4,000 | 50.000 | - | 30.00% | 50.00% |",
        "| int4-32 | refused: int4 makes the model +120.00% worse |  |  |  |  |  |  |",
        "| int8 | 1.00 | 2,500 (2.50x) | 8,000 (2.00x) | 50.500 | +1.000% | 29.00% | 25.00% |",
    ]
    rows = json.loads((tmp_path / "rows.json").read_text("utf-8"))
    assert [row["row"] for row in rows] == ["int4-32", "int8"] and rows[1]["weights_bytes"] == 1e6
