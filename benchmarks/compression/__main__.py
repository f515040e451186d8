"""`python -m benchmarks.compression`: every method of compress on one trained model, before and after.

    python -m benchmarks.compression --checkpoint DIR --tokens DIR                  every method
    python -m benchmarks.compression --checkpoint DIR --tokens DIR --methods int8   some of them
    python -m benchmarks.compression ... --json FILE                                also every figure, as a JSON list

DIR: what the stages train and tokenize published. Each row is a run of the stage compress, in this process with one
thread, that accepts any loss up to 100 %; what loses more is refused, and its row says so. The whole table takes a
10 M model and one core three quarters of an hour, half of it recovery.

How to read it: perplexity, next-token accuracy and the choice among four are of held-out text, the same for all rows.
The original is measured again in each row, in turns with the result, so read the ratio of tokens/s: what else runs on the
machine slows both. A recovery is more training too: a model that was not trained out gains by it whatever was pruned.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import say
from raymill.artifact import Artifact, Draft, open_artifact
from raymill.cluster.config import ClusterConfig
from raymill.cluster.session import Cluster
from raymill.errors import QualityError
from raymill.stages import compress
from raymill.stages.contract import Inputs
from raymill.telemetry.progress import Progress

Figures = Mapping[str, Any]

_ROUNDED = {"calibration_sequences": None}
_PARTS = {"heads": 1 / 2, "neurons": 1 / 4, "more-neurons": 1 / 2, "layers": 1 / 3}
_COLUMNS = ("method", "MB", "tokens/s, 1", "tokens/s, 8", "perplexity", "change", "next token", "of four")


def methods(recovery_steps: int) -> dict[str, dict[str, Any]]:
    """Settings of the stage, by the name of the row."""
    found: dict[str, dict[str, Any]] = {"int8": {"method": "int8"}, "int8-rounded": {"method": "int8", **_ROUNDED}}
    for size in (32, 64, 128):
        found[f"int4-{size}"] = {"method": "int4", "group_size": size}
        found[f"int4-{size}-rounded"] = {**found[f"int4-{size}"], **_ROUNDED}
    found["kv-int8"] = {"method": "fp32", "kv_cache": "int8"}
    found["int4-kv-int8"] = {"method": "int4", "kv_cache": "int8"}
    found |= {half: {"method": half} for half in ("fp16", "bf16")}
    for kind in ("magnitude", "wanda"):
        found[kind] = {"method": "fp32", "prune": {"kind": kind, "share": 0.5}}
    for name, share in _PARTS.items():
        prune: dict[str, Any] = {"kind": name.removeprefix("more-"), "share": share}
        found[name] = {"method": "fp32", "prune": prune}
        found[f"{name}-recovered"] = {"method": "fp32", "prune": prune | {"recovery_steps": recovery_steps}}
    return found


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    wanted = methods(options.recovery_steps)
    source, tokens = open_artifact(options.checkpoint, "checkpoint"), open_artifact(options.tokens, "tokens")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="bench-") as root:
        for name in options.methods:
            settings = {"max_sequences": options.sequences, "max_choices": options.choices, **wanted[name]}
            rows.append({"row": name, **measure(settings, source, tokens, Path(root) / name)})
            say(_row(rows[-1]))
            if options.json is not None:  # after each: a run that is broken off leaves what it has
                options.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    print(table(rows))
    return 0


def measure(settings: Figures, source: Artifact, tokens: Artifact, folder: Path) -> dict[str, Any]:
    """The figures that the stage publishes, or why it refused to."""
    config = compress.Config.model_validate({"max_quality_loss": 1.0, **settings})
    inputs = Inputs({"checkpoint": source, "tokens": tokens}, Draft(folder), folder.parent, Progress("compress"))
    try:
        made = compress.run(config, inputs, Cluster(ClusterConfig()))
    except QualityError as refused:
        return {"refused": refused.what}
    shutil.rmtree(made.path)
    return dict(made.figures)


def table(rows: Sequence[Figures]) -> str:
    """Markdown: the original as the first row measured it, then every row."""
    lines = [_joined(_COLUMNS), _joined(["---"] * len(_COLUMNS))]
    measured = [row for row in rows if "refused" not in row]
    if measured:
        lines.append(_joined(["fp32", *_cells(measured[0], "_before", "_before")]))
    return "\n".join([*lines, *map(_row, rows)])


def _row(row: Figures) -> str:
    if "refused" in row:
        return _joined([row["row"], f"refused: {row['refused']}", *[""] * (len(_COLUMNS) - 2)])
    return _joined([row["row"], *_cells(row, "", "_after")])


def _cells(row: Figures, when: str, speed_when: str) -> list[str]:
    """Of the result or of the original; a result's speeds with their ratio to the original's."""
    speeds = []
    for count in (1, 8):
        rate, before = (row[f"tokens_per_s_{count}_sequences{each}"] for each in (speed_when, "_before"))
        speeds.append(f"{rate:,.0f}" + (f" ({rate / before:.2f}x)" if when != "_before" else ""))
    change = "-" if when else f"{row['quality_loss']:+.3%}"
    shares = [f"{row[name + when]:.2%}" for name in ("accuracy", "choice_accuracy")]
    return [f"{row['weights_bytes' + when] / 1e6:.2f}", *speeds, f"{row['perplexity' + when]:.3f}", change, *shares]


def _joined(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compression", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="what train published")
    parser.add_argument("--tokens", type=Path, required=True, metavar="DIR", help="what tokenize published")
    parser.add_argument("--methods", nargs="+", choices=tuple(methods(0)), default=tuple(methods(0)), metavar="METHOD")
    parser.add_argument("--recovery-steps", type=int, default=100, help="after heads, neurons and layers went")
    parser.add_argument("--sequences", type=int, default=128, help="held-out sequences that are scored")
    parser.add_argument("--choices", type=int, default=256, help="held-out pieces whose continuation is chosen")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure as JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
