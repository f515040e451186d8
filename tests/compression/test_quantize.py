import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from raymill.compression import int8
from raymill.compression.format import Quantization
from raymill.compression.int8 import Int8Linear, quantize_rows
from raymill.compression.quantize import load_served_model, quantize_model, save_quantized
from raymill.errors import ArtifactError, UsageError
from raymill.model.weights import save_model


def test_a_row_is_at_most_half_a_step_from_its_int8_values():
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1e-6], [1.0], [50.0], [1e4], [0.0]]
    )
    values, scale = quantize_rows(x)
    assert values.dtype == torch.int8 and values[:4].abs().amax(-1).tolist() == [127] * 4, "the whole range is used"
    assert bool(((values * scale - x).abs() <= scale * 0.5001).all())
    assert bool((values[4] == 0).all()), "zeros stay zeros"


def test_the_layer_is_close_to_full_precision_and_blind_to_its_neighbours():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(48, 64, generator=generator), torch.randn(9, 64, generator=generator)
    layer = Int8Linear(*quantize_rows(weight))
    y = layer(x)
    assert float((y - x @ weight.t()).norm() / (x @ weight.t()).norm()) < 0.02
    alone = torch.cat([layer(x[row : row + 1]) for row in range(9)])
    assert torch.equal(alone, y), "one token's result must not depend on the batch"


def test_without_vnni_the_same_integers_are_multiplied(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    layer = Int8Linear(*quantize_rows(torch.randn(48, 64, generator=generator)))
    x = torch.randn(3, 64, generator=generator)
    fast = layer(x)
    monkeypatch.setattr(int8, "has_int8_products", lambda device: False)
    assert torch.allclose(layer(x), fast, rtol=1e-6, atol=1e-7)


def test_without_int8_products_wide_sums_are_exact_too(monkeypatch):
    """Above 2^24 fp32 rounds, and then by the order of the additions, which is not the same for one row and for many."""
    monkeypatch.setattr(int8, "has_int8_products", lambda device: False)
    generator = torch.Generator().manual_seed(4)
    x = torch.randint(100, 128, (5, 5000), generator=generator, dtype=torch.int8)
    weight = torch.randint(100, 128, (7, 5000), generator=generator, dtype=torch.int8)
    exact = x.long() @ weight.long().t()
    assert exact.min() > 2**25
    found = Int8Linear(weight, torch.ones(7, 1))._product(x)
    assert torch.equal(found.long(), exact)


def test_a_bias_is_added_after_the_product():
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = torch.randn(48, 64, generator=generator), torch.arange(48.0), torch.randn(9, 64)
    plain, biased = Int8Linear(*quantize_rows(weight)), Int8Linear(*quantize_rows(weight), bias)
    assert torch.equal(biased(x), plain(x) + bias)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_a_saved_model_comes_back_bit_for_bit_at_a_quarter_of_the_size(tmp_path, tie, architecture, small_model):
    model = small_model(architecture, tie_embeddings=tie)
    full, packed = tmp_path / "full", tmp_path / "packed"
    full.mkdir(), packed.mkdir()
    save_model(full, model, end_id=0)
    ids = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    reference = model(ids)
    quantize_model(model)
    save_quantized(packed, model, end_id=0)
    loaded = load_served_model(packed)
    assert torch.equal(loaded(ids), model(ids))
    assert float((loaded(ids) - reference).norm() / reference.norm()) < 0.05
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (full, packed)]
    assert sizes[0] / sizes[1] > (2 if architecture == "gpt2" else 3), "learned positions stay as they are"
    assert json.loads((packed / "config.json").read_text())["quantization"]["method"] == "int8"
    names = load_file(packed / "model.safetensors")
    assert ("lm_head.weight" in names) is not tie
    assert names["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("tie", [True, False])
def test_int4_comes_back_bit_for_bit_with_embedding_and_head_int8(tmp_path, tie, architecture, small_model):
    model = small_model(architecture, tie_embeddings=tie)
    ids = torch.randint(0, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    reference = model(ids)
    int4 = Quantization("int4", 32)
    quantize_model(model, int4)
    save_quantized(tmp_path, model, 0, int4)
    loaded = load_served_model(tmp_path)
    assert torch.equal(loaded(ids), model(ids))
    assert 0.005 < float((loaded(ids) - reference).norm() / reference.norm()) < 0.2
    quantization = json.loads((tmp_path / "config.json").read_text())["quantization"]
    assert (quantization["method"], quantization["group_size"]) == ("int4", 32)
    tensors = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in tensors) is not tie
    assert tensors["model.embed_tokens.weight"].dtype == torch.int8
    down = [tensors[f"model.layers.0.mlp.down_proj.{part}"] for part in ("weight", "weight_scale")]
    assert [(each.dtype, tuple(each.shape)) for each in down] == [
        (torch.uint8, (64, 48)),
        (torch.float16, (64, 3)),
    ]


def test_shards_are_one_model(tmp_path, small_model):
    model = small_model("llama")
    quantize_model(model)
    save_quantized(tmp_path, model, 0)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    places = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(sorted(tensors))}
    for place in set(places.values()):
        save_file({name: each for name, each in tensors.items() if places[name] == place}, tmp_path / place)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    ids = torch.arange(20)[None]
    assert torch.equal(load_served_model(tmp_path)(ids), model(ids))


@pytest.mark.parametrize("quantization", [Quantization("int8"), Quantization("int4", 32)], ids=lambda q: q.method)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_calibration_brings_the_model_nearer_to_full_precision(small_model, calibration, quantization, architecture):
    told, errors = [], []
    ids = torch.randint(0, 300, (4, 32), generator=torch.Generator().manual_seed(9))
    whole = small_model(architecture)
    reference = states(whole, ids)
    for measured in (None, calibration):
        model = small_model(architecture)
        quantize_model(model, quantization, measured, lambda done, of: told.append((done, of)))
        errors.append(float((states(model, ids) - reference).norm()))
    assert errors[1] < errors[0]
    assert told == [(1, 2), (2, 2)] * 2


def states(model, ids):
    """What the blocks make of the embeddings of the whole model."""
    x = torch.nn.functional.embedding(ids, torch.randn(300, 64, generator=torch.Generator().manual_seed(3)))
    return model.run_blocks(x)


def test_groups_that_do_not_divide_the_model_leave_it_as_it_was(small_model):
    model = small_model()
    with pytest.raises(UsageError, match="groups of 64"):
        quantize_model(model, Quantization("int4", 64))
    assert isinstance(model.lm_head, torch.nn.Linear)


def test_a_full_precision_checkpoint_loads_too(tmp_path, small_model):
    model = small_model()
    save_model(tmp_path, model, end_id=0)
    ids = torch.arange(10)[None]
    assert torch.equal(load_served_model(tmp_path)(ids), model(ids))


@pytest.mark.parametrize(
    "damage",
    [
        lambda t: t.pop("model.layers.1.self_attn.q_proj.weight"),
        lambda t: t.pop("model.layers.1.self_attn.q_proj.weight_scale"),
        lambda t: t.pop("model.norm.weight"),
        lambda t: t.update({"model.norm.weight": torch.ones(3)}),
        lambda t: t.update({"model.embed_tokens.weight": torch.ones(3, 3, dtype=torch.int8)}),
        lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"].float()}),
        lambda t: t["model.layers.0.mlp.up_proj.weight_scale"].fill_(float("nan")),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(tmp_path, damage, small_model):
    model = small_model()
    quantize_model(model)
    save_quantized(tmp_path, model, end_id=0)
    tensors = load_file(tmp_path / "model.safetensors")
    damage(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ArtifactError, match="does not match"):
        load_served_model(tmp_path)


def test_groups_that_do_not_divide_the_matrices_of_a_checkpoint_are_the_checkpoints_fault(tmp_path, small_model):
    model = small_model()
    quantize_model(model, Quantization("int4"))
    save_quantized(tmp_path, model, 0, Quantization("int4"))
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "intermediate_size": 100}))
    with pytest.raises(ArtifactError, match=r"does not match(.|\n)*do not divide"):
        load_served_model(tmp_path)


def test_an_unknown_quantization_is_refused(tmp_path, small_model):
    save_model(tmp_path, small_model(), end_id=0)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "quantization": {"method": "int3"}}))
    with pytest.raises(ArtifactError, match="int3"):
        load_served_model(tmp_path)
