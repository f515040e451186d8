"""The predicted peak against that of processes that train, and the advice against the predictions it rests on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from raymill.config import override
from raymill.errors import UsageError
from raymill.model.config import ModelConfig
from raymill.training.config import TrainingConfig
from raymill.training.memory import LOSS_ROWS, MemoryPrediction, advise, describe, predict

TRAINS = """
import json, sys
import numpy as np
import torch
from raymill.dataset.loader import Batch
from raymill.model.transformer import Transformer
from raymill.training.config import TrainingConfig
from raymill.training.optimizer import build_optimizer
from raymill.training.parallel.replicated import Replicated
from raymill.training.parallel.worker import Worker
from raymill.training.snapshot import Snapshot

torch.set_num_threads(1)
config, vocab_size = TrainingConfig.model_validate(json.loads(sys.argv[1])), int(sys.argv[2])
model = Transformer(config.model, vocab_size)
model.initialize(0)
model.checkpoint_activations = config.activation_checkpointing
optimizer = build_optimizer(model, config.optimizer)
placement = Replicated(model, Worker(0, 1, torch.device("cpu")), config)
snapshot, length = Snapshot(), config.model.max_seq_len
draw = np.random.default_rng(0)

def batches():
    for _ in placement.microbatches():
        ids = torch.from_numpy(draw.integers(0, vocab_size, (config.microbatch_size, length + 1)))
        documents = torch.from_numpy(np.sort(draw.integers(0, 3, (config.microbatch_size, length)), axis=1))
        yield Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), documents)

for step in range(3):
    placement.backward(batches(), config.global_batch_size * length, step)
    placement.gradient_norm()
    optimizer.step()
    optimizer.zero_grad()
    named = dict(model.named_parameters())
    state = {f"{field}/{name}": tensor for name in named for field, tensor in optimizer.state[named[name]].items()}
    snapshot.take({"weights": named, "optimizer": state})
    snapshot.release()
print([int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


def settings(model: dict[str, Any], microbatch_size: int, num_microbatches: int = 1, **other: Any) -> TrainingConfig:
    shape = {"num_kv_heads": model["num_heads"], **model}
    return TrainingConfig(
        model=ModelConfig(**shape),
        microbatch_size=microbatch_size,
        global_batch_size=microbatch_size * num_microbatches,
        **other,
    )


def shape(architecture: str, num_layers: int, model_dim: int, max_seq_len: int, **other: int) -> dict[str, Any]:
    hidden_dim = 4 * model_dim if architecture == "gpt2" else 8 * model_dim // 3
    heads = {"num_heads": max(2, model_dim // 64)}
    sizes = {"num_layers": num_layers, "model_dim": model_dim, "hidden_dim": hidden_dim, "max_seq_len": max_seq_len}
    return {"architecture": architecture, **sizes, **heads, **other}


def check_against_measured(config: TrainingConfig, vocab_size: int) -> None:
    """A process without validations, whose share is left out of the prediction."""
    command = [sys.executable, "-c", TRAINS, config.model_dump_json(), str(vocab_size)]
    measured = int(subprocess.run(command, check=True, capture_output=True).stdout)
    predicted = predict(config, vocab_size, 1, "cpu")
    without = predicted.total_bytes - predicted.validation_bytes
    assert 0.8 < without / measured < 1.2, f"{without / 1e6:.0f} MB predicted, {measured / 1e6:.0f} MB measured"


MEASURED = [
    (settings(shape("llama", 4, 256, 256), 4), 4096),
    (settings(shape("qwen3", 2, 256, 512, num_kv_heads=2), 2, 4, optimizer={"name": "muon"}), 4096),
    (settings(shape("gpt2", 4, 192, 128), 16, optimizer={"name": "sgd"}, activation_checkpointing=True), 2048),
]
MEASURED_SLOWLY = [
    (settings(shape("qwen3", 2, 192, 128), 1), 4096),
    (settings(shape("qwen3", 2, 256, 512, num_kv_heads=2), 4, 4, optimizer={"name": "muon"}), 4096),
    (settings(shape("llama", 6, 384, 256), 8), 8192),
    (settings(shape("llama", 6, 384, 256), 8, 4, activation_checkpointing=True), 8192),
    (settings(shape("qwen3", 8, 512, 1024, num_kv_heads=4), 2, optimizer={"name": "muon"}), 8192),
    (settings(shape("qwen3", 8, 512, 1024), 2, activation_checkpointing=True), 8192),
    (settings(shape("llama", 10, 640, 128), 4, 2), 16384),
    (settings(shape("gpt2", 6, 384, 512), 16), 8192),
    (settings(shape("llama", 6, 256, 1024), 8, 2, optimizer={"name": "lion"}), 8192),
]


@pytest.mark.parametrize(("config", "vocab_size"), MEASURED)
def test_the_prediction_is_within_a_fifth_of_what_training_took(config: TrainingConfig, vocab_size: int) -> None:
    check_against_measured(config, vocab_size)


@pytest.mark.slow
@pytest.mark.parametrize(("config", "vocab_size"), MEASURED_SLOWLY)
def test_the_prediction_is_within_a_fifth_over_many_shapes(config: TrainingConfig, vocab_size: int) -> None:
    check_against_measured(config, vocab_size)


CONFIG = settings(shape("llama", 8, 512, 1024), 16, 4)
VOCAB = 8192


def total(config: TrainingConfig, workers: int = 1) -> int:
    return predict(config, VOCAB, workers, "cpu").total_bytes


def parts(config: TrainingConfig, workers: int = 1) -> MemoryPrediction:
    return predict(config, VOCAB, workers, "cpu")


def test_every_optimizer_keeps_what_its_state_holds() -> None:
    import torch

    from raymill.model.transformer import Transformer
    from raymill.training.optimizer import build_optimizer

    small = settings(shape("qwen3", 2, 64, 32), 1)
    for name in ("sgd", "adamw", "lion", "muon"):
        config = override(small, {"optimizer": {"name": name}})
        model = Transformer(config.model, VOCAB)
        optimizer = build_optimizer(model, config.optimizer)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        tensors = [tensor for state in optimizer.state.values() for tensor in state.values()]
        kept = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        assert predict(config, VOCAB, 1, "cpu").optimizer_bytes == pytest.approx(kept, rel=0.02), name


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gpt2"])
def test_a_block_keeps_what_autograd_says_it_keeps(architecture: str) -> None:
    import torch

    from raymill.model.transformer import Transformer

    config = settings(shape(architecture, 1, 256, 256), 4)
    model = Transformer(config.model, 64)
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    x_BTD = torch.randn(4, 256, 256, requires_grad=True)
    documents_BT = (torch.arange(256) // 100).expand(4, 256).contiguous()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.run_blocks(x_BTD, documents_BT)
    size = sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in own)
    deeper = override(config, {"model.num_layers": 2})
    one_block = predict(deeper, 64, 1, "cpu").activations_bytes - predict(config, 64, 1, "cpu").activations_bytes
    assert one_block == pytest.approx(size, rel=0.1)


def test_sharding_and_splitting_lower_what_a_worker_holds() -> None:
    config = override(CONFIG, {"model": {"hidden_dim": 1376}})
    whole = parts(config)
    sharded = parts(override(config, {"layout": {"data": "fsdp"}}), 4)
    assert sharded.optimizer_bytes == whole.optimizer_bytes // 4
    assert sharded.weights_bytes < whole.weights_bytes
    tensor = parts(override(config, {"layout": {"tensor": 2}}), 2)
    assert tensor.weights_bytes < 0.7 * whole.weights_bytes and tensor.activations_bytes < 0.9 * whole.activations_bytes
    context = parts(override(config, {"layout": {"context": 2}}), 2)
    assert context.activations_bytes < 0.7 * whole.activations_bytes
    staged = parts(override(config, {"layout": {"pipeline": 2}}), 2)
    assert staged.weights_bytes < 0.7 * whole.weights_bytes


def test_workers_that_add_gradients_hold_them_flat_beside_their_own() -> None:
    assert parts(CONFIG, 2).gradients_bytes == 3 * parts(CONFIG).weights_bytes
    one_microbatch = override(CONFIG, {"global_batch_size": 16})
    assert parts(one_microbatch).gradients_bytes == parts(CONFIG).weights_bytes


def test_a_run_that_fits_needs_no_advice() -> None:
    assert advise(parts(CONFIG), total(CONFIG), CONFIG) is None


def test_the_advice_is_the_smallest_change_that_fits() -> None:
    smaller = override(CONFIG, {"microbatch_size": 4})
    limit = total(smaller)
    assert total(override(CONFIG, {"microbatch_size": 8})) > limit
    told = advise(parts(CONFIG), limit, CONFIG)
    assert told is not None and told.startswith("set train.microbatch_size to 4: about")


def test_where_no_batch_is_small_enough_activations_are_computed_again() -> None:
    smallest = total(override(CONFIG, {"microbatch_size": 1}))
    again = override(CONFIG, {"microbatch_size": 1, "activation_checkpointing": True})
    limit = (smallest + total(again)) // 2
    told = advise(parts(CONFIG), limit, CONFIG)
    assert told is not None and "train.activation_checkpointing to true" in told
    changes = dict(re.findall(r"train\.(\w+) to (\w+)", told))
    fits = override(CONFIG, {name: json.loads(value) for name, value in changes.items()})
    assert total(fits) <= limit


def test_workers_that_cannot_hold_a_copy_each_shard_it() -> None:
    kept = override(CONFIG, {"microbatch_size": 1, "activation_checkpointing": True})
    limit = int(0.9 * total(kept, 4))
    told = advise(parts(CONFIG, 4), limit, CONFIG)
    assert told is not None and "train.layout.data to fsdp" in told


def test_what_nothing_can_make_fit_is_said_with_the_memory_it_takes() -> None:
    told = advise(parts(CONFIG), 1_000_000, CONFIG)
    assert told is not None and re.match(r"take workers of [0-9.]+ GB or a smaller model", told)


def test_the_description_names_the_largest_part_first() -> None:
    told = describe(parts(CONFIG))
    assert re.match(r"about \d\.\d GB per worker: activations \d\.\d GB, ", told)
    assert "weights 117 MB" in told and "ema" not in told


def test_the_loss_holds_as_many_rows_of_logits_as_the_prediction_counts() -> None:
    from raymill.training.losses import CHUNK_ROWS, GPU_CHUNK_ROWS

    assert LOSS_ROWS == {"cpu": CHUNK_ROWS, "cuda": GPU_CHUNK_ROWS}
    wider = {device: predict(CONFIG, VOCAB + 1, 1, device).logits_bytes for device in LOSS_ROWS}
    column = {device: wider[device] - predict(CONFIG, VOCAB, 1, device).logits_bytes for device in LOSS_ROWS}
    assert column["cuda"] - column["cpu"] == 4 * (3 * GPU_CHUNK_ROWS - CHUNK_ROWS)


def test_a_layout_wider_than_the_workers_is_refused_in_words() -> None:
    with pytest.raises(UsageError, match="num_workers 1 is not a multiple of"):
        parts(override(CONFIG, {"layout": {"tensor": 2}}), 1)
