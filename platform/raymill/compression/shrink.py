"""Structured pruning: whole heads, feed-forward neurons or layers go, and what stays is an ordinary, smaller model.

What goes is measured on calibration sequences:
- a key-value head with its query heads, and a neuron, by how much of a block's output comes through it: the mean square of
  what the output matrix makes of it alone. Every layer loses as many: a config knows one number for all.
- a layer by how little it turns what it reads: 1 - the mean cosine between its input and output ("Block Influence",
  Men et al. 2024, "ShortGPT").

Nothing else changes, so the result computes what the model would with those parts at zero; a short recovery run makes up
for the loss. One pass over the calibration sequences.

Shapes: D model_dim, F hidden_dim, C head_width, K inputs of a matrix, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast

import torch
from torch import Tensor
from torch.nn import functional

from raymill.compression.calibrate import Calibration, Walk
from raymill.errors import UsageError
from raymill.model.config import ModelConfig
from raymill.model.transformer import Block, Transformer

Part = Literal["heads", "neurons", "layers"]
_NEURONS_TOGETHER = 32
"""Neurons stay in such multiples: kernels and int4 groups need them."""


@torch.no_grad()
def shrink(model: Transformer, part: Part, share: float, calibration: Calibration) -> Transformer:
    """A new model without the least important `share` of its heads, neurons or layers. UsageError as `shrunk_config`."""
    config = shrunk_config(model.config, part, share)
    small = Transformer(config, model.vocab_size).requires_grad_(False).eval()
    weights = dict(model.state_dict())
    select = {"heads": _select_heads, "neurons": _select_neurons, "layers": _select_layers}[part]
    chosen = select(model, config, weights, Walk(model, calibration))
    small.load_state_dict({name: chosen.get(name, weights.get(name)) for name in small.state_dict()})
    return small


def shrunk_config(config: ModelConfig, part: Part, share: float) -> ModelConfig:
    """The shape of what stays. UsageError where nothing would go, or the architecture cannot be so."""
    where = "compress.prune"
    if part == "layers":
        kept = _kept(config.num_layers, share, 1, where, "layers")
        return config.model_copy(update={"num_layers": kept})
    if part == "neurons":
        kept = _kept(config.hidden_dim, share, _NEURONS_TOGETHER, where, "neurons")
        return config.model_copy(update={"hidden_dim": kept})
    if config.architecture == "gpt2":
        raise UsageError(
            "gpt2 cannot lose heads",
            where=where,
            why="its heads are always as wide as model_dim over num_heads",
            fix="prune neurons or layers instead",
        )
    kept = _kept(config.num_kv_heads, share, 1, where, "key-value heads")
    heads = kept * (config.num_heads // config.num_kv_heads)
    if config.architecture == "llama" and config.model_dim % heads:
        raise UsageError(
            f"a llama of model_dim {config.model_dim} cannot have {heads} heads",
            where=where,
            why="transformers refuses to load one whose heads do not divide model_dim",
            fix="choose another share, or prune neurons or layers instead",
        )
    update = {"num_heads": heads, "num_kv_heads": kept, "head_dim": config.head_width}
    return config.model_copy(update=update)


def _kept(whole: int, share: float, together: int, where: str, what: str) -> int:
    """How many stay, in multiples of `together`, at least so many."""
    kept = max(together, round(whole * (1 - share) / together) * together)
    if kept >= whole:
        fewest = f", in steps of {together}" if together > 1 else ""
        raise UsageError(
            f"{share:.0%} of {whole} {what} is none of them",
            where=where,
            why=f"at least {together} must stay{fewest}",
            fix="raise compress.prune.share, or prune something else",
        )
    return kept


def _select_heads(model: Transformer, config: ModelConfig, weights: dict[str, Tensor], walk: Walk) -> dict[str, Tensor]:
    old = model.config
    width = old.head_width
    queries = old.num_heads // old.num_kv_heads * width

    def chosen(number: int, block: Block) -> dict[str, Tensor]:
        moments_KK, out_DK = walk.moments(block, block.self_attn.o_proj), block.self_attn.o_proj.weight.double()
        parts = torch.arange(old.num_kv_heads * queries).split(queries)
        scores = torch.stack([((out_DK[:, at] @ moments_KK[at][:, at]) * out_DK[:, at]).sum() for at in parts])
        best = _best(scores, config.num_kv_heads)
        return _cut(
            weights,
            f"model.layers.{number}.self_attn.",
            _wide(best, queries),
            {"q_proj": 0, "o_proj": 1},
        ) | _cut(weights, f"model.layers.{number}.self_attn.", _wide(best, width), {"k_proj": 0, "v_proj": 0})

    return _each_block(model, walk, chosen)


def _select_neurons(
    model: Transformer, config: ModelConfig, weights: dict[str, Tensor], walk: Walk
) -> dict[str, Tensor]:
    def chosen(number: int, block: Block) -> dict[str, Tensor]:
        down = block.mlp.down_proj
        scores_F = walk.moments(block, down).diagonal() * down.weight.double().square().sum(0)
        best = _best(scores_F, config.hidden_dim)
        return _cut(weights, f"model.layers.{number}.mlp.", best, {"gate_proj": 0, "up_proj": 0, "down_proj": 1})

    return _each_block(model, walk, chosen)


def _select_layers(
    model: Transformer, config: ModelConfig, weights: dict[str, Tensor], walk: Walk
) -> dict[str, Tensor]:
    turned = []
    for block in cast("list[Block]", model.model.layers):
        before = [state for state, _ in walk.states]
        walk.advance(block)
        pairs = zip(before, walk.states, strict=True)
        cosines = [functional.cosine_similarity(x_BTD, y_BTD, dim=-1).sum() for x_BTD, (y_BTD, _) in pairs]
        turned.append(-torch.stack(cosines).sum())
    renamed = {}
    for new, old in enumerate(_best(torch.stack(turned), config.num_layers).tolist()):
        prefix = f"model.layers.{old}."
        found = {name: tensor for name, tensor in weights.items() if name.startswith(prefix)}
        renamed.update({name.replace(prefix, f"model.layers.{new}."): tensor for name, tensor in found.items()})
    return renamed


def _each_block(model: Transformer, walk: Walk, chosen: Callable[[int, Block], dict[str, Tensor]]) -> dict[str, Tensor]:
    found = {}
    for number, block in enumerate(cast("list[Block]", model.model.layers)):
        found.update(chosen(number, block))
        walk.advance(block)
    return found


def _best(scores: Tensor, count: int) -> Tensor:
    """Numbers of the highest scores, in their order in the model."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def _wide(numbers: Tensor, width: int) -> Tensor:
    """Channels of those heads."""
    return (numbers[:, None] * width + torch.arange(width)).flatten()


def _cut(weights: dict[str, Tensor], prefix: str, kept: Tensor, dims: dict[str, int]) -> dict[str, Tensor]:
    """Matrices by name with only the kept rows (0, and of their biases) or columns (1)."""
    cut = {}
    for layer, dim in dims.items():
        name = f"{prefix}{layer}.weight"
        if name in weights:
            cut[name] = weights[name].index_select(dim, kept)
        if dim == 0 and f"{prefix}{layer}.bias" in weights:
            cut[f"{prefix}{layer}.bias"] = weights[f"{prefix}{layer}.bias"][kept]
    return cut
