"""The compiled step against torch, against itself in every arrangement, and against wrong input."""

import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from raymill.compression.kv_cache import round_keys_and_values
from raymill.compression.quantize import load_served_model
from raymill.errors import ArtifactError
from raymill.inference import native
from raymill.inference.kv_cache import page_bytes
from raymill.inference.native.build import runnable_targets
from raymill.inference.native_step import NativeStep
from raymill.inference.native_weights import CheckpointWeights
from raymill.inference.step import Chunk
from raymill.inference.torch_step import TorchStep
from raymill.model.weights import save_model

VOCAB = 97
PAGES = 160
ARCHITECTURES = (
    "llama",
    "llama untied, odd widths",
    "llama3 rope",
    "mistral window",
    "qwen2",
    "qwen3 head_dim",
    "qwen3 window of 1",
    "gpt2",
)
TOLERANCE = {"fp32": 1e-4, "int8": 5e-3, "int4": 5e-3}
"""Of the largest logit. Torch adds in another order; in int8 that now and then rounds an activation to its neighbour."""


def table_of(seed, slots=32):
    """Pages of so many slots, scattered."""
    return np.random.default_rng(seed).permutation(PAGES)[: slots * 5].astype(np.int32).reshape(slots, 5)


def prompt_of(length, seed=0):
    """The first ids of that seed's text."""
    return tuple(np.random.default_rng(seed).integers(0, VOCAB, 160)[:length].tolist())


def logits_of(step, prompt):
    return step([Chunk(3, 0, prompt, len(prompt))], table_of(1)).logits_NV.copy()


def assert_close(found, wanted, tolerance):
    assert np.isfinite(found).all()
    assert np.abs(found - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_logits_are_torchs(name, precision, load, checkpoint):
    if precision == "int4" and "odd" in name:
        pytest.skip("no whole groups")
    prompt = prompt_of(70)
    wanted = logits_of(TorchStep(load_served_model(checkpoint(name, precision)), PAGES), prompt)
    assert_close(logits_of(load(name, precision), prompt), wanted, TOLERANCE[precision])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_int8_cache_rounds_as_compression_measures_it(name, load, checkpoint):
    model, prompt = load_served_model(checkpoint(name, "fp32")), prompt_of(70)
    exact = model(torch.tensor([prompt]))[0].numpy()
    round_keys_and_values(model)
    rounded = model(torch.tensor([prompt]))[0].numpy()
    found = logits_of(load(name, "fp32", kv="int8"), prompt)
    assert_close(found, rounded, 5e-3)
    torchs = TorchStep(load_served_model(checkpoint(name, "fp32")), PAGES, "int8")
    assert_close(found, logits_of(torchs, prompt), 5e-3)
    assert np.abs(rounded - exact).max() > 0, "a cache that rounds nothing proves nothing"


@pytest.mark.parametrize("kv", ["fp32", "int8"])
@pytest.mark.parametrize("part", ["k_proj", "v_proj"])
def test_no_cache_makes_a_number_of_what_is_none(part, kv, checkpoint, tmp_path):
    if native.library() is None:
        pytest.skip("no C++ compiler")
    model = load_served_model(checkpoint("qwen2", "fp32"))
    getattr(model.model.layers[0].self_attn, part).bias[3] = torch.nan
    save_model(tmp_path, model, end_id=0)
    step = NativeStep.load(tmp_path, num_pages=PAGES, kv_precision=kv, threads=1)
    assert not np.isfinite(logits_of(step, prompt_of(5))).any()


@pytest.mark.parametrize("precision,kv", [("fp32", "fp32"), ("int8", "fp32"), ("int8", "int8"), ("int4", "int8")])
@pytest.mark.parametrize("name", ["llama", "mistral window", "gpt2"])
def test_bits_depend_on_nothing_but_the_sequence(name, precision, kv, load):
    prompts = [
        prompt_of(length, seed) for seed, length in enumerate([1, 2, 31, 32, 33, 64, 65, 97, 140, *range(3, 72, 3)])
    ]
    alone = load(name, precision, kv=kv, threads=1)
    wanted = [logits_of(alone, prompt) for prompt in prompts]
    for threads in (1, 2):
        step = load(name, precision, kv=kv, threads=threads)
        for piece, count in ((1, 32), (1, 3), (7, 32), (7, 1), (64, 5), (64, 32)):
            found = run_together(step, prompts[:count], piece, seed=piece + count)
            for number in range(count):
                assert np.array_equal(found[number], wanted[number]), (threads, piece, count, len(prompts[number]))


def run_together(step, prompts, piece, seed):
    """All logits of prompts fed side by side in pieces, in slots and pages of that seed."""
    slots, table = np.random.default_rng(seed).permutation(32).tolist(), table_of(seed)
    found = [[] for _ in prompts]
    for start in range(0, max(map(len, prompts)), piece):
        live = [number for number, prompt in enumerate(prompts) if len(prompt) > start]
        parts = {number: prompts[number][start : start + piece] for number in live}
        logits = step([Chunk(slots[n], start, parts[n], len(parts[n])) for n in live], table).logits_NV.copy()
        for number in live:
            found[number].append(logits[: len(parts[number])])
            logits = logits[len(parts[number]) :]
    return [np.concatenate(rows) for rows in found]


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("target", ["avx2", "plain"])
def test_every_target_says_the_same_to_rounding(target, precision, load):
    if target not in runnable_targets():
        pytest.skip("not on this CPU")
    prompt = prompt_of(70)
    for kv in ("fp32", "int8"):
        found = logits_of(load(precision=precision, kv=kv, target=target), prompt)
        assert_close(found, logits_of(load(precision=precision, kv=kv), prompt), TOLERANCE[precision])


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_greedy_text_is_torchs(precision, load, checkpoint):
    def text(step):
        ids = list(prompt_of(9))
        done = 0
        while len(ids) < 60:
            logits = step([Chunk(0, done, tuple(ids[done:]), 1)], table_of(2)).logits_NV
            done = len(ids)
            ids.append(int(logits[0].argmax()))
        return ids

    found = text(load(precision=precision))
    assert len(set(found)) > 8, "a model that always says the same proves nothing"
    assert found == text(TorchStep(load_served_model(checkpoint("llama", precision)), PAGES))


def test_hidden_states_come_in_the_order_of_the_chunks(load, checkpoint):
    step = load("qwen3 head_dim", "fp32")
    head_VD = load_file(checkpoint("qwen3 head_dim", "fp32") / "model.safetensors")["lm_head.weight"]
    chunks = [Chunk(0, 0, (5,), 1), Chunk(1, 0, prompt_of(9), 0, wants_hidden=True), Chunk(2, 0, prompt_of(4), 2)]
    output = step(chunks, table_of(4))
    assert output.logits_NV.shape == (3, VOCAB) and output.hidden_ND.shape == (9, 64)
    assert_close(output.hidden_ND @ head_VD.T, logits_of(step, prompt_of(9)), 1e-4)


def test_a_step_without_chunks_or_logits_gives_no_rows(load):
    step = load()
    assert step([], table_of(1)).logits_NV.shape == (0, VOCAB)
    assert step([Chunk(0, 0, (1, 2), 0)], table_of(1)).logits_NV.shape == (0, VOCAB)


def test_memory_for_many_logits_at_once_is_not_kept(load):
    step, table = load(), table_of(1)
    assert logits_of(step, prompt_of(1)).shape == (1, VOCAB)
    many = step([Chunk(0, 0, prompt_of(150), 150)], table).logits_NV
    few = step([Chunk(0, 0, prompt_of(2), 2)], table).logits_NV
    assert np.array_equal(few, many[:2])
    assert not np.shares_memory(few, many)


class TestAdapters:
    NAMES = (
        "self_attn.q_proj",
        "self_attn.v_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
        "self_attn.o_proj",
    )

    def tensors(self, model, rank, seed):
        generator = np.random.default_rng(seed)
        found = {}
        for name, layer in model.named_modules():
            if name.endswith(self.NAMES):
                down = generator.normal(size=(rank, layer.weight.shape[1])).astype(np.float32)
                found[name] = (down, generator.normal(size=(layer.weight.shape[0], rank)).astype(np.float32))
        assert len(found) == 12
        return found

    def test_it_adds_what_merged_weights_would(self, load, checkpoint):
        model, prompt = load_served_model(checkpoint("llama", "fp32")), prompt_of(40)
        step = load("llama", "fp32")
        base = logits_of(step, prompt)
        numbers, wanted = [], []
        for seed, rank in ((1, 3), (2, 8)):
            tensors = self.tensors(model, rank, seed)
            numbers.append(step.load_adapter(tensors, 0.03))
            merged = load_served_model(checkpoint("llama", "fp32"))
            for name, (down, up) in tensors.items():
                merged.get_submodule(name).weight += 0.03 * torch.from_numpy(up @ down)
            wanted.append(merged(torch.tensor([prompt]))[0].numpy())
        assert numbers == [1, 2]
        chunks = [Chunk(number, 0, prompt, 40, adapter) for number, adapter in enumerate((2, 0, 1))]
        second, none, first = np.split(step(chunks, table_of(3)).logits_NV.copy(), 3)
        assert np.array_equal(none, base)
        assert_close(first, wanted[0], 1e-4)
        assert_close(second, wanted[1], 1e-4)
        assert np.abs(first - base).max() > 0.1
        for start in range(40):  # the same bits one by one
            alone = step([Chunk(9, start, prompt[start : start + 1], 1, 2)], table_of(3)).logits_NV
            assert np.array_equal(alone[0], second[start])

    @pytest.mark.parametrize(
        "name,down,up",
        [
            ("lm_head", (2, 64), (97, 2)),
            ("model.layers.2.mlp.down_proj", (2, 96), (64, 2)),
            ("model.layers.0.mlp.down_proj", (2, 64), (64, 2)),
            ("model.layers.0.mlp.down_proj", (2, 96), (64, 3)),
        ],
    )
    def test_one_that_does_not_fit_is_refused(self, name, down, up, load):
        with pytest.raises(ArtifactError, match="adapter"):
            load().load_adapter({name: (np.zeros(down, np.float32), np.zeros(up, np.float32))}, 1.0)


@pytest.mark.parametrize(
    "chunk,page,why",
    [
        (Chunk(0, 0, (1, VOCAB), 1), 0, "vocabulary"),
        (Chunk(0, 0, (-1,), 1), 0, "vocabulary"),
        (Chunk(32, 0, (1,), 1), 0, "slot"),
        (Chunk(-1, 0, (1,), 1), 0, "slot"),
        (Chunk(0, 159, (1, 2), 1), 0, "max_seq_len"),
        (Chunk(0, -1, (1, 2), 1), 0, "max_seq_len"),
        (Chunk(0, 0, (1,), 1), PAGES, "page"),
        (Chunk(0, 40, (1,), 1), -1, "page"),
        (Chunk(0, 0, (1,), 2), 0, "more logits"),
        (Chunk(0, 0, (1,), -1), 0, "more logits"),
        (Chunk(0, 0, (1,), 1, adapter=1), 0, "adapter"),
        (Chunk(0, 0, (), 0), 0, "add up"),
    ],
)
def test_what_would_read_outside_memory_is_refused(chunk, page, why, load):
    step, table = load(), table_of(1)
    table[0, 0] = page
    with pytest.raises(ValueError, match=why):
        step([Chunk(1, 0, (1,), 1), chunk], table)
    assert np.isfinite(logits_of(step, prompt_of(3))).all()


@pytest.mark.parametrize("ask", ["step", "adapter"])
def test_a_closed_step_refuses(ask, load):
    step = load()
    step.close()
    step.close()
    with pytest.raises(ValueError, match="closed"):
        step([Chunk(0, 0, (1,), 1)], table_of(1)) if ask == "step" else step.load_adapter({}, 1.0)


def test_a_fork_is_refused_and_ends(checkpoint, load):
    load()  # or a skip
    program = """
import os, pathlib, signal, sys
import numpy as np
from raymill.inference.native_step import NativeStep
from raymill.inference.step import Chunk
step = NativeStep.load(pathlib.Path(sys.argv[1]), num_pages=5, kv_precision="fp32", threads=2)
ask = lambda: step([Chunk(0, 0, (1,), 1)], np.arange(5, dtype=np.int32)[None]).logits_NV.sum()
before, child = ask(), os.fork()
if child == 0:
    signal.alarm(10)
    try:
        ask()
    except ValueError as error:
        step.close()
        sys.exit(7 if "fork" in str(error) else 8)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), ask() == before)
step.close()
"""
    command = [sys.executable, "-W", "ignore", "-c", program, str(checkpoint())]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.split() == [
        "7",
        "True",
    ]


def damaged(folder, tmp_path, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    return tmp_path


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize(
    "change,why",
    [
        (lambda tensors: tensors.pop(UP), "there is no"),
        (lambda tensors: tensors.update({UP: tensors[UP][:-1]}), "not \\(96"),
        (lambda tensors: tensors.update({UP: tensors[UP].astype(np.float32)}), "is F32"),
        (lambda tensors: tensors[f"{UP}_scale"].fill(np.nan), "not finite"),
        (lambda tensors: tensors["model.embed_tokens.weight_scale"].fill(np.inf), "not finite"),
        (lambda tensors: tensors.update({"model.norm.weight": np.ones(64, np.int8)}), "floating"),
        (lambda tensors: tensors.update({"model.layers.1.mlp.up_proj.bias": np.ones(96, np.float32)}), "no part of"),
    ],
)
def test_a_checkpoint_that_does_not_match_its_config_is_refused(precision, change, why, checkpoint, load, tmp_path):
    load()
    folder = damaged(checkpoint("llama", precision), tmp_path, change)
    with pytest.raises(ArtifactError, match=why):
        NativeStep.load(folder, num_pages=8, kv_precision="fp32", threads=1)


def test_a_header_that_lies_is_refused(checkpoint, load, tmp_path):
    load()
    folder = damaged(checkpoint(), tmp_path, lambda tensors: None)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header[UP]["data_offsets"][1] += 4096
    longer = json.dumps(header).encode()
    for content in (
        len(longer).to_bytes(8, "little") + longer + whole[8 + length :],  # beyond its neighbour
        whole[:-100],
        whole[:50],
        (2**60).to_bytes(8, "little") + whole[8:],
        b"",
    ):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match="damaged"):
            NativeStep.load(folder, num_pages=8, kv_precision="fp32", threads=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_half_precision_is_widened(name, dtype, checkpoint, load, tmp_path):
    from safetensors.torch import load_file, save_file

    load()
    folder = checkpoint(name, "fp32")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    step = NativeStep.load(tmp_path, num_pages=PAGES, kv_precision="fp32", threads=1)
    wanted = logits_of(TorchStep(load_served_model(tmp_path), PAGES), prompt_of(20))
    assert_close(logits_of(step, prompt_of(20)), wanted, 1e-4)


def test_neither_torch_nor_numba_is_loaded(checkpoint, load):
    load()
    program = (
        "import pathlib, sys, numpy\n"
        "from raymill.inference.native_step import NativeStep\n"
        "from raymill.inference.step import Chunk\n"
        f"step = NativeStep.load(pathlib.Path({str(checkpoint())!r}), num_pages=8, kv_precision='int8', threads=1)\n"
        "step([Chunk(0, 0, (1, 2), 1)], numpy.zeros((1, 5), numpy.int32))\n"
        "print(sorted({'torch', 'numba', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("pages,threads", [(2**31 - 1, 1), (1, 2000)])
def test_a_machine_without_room_is_told_what_to_lower(pages, threads, checkpoint, load):
    load()  # compiles
    program = (
        "import resource; from pathlib import Path; from raymill.errors import MachineError\n"
        "from raymill.inference.native_step import NativeStep\n"
        "resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))\n"
        f"try: NativeStep.load(Path({str(checkpoint())!r}), num_pages={pages}, kv_precision='fp32', threads={threads})\n"
        "except MachineError as error: print(error)\n"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert "lower serve.max_kv_cache_mib, or the serve role's threads" in told.stdout


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's count of a process's memory")
@pytest.mark.parametrize("kv", ["fp32", "int8"])
@pytest.mark.parametrize("name", ["llama", "llama untied, odd widths", "qwen3 head_dim"])  # heads of 16, 6 and 48
def test_a_page_takes_what_it_is_said_to(name, kv, checkpoint, load):
    load()  # or a skip
    weights = CheckpointWeights(checkpoint(name))
    size_bytes = page_bytes(weights.config, kv)
    pages = 2**28 // size_bytes
    before_bytes = reserved_bytes()
    step = NativeStep(native.library(), weights, pages, kv, threads=1)
    taken_bytes = reserved_bytes() - before_bytes
    step.close()
    assert 0 <= taken_bytes - pages * size_bytes < 40 * 2**20  # its weights lie in 32 MiB


def reserved_bytes():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def test_threads_rest_between_steps(load):
    step = load(threads=2)
    logits_of(step, prompt_of(5))
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.2)
    assert time.process_time() - before < 0.05


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's list of a process's memory")
def test_weights_lie_where_the_system_gives_large_pages(load):
    """Private memory that asked for them: shared memory gets none, and a step of one row then takes 1.4 times as long."""
    step = load("llama", "int8")
    address = step._memory._pieces[0].ctypes.data
    flags = mapping_flags(address)
    assert "hg" in flags, "pages of 2 MB were not asked for"
    assert "sh" not in flags, "the memory is shared"


def mapping_flags(address):
    """The VmFlags of the mapping that holds it."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("no mapping holds the address")
