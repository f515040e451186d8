import contextlib
import copy
import functools
import gc
import types
import weakref

import numpy as np
import pytest
import torch

from raymill.compression.quantize import quantize_model
from raymill.errors import MachineError
from raymill.inference.cuda_graphs import DecodeGraphs
from raymill.inference.kv_cache import fit_pages, page_bytes
from raymill.inference.step import Chunk
from raymill.inference.torch_loading import _halve
from raymill.inference.torch_step import TorchStep
from raymill.model.config import ModelConfig, RopeScaling
from raymill.model.transformer import Transformer

VOCAB = 97
TABLE = np.random.default_rng(1).permutation(32).astype(np.int32).reshape(16, 2)
"""Pages of 16 slots, as scattered as can be."""


ARCHITECTURES = {
    "llama3 rope": {"rope_scaling": RopeScaling(kind="llama3", factor=4, original_max_seq_len=12)},
    "mistral window": {"architecture": "mistral", "sliding_window": 6},
    "qwen2": {"architecture": "qwen2"},
    "qwen3 head_dim": {"architecture": "qwen3", "head_dim": 32},
    "qwen3 window": {"architecture": "qwen3", "sliding_window": 1},
    "gpt2": {"architecture": "gpt2", "num_kv_heads": 4},
}


def model_of(kv_heads=2, tie=True, int8=False, **settings):
    shape = {"num_layers": 3, "model_dim": 64, "num_heads": 4, "num_kv_heads": kv_heads, "hidden_dim": 96}
    config = ModelConfig(**{**shape, "max_seq_len": 48, "tie_embeddings": tie, **settings})
    model = Transformer(config, VOCAB)
    model.initialize(seed=2)
    with torch.no_grad():
        for parameter in model.parameters():  # away from init: norms that are not 1, logits that differ
            generator = torch.Generator().manual_seed(3)
            parameter.mul_(1 + torch.rand(parameter.shape, generator=generator)).mul_(3)
            if parameter.ndim < 2:
                parameter.add_(torch.rand(parameter.shape, generator=generator) - 0.5)
    model.requires_grad_(False).eval()
    if int8:
        quantize_model(model)
    return model


def prompts(count=5):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in (1, 2, 9, 17, 30)[:count]]


def greedy_reference(model, prompt, count):
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@functools.cache
def model_and_its_words(architecture=None, **settings):
    """A model and its own greedy completions of all prompts, made once for the many ways to step."""
    model = model_of(**settings, **ARCHITECTURES.get(architecture, {}))
    return model, [greedy_reference(model, prompt, 12) for prompt in prompts()]


def greedy_step(step, all_prompts, count, slots, piece):
    """Prompts in pieces of `piece` ids, interleaved with the completions of those already through."""
    ids = [list(prompt) for prompt in all_prompts]
    computed = [0] * len(ids)
    while any(len(i) < len(p) + count for i, p in zip(ids, all_prompts, strict=True)):
        live = [n for n in range(len(ids)) if len(ids[n]) < len(all_prompts[n]) + count]
        live.sort(key=lambda n: min(len(ids[n]) - computed[n], piece) > 1)  # single rows first, as the scheduler does
        chunks = []
        for n in live:
            end = min(computed[n] + piece, len(ids[n]))
            chunks.append(Chunk(slots[n], computed[n], tuple(ids[n][computed[n] : end]), int(end == len(ids[n]))))
            computed[n] = end
        logits = iter(step(chunks, TABLE).logits_NV)
        for n, chunk in zip(live, chunks, strict=True):
            if chunk.num_logits:
                ids[n].append(int(next(logits).argmax()))
    return [i[len(p) :] for i, p in zip(ids, all_prompts, strict=True)]


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("kv_heads,tie", [(1, True), (2, False), (4, True)])
@pytest.mark.parametrize("slots", [[0, 1, 2, 3, 4], [4, 2, 0, 6, 1], [15, 3, 9, 0, 12]])
@pytest.mark.parametrize("piece", [48, 7])
def test_batched_chunked_cached_text_is_the_models_own(kv_heads, tie, slots, piece, int8):
    model, expected = model_and_its_words(kv_heads=kv_heads, tie=tie, int8=int8)
    assert greedy_step(TorchStep(copy.deepcopy(model), 32), prompts(), 12, slots, piece) == expected


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize(
    "architecture,slots",
    [
        *((architecture, [4, 2, 0, 6, 1]) for architecture in ARCHITECTURES),
        ("mistral window", [0, 1, 2, 3, 4]),  # rows as the cache lies, and rows that are gathered
        ("mistral window", [15, 3, 9, 0, 12]),
    ],
)
def test_every_architecture_says_what_the_model_says(architecture, slots, int8):
    model, expected = model_and_its_words(architecture=architecture, int8=int8)
    assert len({tuple(text) for text in expected}) > 3, "a model that always says the same proves nothing"
    assert greedy_step(TorchStep(copy.deepcopy(model), 32), prompts(), 12, slots, 7) == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_the_models_to_rounding(architecture):
    model, prompt = model_of(**ARCHITECTURES[architecture]), prompts()[3]
    logits = TorchStep(model, 32)([Chunk(1, 0, tuple(prompt), 1)], TABLE).logits_NV
    assert torch.allclose(torch.from_numpy(logits[0]), model(torch.tensor([prompt]))[0, -1], rtol=1e-4, atol=1e-4)


def test_a_used_slot_leaves_nothing_behind():
    model, (short, long) = model_of(), (prompts()[2], prompts()[4])
    step = TorchStep(model, 32)
    greedy_step(step, [long], 5, [0], 48)
    assert greedy_step(step, [short], 12, [0], 48) == [greedy_reference(model, short, 12)]


def test_the_last_position_can_be_used():
    model = model_of()
    prompt = [n % VOCAB for n in range(40)]
    assert greedy_step(TorchStep(model, 32), [prompt], 8, [0], 13) == [greedy_reference(model, prompt, 8)]


def test_chunks_that_want_nothing_give_no_rows():
    assert TorchStep(model_of(), 32)([Chunk(0, 0, (1, 2, 3), 0)], TABLE).logits_NV.shape == (0, VOCAB)


def test_pages_are_bounded_by_memory():
    config = ModelConfig()
    assert page_bytes(config) == 2**17
    narrow = ModelConfig(head_dim=8)  # a value is padded to 16 numbers, a key is not
    assert (page_bytes(narrow), page_bytes(narrow, "int8")) == (8 * 32 * 4 * 24, 8 * 32 * (24 + 8))
    assert fit_pages(config, slots=16, max_bytes=4 * 2**20) == 32
    assert fit_pages(config, slots=2, max_bytes=4 * 2**20) == 16
    with pytest.raises(MachineError, match=r"max_kv_cache_mib to at least 1, or serve\.kv_cache to int8"):
        fit_pages(config, slots=2, max_bytes=2**19)
    assert fit_pages(config, slots=2, max_bytes=2**19, precision="int8") == 15


def test_a_draft_gets_logits_after_each_of_its_ids():
    model, prompt = model_of(), prompts()[3]
    step = TorchStep(model, 32)
    step([Chunk(3, 0, tuple(prompt[:10]), 0)], TABLE)
    logits = step([Chunk(3, 10, tuple(prompt[10:]), 5)], TABLE).logits_NV
    assert torch.allclose(torch.from_numpy(logits), model(torch.tensor([prompt]))[0, -5:], rtol=1e-4, atol=1e-4)


def test_hidden_states_are_the_heads_input():
    model, prompt = model_of(tie=False), prompts()[3]
    step = TorchStep(model, 32)
    output = step([Chunk(2, 0, (7,), 1), Chunk(3, 0, tuple(prompt), 0, wants_hidden=True)], TABLE)
    assert output.hidden_ND.shape == (len(prompt), 64) and output.logits_NV.shape == (1, VOCAB)
    logits = torch.from_numpy(output.hidden_ND) @ model.lm_head.weight.T
    assert torch.allclose(logits, model(torch.tensor([prompt]))[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("architecture", [None, *ARCHITECTURES])
def test_what_graphs_replay_is_what_the_step_computes(architecture, precision):
    """The recorded function and its padded inputs, run as they are: that needs no GPU."""
    model = model_of(**ARCHITECTURES.get(architecture, {}))
    step, padded = TorchStep(model, 32, precision), TorchStep(model, 33, precision)
    prompt = prompts()[4]
    for each in (step, padded):
        each([Chunk(slot, 0, tuple(prompt[: 9 * slot + 3]), 0) for slot in range(3)], TABLE)
    graphs = DecodeGraphs(padded._decode, 32, torch.device("cpu"))
    for at in range(4):
        chunks = [Chunk(slot, 9 * slot + 3 + at, (5 + slot,), 1) for slot in range(3)]
        inputs = torch.from_numpy(graphs.inputs(chunks, TABLE))
        with torch.inference_mode():
            found = padded._decode(inputs)
        assert inputs.shape[0] == 4
        assert np.allclose(found[:3], step(chunks, TABLE).logits_NV, rtol=1e-3, atol=1e-3)


@pytest.fixture
def graphs_on_a_cpu(monkeypatch):
    """torch.cuda's graphs, whose replay runs the recorded function again, from its tensor of inputs to that of its logits.

    Gives the pools that graphs were recorded into.
    """
    pools, calls = [], []

    class Graph:
        def replay(self):
            inputs, logits = self.recorded
            logits.copy_(decode(inputs))

    @contextlib.contextmanager
    def graph(made, pool):
        calls.clear()
        yield
        (made.recorded,) = calls
        pools.append(pool)

    def decode_and_tell(inputs):
        logits = decode(inputs)
        calls.append((inputs, logits))
        return logits

    model = model_of()
    step = TorchStep(model, 33)
    decode = step._decode
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    for name, fake in {
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": lambda each: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph": graph,
        "graph_pool_handle": object,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    step._graphs = DecodeGraphs(decode_and_tell, 32, torch.device("cpu"))
    return model, step, pools


def test_steps_through_graphs_say_what_the_model_says(graphs_on_a_cpu):
    model, step, pools = graphs_on_a_cpu
    of_page_0 = int(np.argwhere(TABLE == 0)[0, 0])  # where padding would write, were it not told better
    slots = [of_page_0, *(slot for slot in (4, 2, 0, 6, 1) if slot != of_page_0)][:5]
    assert greedy_step(step, prompts()[::-1], 12, slots, 7) == [greedy_reference(model, p, 12) for p in prompts()[::-1]]
    assert set(step._graphs._recorded) <= {(rows, 4 + pages) for rows in (1, 2, 4, 8) for pages in (1, 2)}
    assert len(pools) == len(step._graphs._recorded) > 2 and len(set(pools)) == 1


@pytest.mark.parametrize("kv", ["fp32", "int8"])
@pytest.mark.parametrize("half", ["float16", "bfloat16"])
@pytest.mark.parametrize("architecture", [None, *ARCHITECTURES])
def test_half_weights_say_nearly_the_same(architecture, half, kv):
    """As on a GPU, but on a CPU: prompts in pieces, then single rows as graphs record them."""
    model, prompt = model_of(**ARCHITECTURES.get(architecture, {})), prompts()[4]
    halved = copy.deepcopy(model)
    _halve(halved, {"torch_dtype": half})
    outputs = []
    for step in (TorchStep(model, 33, kv), TorchStep(halved, 33, kv)):
        first = step([Chunk(1, 0, tuple(prompt[:20]), 1)], TABLE).logits_NV
        second = step([Chunk(1, 20, tuple(prompt[20:]), 10)], TABLE).logits_NV
        inputs = DecodeGraphs(step._decode, 32, torch.device("cpu")).inputs([Chunk(1, 30, (3,), 1)], TABLE)
        with torch.inference_mode():
            single = step._decode(torch.from_numpy(inputs)).numpy()
        outputs.append(np.concatenate([first, second, single]))
    expected, found = outputs
    assert found.dtype == np.float32
    assert min(np.corrcoef(a, b)[0, 1] for a, b in zip(expected, found, strict=True)) > 0.93


def test_only_whole_weights_are_halved():
    model, quantized = model_of(), model_of(int8=True)
    _halve(model, {"torch_dtype": "bfloat16"})
    assert {each.dtype for each in model.parameters()} == {torch.bfloat16} and model.cos_TC.dtype == torch.float32
    _halve(quantized, {"torch_dtype": "bfloat16", "quantization": {"method": "int8"}})
    assert not any(each.dtype == torch.bfloat16 for each in quantized.state_dict().values())


def test_matrices_that_were_joined_are_given_back():
    model = model_of()
    single = weakref.ref(model.model.layers[0].self_attn.q_proj)
    step = TorchStep(model, 32)
    del model
    gc.collect()
    assert single() is None and step.vocab_size == VOCAB


def test_an_int8_cache_rounds_keys_and_values_and_no_more():
    model, prompt = model_of(), prompts()[4]
    chunks = [Chunk(1, 0, tuple(prompt), 1)]
    exact, rounded = (TorchStep(model, 32, kv)(chunks, TABLE).logits_NV for kv in ("fp32", "int8"))
    assert 0 < np.abs(exact - rounded).max() < 0.1 * np.abs(exact).max()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_on_a_gpu_say_what_the_cpu_says(dtype):
    model, expected = model_and_its_words()
    step = TorchStep(copy.deepcopy(model).to("cuda", dtype), 32)
    found = greedy_step(step, prompts(), 12, [0, 1, 2, 3, 4], 7)
    same = sum(ours == theirs for ours, theirs in zip(found, expected, strict=True))
    assert same == len(expected) if dtype == torch.float32 else same > 1
    assert step._graphs._recorded
