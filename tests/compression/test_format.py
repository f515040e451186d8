import pytest

from raymill.compression.format import Quantization, read_quantization
from raymill.errors import ArtifactError, UsageError
from raymill.model.config import ModelConfig


@pytest.mark.parametrize("quantization", [Quantization("int8"), Quantization("int4", 32), Quantization("int4", 128)])
def test_what_is_written_is_read(quantization):
    assert read_quantization({"quantization": quantization.to_json()}, "config.json") == quantization


def test_weights_of_a_floating_type_name_no_quantization():
    assert read_quantization({"torch_dtype": "float16"}, "config.json") is None


@pytest.mark.parametrize("found", [{"method": "int3"}, {"bits": 4}, "awq", ["int8"], {"method": None}])
def test_an_unknown_quantization_is_refused_with_what_is_known(found):
    with pytest.raises(ArtifactError, match=r"config\.json names quantization") as refused:
        read_quantization({"quantization": found}, "config.json")
    assert "int8 and int4" in str(refused.value)


@pytest.mark.parametrize("size", [None, 0, 33, "32", True, 256])
def test_unknown_groups_are_refused_with_what_is_known(size):
    with pytest.raises(ArtifactError, match="int4 groups of") as refused:
        read_quantization({"quantization": {"method": "int4", "group_size": size}}, "config.json")
    assert "32, 64, 128" in str(refused.value)


@pytest.mark.parametrize(
    ("shape", "fix"),
    [
        ({"model_dim": 160, "hidden_dim": 256}, "set compress.group_size to 32"),
        ({"model_dim": 64, "hidden_dim": 100}, "set compress.method to int8"),
    ],
)
def test_groups_that_do_not_divide_the_model_are_refused_with_those_that_do(shape, fix):
    config = ModelConfig(num_heads=4, num_kv_heads=2, **shape)
    with pytest.raises(UsageError, match="do not divide the model's") as refused:
        Quantization("int4", 64).check_fits(config)
    assert fix in str(refused.value)
    Quantization("int8").check_fits(config)


def test_sums_that_would_not_fit_32_bits_are_refused():
    config = ModelConfig(model_dim=64, num_heads=4, num_kv_heads=2, hidden_dim=200_000)
    with pytest.raises(UsageError, match="hidden_dim 200000 do not fit"):
        Quantization("int8").check_fits(config)
