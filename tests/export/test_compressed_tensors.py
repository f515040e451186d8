import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from raymill.errors import UsageError
from raymill.export.formats import export
from raymill.export.source import read_source

ROTARY = ["llama", "mistral", "qwen2", "qwen3"]


def test_int8_keeps_integers_and_scales(tmp_path, checkpoint):
    folder = checkpoint("llama", "int8")
    export(folder, "compressed_tensors", tmp_path / "out", "bf16")
    theirs, ours = load_file(tmp_path / "out" / "model.safetensors"), load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(theirs[name], ours[name]) and torch.equal(theirs[f"{name}_scale"], ours[f"{name}_scale"])
    assert theirs["model.embed_tokens.weight"].dtype == torch.bfloat16, "nobody multiplies a quantized embedding"
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (settings["format"], settings["ignore"]) == ("int-quantized", ["lm_head"])
    assert settings["config_groups"]["group_0"]["input_activations"]["strategy"] == "token"


@pytest.mark.parametrize(("architecture", "method"), [("gpt2", "int8"), ("llama", "fp32")])
def test_what_it_cannot_hold_is_refused(tmp_path, checkpoint, architecture, method):
    with pytest.raises(UsageError, match="cannot hold"):
        export(checkpoint(architecture, method), "compressed_tensors", tmp_path / "out")


def quantizing_as_they_do(module, given):
    """Activations per token over 255 steps: compressed-tensors divides by 127.5 where we and vLLM divide by 127."""
    x = given[0]
    scale = x.abs().amax(-1, keepdim=True) / 127.5
    return (torch.clamp(torch.round(x / scale), -128, 127) * scale,)


def test_transformers_gives_the_logits_and_text_of_the_format(tmp_path, checkpoint, tokenizer, greedy, peer):
    transformers = pytest.importorskip("transformers")
    prompt = tokenizer.encode("The quick brown")
    jobs, ours = [], []
    for architecture in ROTARY:
        for method in ("int8", "int4"):
            folder, out = checkpoint(architecture, method), tmp_path / f"{architecture}-{method}"
            export(folder, "compressed_tensors", out)
            export(folder, "hugging_face", tmp_path / f"{out.name}-wide")
            wide = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"{out.name}-wide").eval()
            if method == "int8":
                for part in wide.model.layers.modules():
                    if isinstance(part, torch.nn.Linear):
                        part.register_forward_pre_hook(quantizing_as_they_do)
            with torch.no_grad():
                logits = wide(torch.tensor([prompt])).logits[0].numpy()
                made = greedy(lambda ids, model=wide: model(ids).logits, prompt, 8)
            jobs.append({"folder": str(out), "prompt": prompt, "count": 8})
            ours.append((out.name, logits, made))
    for (name, logits, made), theirs in zip(ours, peer("run_compressed", jobs), strict=True):
        difference = np.abs(np.array(theirs["logits"]) - logits).max()
        print(f"{name}: {difference:.1e}")
        assert difference < 1e-4 and theirs["made"] == made, (name, difference)
        assert len(theirs["quantized"]) == 2 * 7, "every matrix of the blocks, not the head"


def test_four_bits_are_packed_lowest_first(tmp_path, checkpoint):
    folder = checkpoint("qwen3", "int4")
    export(folder, "compressed_tensors", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    words = stored[f"{name}.weight_packed"].numpy().view(np.uint32)
    values = (
        np.stack([(words >> 4 * place) & 15 for place in range(8)], axis=-1).reshape(len(words), -1).astype(int) - 8
    )
    assert np.array_equal(values, read_source(folder).weights[f"{name}.weight"].values_NK.numpy())
    assert stored[f"{name}.weight_shape"].tolist() == list(values.shape)
