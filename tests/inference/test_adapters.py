import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from raymill.compression.quantize import quantize_model, save_quantized
from raymill.errors import ArtifactError
from raymill.inference import native
from raymill.inference.adapters import load_adapter
from raymill.inference.engine import BatchingEngine
from raymill.inference.native_step import NativeStep
from raymill.inference.requests import Request
from raymill.inference.sampling import Sampling
from raymill.inference.step import Chunk
from raymill.inference.torch_step import TorchStep
from raymill.model.config import ModelConfig
from raymill.model.transformer import Transformer
from raymill.model.weights import save_model

VOCAB = 61
SHAPE = {"num_layers": 2, "model_dim": 64, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 96, "max_seq_len": 64}
CONFIG = ModelConfig(**SHAPE)
WIDTHS = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)}
WIDTHS |= {"gate_proj": (96, 64), "up_proj": (96, 64), "down_proj": (64, 96)}
TABLE = np.arange(8, dtype=np.int32).reshape(4, 2)
IDS = tuple(range(3, 40))


def a_model(**settings):
    model = Transformer(ModelConfig(**{**SHAPE, **settings}), VOCAB)
    model.initialize(seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.ndim > 1 else 1)
    return model.requires_grad_(False).eval()


def write_adapter(folder, *, targets=tuple(WIDTHS), rank=4, seed=0, kind=torch.float32, layers=(0, 1), **settings):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in layers:
        for target in targets:
            outputs, inputs = WIDTHS[target]
            part = "mlp" if target in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            name = f"base_model.model.model.layers.{layer}.{part}.{target}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(rank, inputs, generator=generator).mul(0.1).to(kind)
            tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, rank, generator=generator).mul(0.3).to(kind)
    folder.mkdir(exist_ok=True)
    written = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": list(targets), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**written, **settings}))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def merged(model, adapter):
    model = copy.deepcopy(model)
    for name, (a, b) in adapter.tensors.items():
        model.get_submodule(name).weight += adapter.scale * torch.from_numpy(b) @ torch.from_numpy(a)
    return model


def logits_of(step, *adapters):
    """Last logits of the same ids under each adapter, in one step."""
    chunks = [Chunk(slot, 0, IDS, 1, adapter) for slot, adapter in enumerate(adapters)]
    return np.array(step(chunks, TABLE).logits_NV)


@pytest.mark.parametrize("settings", [{}, {"architecture": "qwen2"}, {"architecture": "gpt2", "num_kv_heads": 4}])
@pytest.mark.parametrize("kind", ["torch", "native"])
def test_every_row_has_its_own_adapter_and_says_what_merged_weights_say(tmp_path, settings, kind):
    model = a_model(**settings)
    targets, first = tuple(WIDTHS), {}
    if settings.get("architecture") == "gpt2":
        targets = ("q_proj", "o_proj", "up_proj", "down_proj")
    wide = load_adapter(write_adapter(tmp_path / "a", targets=targets, use_rslora=True), model.config)
    narrow = load_adapter(write_adapter(tmp_path / "b", targets=("q_proj",), rank=2, seed=5, layers=(1,)), model.config)
    assert (wide.scale, narrow.scale) == (4.0, 4.0)
    if kind == "torch":
        step = TorchStep(copy.deepcopy(model), 8)
    else:
        if native.library() is None:
            pytest.skip("no C++ compiler")
        save_model(tmp_path, model, 0)
        step = NativeStep.load(tmp_path, num_pages=8, kv_precision="fp32", threads=1)
    first = [step.load_adapter(each.tensors, each.scale) for each in (wide, narrow)]
    assert first == [1, 2]
    found = logits_of(step, 0, 2, 1)
    for row, expected in zip(found, (model, merged(model, narrow), merged(model, wide)), strict=True):
        assert np.allclose(row, expected(torch.tensor([IDS]))[0, -1], atol=2e-3, rtol=1e-3)
    assert np.abs(found[0] - found[1]).max() > 0.05 and np.abs(found[0] - found[2]).max() > 0.05


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_halves_are_read_as_they_are(tmp_path, kind):
    whole = load_adapter(write_adapter(tmp_path / "whole"), CONFIG)
    half = load_adapter(write_adapter(tmp_path / "half", kind=kind), CONFIG)
    for name, pair in whole.tensors.items():
        for ours, theirs in zip(pair, half.tensors[name], strict=True):
            assert np.array_equal(torch.from_numpy(ours).to(kind).float().numpy(), theirs)


@pytest.mark.parametrize(
    "settings,says",
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is [1, 2]"),
        ({"r": 0}, "r is 0"),
        ({"r": True}, "r is True"),
        ({"r": 3}, "needed are A"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"lora_alpha": "8"}, "lora_alpha is '8'"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused_by_name(tmp_path, settings, says):
    with pytest.raises(ArtifactError, match="hint: ") as refused:
        load_adapter(write_adapter(tmp_path / "a", **settings), CONFIG) if "r" not in settings else load_adapter(
            changed(write_adapter(tmp_path / "a"), **settings), CONFIG
        )
    assert says in str(refused.value)


def changed(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def test_files_that_are_not_whole_or_of_another_model_are_refused(tmp_path):
    def refusal(change, config=CONFIG):
        folder = write_adapter(tmp_path / "a")
        change(folder)
        with pytest.raises(ArtifactError, match="hint: ") as refused:
            load_adapter(folder, config)
        return str(refused.value)

    def save(folder, name, tensor):
        save_file({name: tensor}, folder / "adapter_model.safetensors")

    name = "base_model.model.model.layers.0.self_attn.q_proj"
    assert "no adapter" in refusal(lambda folder: (folder / "adapter_config.json").unlink())
    assert "cannot be used" in refusal(lambda folder: (folder / "adapter_config.json").write_text("[" * 9))
    assert "missing" in refusal(lambda folder: (folder / "adapter_model.safetensors").unlink())
    assert "damaged" in refusal(lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\xff" * 99))
    assert "types" in refusal(
        lambda folder: save(folder, f"{name}.lora_A.weight", torch.ones(4, 64, dtype=torch.int32))
    )
    assert "needed are A" in refusal(lambda folder: save(folder, f"{name}.lora_A.weight", torch.ones(4, 64)))
    assert "no part of LoRA" in refusal(lambda folder: save(folder, f"{name}.weight", torch.ones(4, 64)))
    lost = f"{name.replace('layers.0', 'layers.7')}.lora_A.weight"
    assert "no matrix of this model" in refusal(lambda folder: save(folder, lost, torch.ones(4, 64)))
    wide = ModelConfig(**{**SHAPE, "hidden_dim": 128})
    assert "name an adapter of this checkpoint" in refusal(lambda folder: None, wide)

    def spoil(folder):
        tensors = {f"{name}.lora_A.weight": torch.full((4, 64), torch.nan), f"{name}.lora_B.weight": torch.ones(64, 4)}
        save_file(tensors, folder / "adapter_model.safetensors")

    assert "not finite" in refusal(spoil)


def test_adapters_are_asked_for_by_name_and_share_no_pages(tmp_path):
    model = a_model()
    adapter = load_adapter(write_adapter(tmp_path / "a"), CONFIG)

    class Ids:
        def push(self, token):
            return chr(0x100 + token)

        def finish(self):
            return ""

    def texts(step_model, adapters, names):
        step = TorchStep(copy.deepcopy(step_model), 16)
        engine = BatchingEngine(step, Ids, num_slots=4, max_queued=4, max_step_tokens=64, adapters=adapters)
        found = []
        for n, name in enumerate(names):
            wanted = Request(str(n), IDS, 8, Sampling(temperature=0), adapter=name)
            found.append("".join(e.text for batch in engine.submit(wanted) for e in batch))
        known = engine.adapters
        engine.close()
        return found, known

    (plain, added, again), known = texts(model, {"tuned": adapter}, [None, "tuned", None])
    assert known == ("tuned",) and plain == again
    assert texts(merged(model, adapter), None, [None])[0] == [added] != [plain]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["torch", "native"])
def test_an_adapter_that_peft_made_gives_what_peft_gives(tmp_path, kind):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = a_model()
    save_model(tmp_path / "model", model, 0) if (tmp_path / "model").mkdir() is None else None
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    settings = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"], use_rslora=True)
    tuned = peft.get_peft_model(theirs, settings)
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    adapter = load_adapter(tmp_path / "adapter", CONFIG)
    if kind == "native":
        if native.library() is None:
            pytest.skip("no C++ compiler")
        step = NativeStep.load(tmp_path / "model", num_pages=8, kv_precision="fp32", threads=1)
    else:
        step = TorchStep(model, 8)
    number = step.load_adapter(adapter.tensors, adapter.scale)
    with torch.no_grad():
        expected = tuned.eval()(torch.tensor([IDS])).logits[0, -1]
    assert np.allclose(logits_of(step, number)[0], expected, atol=2e-3, rtol=1e-3)
    assert not np.allclose(logits_of(step, 0)[0], expected, atol=0.05)


def test_an_adapter_beside_int8_weights(tmp_path):
    model = a_model()
    quantize_model(model)
    save_quantized(tmp_path, model, 0)
    adapter = load_adapter(write_adapter(tmp_path / "a"), CONFIG)
    steps = [TorchStep(model, 8)]
    if native.library() is not None:
        steps.append(NativeStep.load(tmp_path, num_pages=8, kv_precision="fp32", threads=1))
    found = [logits_of(step, step.load_adapter(adapter.tensors, adapter.scale)) for step in steps]
    assert all(np.allclose(found[0], each, atol=0.02) for each in found)
