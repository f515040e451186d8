import pytest
import torch

from raymill.compression.quantize import load_served_model
from raymill.compression.shrink import shrink
from raymill.errors import UsageError
from raymill.model.files import read_config
from raymill.model.weights import save_model


def inputs_of(model, calibration, name):
    """What layers' matrices of this name read, layer by layer."""
    seen = []
    hooks = [
        block.get_submodule(name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
        for block in model.model.layers
    ]
    model(calibration.ids_ST, calibration.documents_ST)
    for hook in hooks:
        hook.remove()
    return seen


def zero_the_least(model, calibration, name, width, count):
    """Zeroes the columns of each `name` whose slices of `width` bring the least, all but `count` of them."""
    for block, x in zip(model.model.layers, inputs_of(model, calibration, name), strict=True):
        weight = block.get_submodule(name).weight
        slices = list(torch.arange(weight.shape[1]).split(width))
        brought = [float((x[:, at] @ weight[:, at].t()).double().square().sum()) for at in slices]
        for index in sorted(range(len(slices)), key=brought.__getitem__)[: len(slices) - count]:
            weight[:, slices[index]] = 0.0


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral"])
def test_fewer_heads_are_the_model_with_the_least_at_zero(small_model, calibration, architecture):
    whole = small_model(architecture, num_heads=8, num_kv_heads=4)
    small = shrink(whole, "heads", 0.5, calibration)
    config = small.config
    assert (config.num_heads, config.num_kv_heads, config.head_width) == (4, 2, whole.config.head_width)
    zero_the_least(whole, calibration, "self_attn.o_proj", 2 * config.head_width, 2)
    assert torch.allclose(small(calibration.ids_ST), whole(calibration.ids_ST), atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_fewer_neurons_are_the_model_with_the_least_at_zero(small_model, calibration, architecture):
    whole = small_model(architecture)
    small = shrink(whole, "neurons", 0.3, calibration)
    assert small.config.hidden_dim == 64, "96 less 30 %, in steps of 32"
    zero_the_least(whole, calibration, "mlp.down_proj", 1, 64)
    assert torch.allclose(small(calibration.ids_ST), whole(calibration.ids_ST), atol=1e-5)


def test_fewer_layers_are_the_model_without_those_that_turn_least(small_model, calibration):
    whole = small_model(num_layers=4)
    for number in (1, 2):  # they add next to nothing
        whole.model.layers[number].self_attn.o_proj.weight.mul_(1e-3)
        whole.model.layers[number].mlp.down_proj.weight.mul_(1e-3)
    small = shrink(whole, "layers", 0.5, calibration)
    for number in (1, 2):
        whole.model.layers[number].self_attn.o_proj.weight.zero_()
        whole.model.layers[number].mlp.down_proj.weight.zero_()
    assert small.config.num_layers == 2
    assert torch.allclose(small(calibration.ids_ST), whole(calibration.ids_ST), atol=1e-5)


@pytest.mark.parametrize("part", ["heads", "neurons", "layers"])
def test_the_result_is_an_ordinary_checkpoint(small_model, calibration, tmp_path, part):
    small = shrink(small_model("qwen3"), part, 0.5, calibration)
    save_model(tmp_path, small, end_id=0)
    values = read_config(tmp_path)
    shape = [values[name] for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")]
    heads = {"heads": (2, 2, 1, 32), "neurons": (2, 4, 2, 32), "layers": (1, 4, 2, 32)}[part]
    assert tuple(shape) == heads and values["intermediate_size"] == (64 if part == "neurons" else 96)
    assert "quantization" not in values
    ids = calibration.ids_ST
    assert torch.equal(load_served_model(tmp_path)(ids), small(ids))


@pytest.mark.parametrize(
    ("architecture", "settings", "part", "share", "why"),
    [
        ("gpt2", {}, "heads", 0.5, "gpt2 cannot lose heads"),
        ("llama", {"num_heads": 8, "num_kv_heads": 8}, "heads", 0.3, "cannot have 6 heads"),
        ("llama", {}, "heads", 0.1, "10% of 2 key-value heads is none of them"),
        ("llama", {}, "neurons", 0.1, "10% of 96 neurons is none of them"),
        ("llama", {"num_layers": 1}, "layers", 0.9, "90% of 1 layers is none of them"),
    ],
)
def test_what_cannot_go_is_refused(small_model, calibration, architecture, settings, part, share, why):
    with pytest.raises(UsageError, match=why):
        shrink(small_model(architecture, **settings), part, share, calibration)
