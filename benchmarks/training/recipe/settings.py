"""Both sides' settings: what tuning left. DECISIONS has the runs that led here.

Both have 1.34 M parameters, the same tokens and the same length of a sequence. The reference was tuned over five rates at
its best batch size, with one rate at half and at twice that; its run is given half a million tokens. Ours spends its
parameters otherwise: on a head of its own and three narrow blocks, since looking up an embedding costs no arithmetic.
Its steps are the fewest, of those tried (126, 132, 140), after which each of three seeds is below the reference's median.
"""

from __future__ import annotations

from benchmarks.training.recipe.nanogpt import Recipe, Shape
from raymill.training.config import TrainingConfig

SEQ_LEN = 256
VOCAB_SIZE = 4096

REFERENCE = Recipe(learning_rate=2e-3, steps=500, batch_size=4, warmup_steps=50)

OURS = TrainingConfig.model_validate(
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


def reference_shape(vocab_size: int) -> Shape:
    return Shape(vocab_size, num_layers=4, num_heads=4, model_dim=128, max_seq_len=SEQ_LEN)
