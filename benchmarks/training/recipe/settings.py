"""Both sides' settings, by size: what tuning left. DECISIONS has the runs that led here.

race: both have 1.34 M parameters, the same tokens and the same length of a sequence. The reference was tuned over five
rates at its best batch size, with one rate at half and at twice that; its run is given half a million tokens. Ours spends
its parameters otherwise: on a head of its own and three narrow blocks, since looking up an embedding costs no arithmetic.
Its steps are the fewest, of those tried (126, 132, 140), after which each of three seeds is below the reference's median.

small: both have 13.9 M parameters and 1.6 M tokens. Ours is the preset as a job gets it. The reference's rate was tuned over
five rates at 51 thousand tokens and over the best two of those at 154 thousand (tune.py), where they are level while the
higher one had caught up; its batch is the one that was best for race. It was not tuned at its whole length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.training.recipe.nanogpt import Recipe, Shape
from raymill.training.config import TrainingConfig

SEQ_LEN = 256


@dataclass(frozen=True)
class Size:
    """Both sides' runs with models of one size."""

    shape: Shape
    """Of the reference; its vocabulary is that of the tokens too."""
    reference: Recipe
    ours: TrainingConfig
    points: int
    """Validations on the way."""


_RACE = TrainingConfig.model_validate(
    {
        "model": {
            "architecture": "qwen3",
            "num_layers": 3,
            "model_dim": 128,
            "num_heads": 4,
            "num_kv_heads": 1,
            "hidden_dim": 144,
            "max_seq_len": SEQ_LEN,
            "norm_eps": 1e-6,
            "tie_embeddings": False,
        },
        "init": {"name": "kaiming", "std": 0.5, "zero_projections": True},
        "optimizer": {"name": "muon", "learning_rate": 3e-3, "adamw_learning_rate": 6e-2, "weight_decay": 0.0},
        "schedule": {"name": "wsd", "warmup_steps": 10, "decay_fraction": 0.35, "final_fraction": 0.0},
        "steps": 140,
        "global_batch_size": 4,
        "microbatch_size": 4,
    }
)


SIZES = {
    "race": Size(
        Shape(vocab_size=4096, num_layers=4, num_heads=4, model_dim=128, max_seq_len=SEQ_LEN),
        Recipe(learning_rate=2e-3, steps=500, batch_size=4, warmup_steps=50),
        _RACE,
        points=8,
    ),
    "small": Size(
        Shape(vocab_size=8192, num_layers=6, num_heads=6, model_dim=384, max_seq_len=SEQ_LEN),
        Recipe(learning_rate=1e-3, steps=1600, batch_size=4, warmup_steps=160),
        TrainingConfig.model_validate({"preset": "small"}),
        points=12,
    ),
}


def changed(
    size: Size, learning_rate: float | None = None, batch_size: int | None = None, tokens: int | None = None
) -> Size:
    """The size with other runs of both sides; none leaves a setting, and a reference that changes warms up for a tenth.

    `learning_rate` is the reference's, and Muon's of ours; AdamW's beside it keeps its distance.
    """
    reference, ours = size.reference, size.ours.model_dump()
    if learning_rate is not None:
        reference = replace(reference, learning_rate=learning_rate)
        if ours["optimizer"]["adamw_learning_rate"] is not None:
            ours["optimizer"]["adamw_learning_rate"] *= learning_rate / ours["optimizer"]["learning_rate"]
        ours["optimizer"]["learning_rate"] = learning_rate
    if batch_size is not None or tokens is not None:
        batch = batch_size or reference.batch_size
        steps = (tokens or reference.steps * reference.batch_size * SEQ_LEN) // (batch * SEQ_LEN)
        reference = replace(reference, batch_size=batch, steps=steps, warmup_steps=steps // 10)
        ours["steps"] = (tokens or size.ours.steps * size.ours.global_batch_size * SEQ_LEN) // SEQ_LEN
        ours["global_batch_size"] = batch_size or size.ours.global_batch_size
        ours["steps"] //= ours["global_batch_size"]
    return replace(size, reference=reference, ours=TrainingConfig.model_validate(ours))
