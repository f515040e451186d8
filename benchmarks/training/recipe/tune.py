"""`python -m benchmarks.training.recipe.tune`: short whole runs of one side at the small size, one for each rate named.

    python -m benchmarks.training.recipe.tune --side nanogpt --learning-rates 1e-3 2e-3 --batch-size 4

Each has a schedule of its own length and ends with a loss over 128 sequences of the val split. A rate is the
reference's, or Muon's of ours, beside which AdamW's keeps its distance. Every run is added to `tuning_small.jsonl` in the
cache as it ends. The best rate moves with the length: compare two lengths before trusting a short one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from benchmarks.measure import say
from benchmarks.training.recipe import curves, race, settings

_FINAL_SEQUENCES = 128
_POINTS = 3


def main(arguments: list[str] | None = None) -> int:
    options = _options(arguments)
    folder = options.cache / "race"
    shards = race.make_shards(folder, curves.SIZE)
    for rate in options.learning_rates:
        changes = {"--learning-rate": rate, "--tokens": options.tokens, "--seed": options.seed}
        if options.batch_size is not None:
            changes["--batch-size"] = options.batch_size
        fixed = {"--size": curves.SIZE, "--points": _POINTS, "--final-sequences": _FINAL_SEQUENCES}
        asked = [str(part) for pair in (changes | fixed).items() for part in pair]
        run = curves.launch(options.side, shards, options.core, asked)
        size = settings.changed(settings.SIZES[curves.SIZE], rate, options.batch_size, options.tokens)
        made = {"reference": vars(size.reference)} if options.side == "nanogpt" else {"ours": size.ours.model_dump()}
        with (folder / f"tuning_{curves.SIZE}.jsonl").open("a", encoding="utf-8") as rows:
            rows.write(json.dumps({"side": options.side, "learning_rate": rate} | run | made) + "\n")
        say(f"{options.side} {rate:g}, {run['tokens']:,} tokens: {run['val_loss']:.4f} in {run['cpu_s']:.0f} CPU-s")
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training.recipe.tune", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--side", choices=tuple(curves.SIDES), required=True)
    parser.add_argument("--learning-rates", type=float, nargs="+", required=True)
    parser.add_argument("--batch-size", type=int, help="sequences per step; the size's own by default")
    parser.add_argument("--tokens", type=int, default=150 * 4 * settings.SEQ_LEN)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--core", type=int, default=max(os.sched_getaffinity(0)), help="the core it runs on")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument("--cache", type=Path, default=home / "raymill-benchmarks", help="folder that is kept")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
