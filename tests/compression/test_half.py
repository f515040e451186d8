import json

import pytest
import torch
from safetensors.torch import load_file

from raymill.compression.half import save_half
from raymill.compression.quantize import load_served_model
from raymill.errors import QualityError


@pytest.mark.parametrize(
    ("precision", "dtype", "named", "near"),
    [("fp16", torch.float16, "float16", 2**-11), ("bf16", torch.bfloat16, "bfloat16", 2**-8)],
)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_weights_are_cast_named_and_widened_as_they_are_read(
    small_model, tmp_path, architecture, precision, dtype, named, near
):
    model = small_model(architecture)
    save_half(tmp_path, model, 0, precision)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == named
    loaded = dict(load_served_model(tmp_path).named_parameters())
    for name, weight in model.named_parameters():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], weight.to(dtype).float())
        assert torch.allclose(loaded[name], weight, rtol=near, atol=1e-7)


def test_a_weight_beyond_fp16_is_refused_with_its_name(small_model, tmp_path):
    model = small_model()
    model.model.layers[1].mlp.up_proj.weight[3, 5] = 1e5
    with pytest.raises(QualityError, match=r"layers\.1\.mlp\.up_proj\.weight does not fit into fp16") as refused:
        save_half(tmp_path, model, 0, "fp16")
    assert "bf16" in str(refused.value)
    assert not (tmp_path / "model.safetensors").exists()
    save_half(tmp_path, model, 0, "bf16")
