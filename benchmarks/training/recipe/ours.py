"""raymill's side of the race: its own model, objective, optimizer, schedule and loader, driven step by step.

The loop's records, checkpoints and guards are left out, as they are on the other side; what they cost is a row of its
own.
"""

from __future__ import annotations

from torch import Tensor, nn

from raymill.dataset.loader import Loader
from raymill.model.transformer import Transformer
from raymill.training.config import TrainingConfig
from raymill.training.losses import next_token
from raymill.training.optimizer import build_optimizer, set_learning_rate
from raymill.training.schedule import learning_rate_scale


class Trainer:
    """One run of a recipe, step by step."""

    def __init__(self, config: TrainingConfig, vocab_size: int, loader: Loader, seed: int) -> None:
        self.model = Transformer(config.model, vocab_size)
        self.model.initialize(seed, config.init)
        self._config = config
        self._loader = loader
        self.optimizer = build_optimizer(self.model, config.optimizer)

    def step(self, number: int) -> None:
        config = self._config
        batch = self._loader.batch(number, 0, config.global_batch_size)
        documents_BT = batch.documents_BT if config.mask_documents else None
        set_learning_rate(self.optimizer, learning_rate_scale(number, config.steps, config.schedule))
        loss = self.model(batch.inputs_BT, documents_BT, next_token(batch.targets_BT))
        (loss / self._loader.learned_targets(number)).backward()
        if config.optimizer.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.optimizer.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def logits(self, ids_BT: Tensor) -> Tensor:
        """Of whole sequences, whatever documents they hold, as the other side is judged."""
        logits_BTV: Tensor = self.model(ids_BT)
        return logits_BTV
