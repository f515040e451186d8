"""What one GPU makes of raymill's model, without Ray: MFU in bf16 and fp8, and the time to a fixed loss.

    python -m benchmarks.training.gpu                       124M and 1B, Qwen3's and GPT-2's layout: about 20 minutes
    python -m benchmarks.training.gpu --sizes 1b --layouts qwen3 --json FILE      a part, also as a JSON list of rows
    python -m benchmarks.training.gpu --dry                 tiny shapes on the CPU: that the code runs, no figure

It needs torch from 2.9 with CUDA, numpy, pydantic and PyYAML. raymill need not be installed: from the checkout's root,
PYTHONPATH=platform. For a machine without a network bring what it lacks: `pip install --target FOLDER pydantic pyyaml`
under the same Python, and PYTHONPATH=platform:FOLDER.

How to read it: a step is the product's own (placement, objective, clipping, optimizer) on random tokens; figures are of
the median step after warm-up. Each way of computing gets the microbatch that is fastest without compilation, found by
doubling until memory ends. MFU counts useful operations only (raymill.training.flops): attention below the diagonal, no
activation twice. Figures of others, published for many GPUs and other models: torchtitan 33-39 %, llm-foundry 42-46 %.

Time to a loss is of the text of this Python's standard library, byte by byte, which needs no tokenizer; the other side is
GPT-2's layout with AdamW by the same code, so the ratio is the recipe's alone.
"""

from __future__ import annotations

import argparse
import gc
import math
import platform
import statistics
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.table import Row, render, save
from raymill.dataset.loader import Batch
from raymill.model.config import ModelConfig
from raymill.model.fp8 import CAPABILITY
from raymill.model.transformer import Transformer
from raymill.training.config import TrainingConfig
from raymill.training.flops import peak_flops, training_flops_per_token, utilization
from raymill.training.losses import next_token
from raymill.training.optimizer import build_optimizer, set_learning_rate
from raymill.training.parallel.choice import placement_for
from raymill.training.parallel.worker import Worker
from raymill.training.recipes import PRESETS

_VOCAB_SIZE = 50_304
_BYTES = 256
_WORST = 0.98
"""A microbatch twice as large must be this much as fast, or the search ends."""
_GPT2: dict[str, dict[str, Any]] = {
    "124m": {"num_layers": 12, "model_dim": 768, "num_heads": 12, "hidden_dim": 3072, "max_seq_len": 1024},
    "1b": {"num_layers": 22, "model_dim": 2048, "num_heads": 16, "hidden_dim": 8192, "max_seq_len": 2048},
    "dry": {"num_layers": 2, "model_dim": 32, "num_heads": 2, "hidden_dim": 64, "max_seq_len": 32},
}
_DRY = {"num_layers": 2, "model_dim": 32, "num_heads": 2, "num_kv_heads": 2, "hidden_dim": 64, "max_seq_len": 32}
_RECIPES: dict[str, dict[str, Any]] = {
    "raymill": {
        "architecture": "qwen3",
        "optimizer": {"name": "muon", "learning_rate": 1e-2, "weight_decay": 0.0},
        "init": {"name": "kaiming", "zero_projections": True},
    },
    "GPT-2, AdamW": {
        "architecture": "gpt2",
        "optimizer": {"name": "adamw", "learning_rate": 1e-3},
        "init": {"name": "scaled"},
    },
}


@dataclass(frozen=True)
class Machine:
    """The device and how long it is asked."""

    device: torch.device
    name: str
    """As raymill.training.flops knows it."""
    steps: int
    largest_microbatch: int
    vocab_size: int
    peak: float | None
    """Operations per second in bf16, in fp32 on a CPU."""

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        if self.is_gpu:
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Case:
    """One way to compute a model."""

    model: ModelConfig
    precision: str
    microbatch_size: int = 1
    compile: bool = False
    checkpointing: bool = False
    documents: bool = False

    def __str__(self) -> str:
        words = [self.precision]
        words += [word for word in ("compile", "checkpointing", "documents") if getattr(self, word)]
        return " + ".join(words)


@dataclass(frozen=True)
class Measured:
    """What a case gave."""

    case: Case
    tokens_per_s: float
    spread: float
    peak_gib: float


def shape(layout: str, size: str) -> ModelConfig:
    if layout == "gpt2":
        values = _GPT2[size]
        return ModelConfig(architecture="gpt2", num_kv_heads=values["num_heads"], **values)
    return ModelConfig.model_validate(_DRY | {"architecture": "qwen3"} if size == "dry" else PRESETS[size]["model"])


class Run:
    """A model that trains one microbatch a step."""

    def __init__(self, machine: Machine, config: TrainingConfig, vocab_size: int) -> None:
        self.model = Transformer(config.model, vocab_size)
        self.model.initialize(0, config.init)
        self.placement = placement_for(config, self.model.train(), Worker(0, 1, machine.device))
        self._optimizer = build_optimizer(self.placement.model, config.optimizer)
        self._number = 0

    def step(self, batch: Batch, scale: float = 1.0) -> Tensor:
        loss = self.placement.backward(iter([batch]), batch.targets_BT.numel(), self._number)
        norm = self.placement.gradient_norm()
        gradients = [each.grad for each in self.placement.model.parameters() if each.grad is not None]
        torch._foreach_mul_(
            gradients, (1.0 / (norm + 1e-6)).clamp(max=1.0)
        )  # no look at the norm: nothing waits for it
        set_learning_rate(self._optimizer, scale)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._number += 1
        return loss


def measure(machine: Machine, case: Case) -> Measured | None:
    """None where memory is not enough."""
    run = None
    try:
        run = Run(machine, _config(case), machine.vocab_size)
        return _timed(machine, case, run)
    except torch.OutOfMemoryError:
        return None
    finally:
        del run
        _forget(machine)


def _timed(machine: Machine, case: Case, run: Run) -> Measured:
    batch = _random_batch(case, machine)
    seconds = []
    for _ in range(2 + machine.steps):
        machine.wait()
        began = time.perf_counter()
        run.step(batch)
        machine.wait()
        seconds.append(time.perf_counter() - began)
    seconds = seconds[2:]
    tokens = case.microbatch_size * case.model.max_seq_len
    peak = torch.cuda.max_memory_allocated() / 2**30 if machine.is_gpu else 0.0
    step_s = statistics.median(seconds)
    return Measured(case, tokens / step_s, (max(seconds) - min(seconds)) / step_s, peak)


def _config(case: Case) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {
            "model": case.model,
            "optimizer": {"name": "adamw", "learning_rate": 1e-4},
            "precision": case.precision,
            "compile": case.compile,
            "activation_checkpointing": case.checkpointing,
            "mask_documents": case.documents,
            "global_batch_size": case.microbatch_size,
            "microbatch_size": case.microbatch_size,
        }
    )


def _random_batch(case: Case, machine: Machine) -> Batch:
    """Documents, where they count, are a quarter of the sequence long."""
    generator = torch.Generator().manual_seed(1)
    length, device = case.model.max_seq_len, machine.device
    ids = torch.randint(machine.vocab_size, (case.microbatch_size, length + 1), generator=generator).to(device)
    documents_BT = (torch.arange(length, device=device) // (length // 4)).expand(case.microbatch_size, length)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), documents_BT.contiguous())


def _forget(machine: Machine) -> None:
    gc.collect()
    if machine.is_gpu:
        torch._dynamo.reset()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def search_microbatch(machine: Machine, case: Case) -> Measured | None:
    """The fastest microbatch, doubling from 1 until memory ends or speed falls."""
    best: Measured | None = None
    size = 1
    while size <= machine.largest_microbatch:
        found = measure(machine, replace(case, microbatch_size=size))
        if found is None or (best is not None and found.tokens_per_s < _WORST * best.tokens_per_s):
            break
        if best is None or found.tokens_per_s > best.tokens_per_s:
            best = found
        size *= 2
    return best


def mfu_rows(machine: Machine, layout: str, size: str) -> list[Row]:
    """Every way of computing one model; fp8 and documents with the fastest of them."""
    plain = Case(shape(layout, size), "bf16" if machine.is_gpu else "fp32")
    found: list[Measured] = []
    for checkpointing in (False, True):
        searched = search_microbatch(machine, replace(plain, checkpointing=checkpointing))
        if searched is None:
            continue
        found.append(searched)
        if machine.is_gpu:
            found += _measured(machine, replace(searched.case, compile=True))
    if found:
        fastest = max(found, key=lambda each: each.tokens_per_s).case
        if machine.is_gpu and torch.cuda.get_device_capability(machine.device) >= CAPABILITY:
            found += _measured(machine, replace(fastest, precision="fp8"))
        found += _measured(machine, replace(fastest, documents=True))
    return [_mfu_row(machine, f"{size} {layout}", each) for each in found]


def _measured(machine: Machine, case: Case) -> list[Measured]:
    found = measure(machine, case)
    return [] if found is None else [found]


def _mfu_row(machine: Machine, name: str, found: Measured) -> Row:
    """Against the peak of bf16, fp8 too: so its figure says what it gained."""
    model = found.case.model
    flops = training_flops_per_token(model, machine.vocab_size, model.max_seq_len)
    mfu = utilization(found.tokens_per_s, flops, machine.peak, 1)
    note = f"{found.tokens_per_s:,.0f} tokens/s, {model.num_parameters(machine.vocab_size) / 1e6:,.0f} M parameters, "
    note += f"microbatch {found.case.microbatch_size} x {model.max_seq_len}, peak memory {found.peak_gib:.1f} GiB"
    value = None if mfu is None else 100 * mfu
    print(f"{name}, {found.case}: {note}", file=sys.stderr, flush=True)
    return Row(f"{name}, {found.case}", "% MFU", value, spread=found.spread, rounds=machine.steps, note=note)


def loss_row(machine: Machine, model: dict[str, Any], batch_size: int, target: float, most_steps: int) -> Row:
    """Seconds of training steps until the held-out loss is at the target, for both recipes."""
    text = _text_bytes().to(machine.device)
    seconds: dict[str, float | None] = {}
    notes = []
    for name, recipe in _RECIPES.items():
        architecture = {"architecture": recipe["architecture"], "hidden_dim": model["model_dim"] * 4}
        if recipe["architecture"] == "qwen3":
            architecture["hidden_dim"] = model["model_dim"] * 8 // 3 // 16 * 16
        config = TrainingConfig.model_validate(
            {
                "model": model | architecture,
                "optimizer": recipe["optimizer"],
                "init": recipe["init"],
                "mask_documents": False,
                "global_batch_size": batch_size,
                "microbatch_size": batch_size,
            }
        )
        seconds[name], told = _train_to(machine, config, text, target, most_steps)
        notes.append(f"{name}: {told}")
        _forget(machine)
    ours = seconds.pop("raymill")
    return Row(f"seconds to {target:g} nats per byte", "s", ours, seconds, lower_is_better=True, note="; ".join(notes))


def _train_to(
    machine: Machine, config: TrainingConfig, text: Tensor, target: float, most_steps: int
) -> tuple[float | None, str]:
    """Seconds, None where the target was not met; and the way in words. Constant rate after 20 steps of warm-up."""
    run = Run(machine, config, _BYTES)
    length, size = config.model.max_seq_len, config.global_batch_size
    generator = torch.Generator().manual_seed(2)
    held_out = text[: len(text) // 20]
    seconds, loss = 0.0, math.inf
    for number in range(most_steps):
        places = torch.randint(len(held_out), len(text) - length - 1, (size,), generator=generator)
        batch = _batch_at(text, places, length)
        machine.wait()
        began = time.perf_counter()
        run.step(batch, min(1.0, (number + 1) / 20))
        machine.wait()
        seconds += time.perf_counter() - began
        if (number + 1) % 10 == 0 or number + 1 == most_steps:
            loss = _held_out_loss(run, held_out, length)
            if loss <= target:
                return seconds, f"{number + 1} steps, {loss:.3f}"
    return None, f"{loss:.3f} after {most_steps} steps, {seconds:.0f} s"


def _batch_at(text: Tensor, places: Tensor, length: int) -> Batch:
    rows = text[places.to(text.device)[:, None] + torch.arange(length + 1, device=text.device)].long()
    inputs_BT = rows[:, :-1].contiguous()
    return Batch(inputs_BT, rows[:, 1:].contiguous(), torch.zeros_like(inputs_BT))


@torch.no_grad()
def _held_out_loss(run: Run, text: Tensor, length: int) -> float:
    batch = _batch_at(text, torch.arange(0, len(text) - length - 1, (len(text) - length) // 32)[:32], length)
    run.model.eval()
    mixed = torch.autocast(text.device.type, torch.bfloat16, enabled=text.device.type == "cuda")
    with mixed:
        loss = run.model(batch.inputs_BT, None, next_token(batch.targets_BT)) / batch.targets_BT.numel()
    run.model.train()
    return float(loss)


def _text_bytes(limit: int = 20_000_000) -> Tensor:
    """uint8, sources of the standard library in the order of their names."""
    root = Path(sysconfig.get_paths()["stdlib"])
    content = bytearray()
    for path in sorted(root.rglob("*.py")):
        if "site-packages" not in path.parts and len(content) < limit:
            content += path.read_bytes()
    return torch.frombuffer(content, dtype=torch.uint8)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    if not options.dry and not torch.cuda.is_available():
        raise SystemExit("no CUDA GPU is here; fix: run it where one is, or --dry to see that the code runs")
    if options.dry:
        peak = peak_flops("cpu", "fp32", torch.get_num_threads())
        machine = Machine(torch.device("cpu"), "cpu", 1, largest_microbatch=2, vocab_size=_BYTES, peak=peak)
        rows = [row for layout in options.layouts for row in mfu_rows(machine, layout, "dry")]
        rows.append(loss_row(machine, _DRY, batch_size=4, target=5.4, most_steps=20))
    else:
        name = torch.cuda.get_device_name()
        peak = peak_flops(name, "bf16", torch.get_num_threads())
        machine = Machine(torch.device("cuda"), name, 10, largest_microbatch=64, vocab_size=_VOCAB_SIZE, peak=peak)
        rows = [row for size in options.sizes for layout in options.layouts for row in mfu_rows(machine, layout, size)]
        small = PRESETS["small"]["model"] | {"num_kv_heads": PRESETS["small"]["model"]["num_heads"], "max_seq_len": 512}
        rows.append(loss_row(machine, small, batch_size=64, target=1.1, most_steps=3000))
    facts = {"device": machine.name, "torch": torch.__version__, "cuda": torch.version.cuda}
    facts |= {"python": platform.python_version(), "dry": options.dry}
    print("\n".join(f"{name}: {value}" for name, value in facts.items()), end="\n\n")
    print(render(rows))
    if options.json is not None:
        save(rows, facts, options.json)
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training.gpu")
    parser.add_argument("--sizes", nargs="+", choices=("124m", "1b"), default=["124m", "1b"])
    parser.add_argument("--layouts", nargs="+", choices=("qwen3", "gpt2"), default=["qwen3", "gpt2"])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on the CPU")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
