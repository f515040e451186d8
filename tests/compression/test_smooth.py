import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from raymill.compression.format import Quantization
from raymill.compression.quantize import INT8, load_served_model, quantize_model, save_quantized
from raymill.errors import ArtifactError
from raymill.inference import native
from raymill.inference.loading import load_step
from raymill.inference.step import Chunk
from raymill.model.weights import save_model

ENGINES = ["torch", pytest.param("native", marks=pytest.mark.skipif(native.library() is None, reason="no compiler"))]
IDS = tuple(range(5, 25))


@pytest.fixture
def uneven(small_model):
    """Builds a model whose head reads a few channels 50 times as large as the others."""

    def build(architecture, **settings):
        model = small_model(architecture, tie_embeddings=False, **settings)
        with torch.no_grad():
            model.model.norm.weight[::16] *= 50
            model.lm_head.weight[:, ::16] /= 50
        return model

    return build


def error_of(model, reference):
    ids = torch.tensor([IDS])
    return float((model(ids) - reference).norm() / reference.norm())


def hidden_of(folder, engine):
    step = load_step(folder, engine, "cpu", 4, "fp32", 1)
    return np.array(step([Chunk(0, 0, IDS, 0, wants_hidden=True)], np.arange(4, dtype=np.int32)[None]).hidden_ND)


def save(folder, model, quantization=INT8):
    folder.mkdir()
    save_quantized(folder, model, 0, quantization)
    return folder


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_channels_of_uneven_size_no_longer_take_each_others_steps(architecture, uneven, calibration):
    model = uneven(architecture)
    reference = model(torch.tensor([IDS]))
    quantize_model(model, calibration=calibration)
    plain = uneven(architecture)
    quantize_model(plain)
    assert error_of(model, reference) < 0.4 * error_of(plain, reference)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_hidden_states_leave_both_engines_as_full_precision_has_them(
    tmp_path, architecture, engine, uneven, calibration
):
    model = uneven(architecture)
    (tmp_path / "full").mkdir()
    save_model(tmp_path / "full", model, end_id=0)
    wanted = hidden_of(tmp_path / "full", engine)
    quantize_model(model, calibration=calibration)
    found = hidden_of(save(tmp_path / "packed", model), engine)
    assert np.linalg.norm(found - wanted) < 0.05 * np.linalg.norm(wanted)


def test_it_comes_back_bit_for_bit_and_a_tied_head_has_none(tmp_path, uneven, small_model, calibration):
    ids = torch.tensor([IDS])
    for number, model in enumerate((uneven("llama"), small_model("llama", tie_embeddings=True))):
        quantize_model(model, Quantization("int4"), calibration)
        folder = save(tmp_path / str(number), model, Quantization("int4"))
        assert torch.equal(load_served_model(folder)(ids), model(ids))
        assert ("lm_head.input_scale" in load_file(folder / "model.safetensors")) is (number == 0)


def test_a_channel_that_is_always_zero_does_no_harm(uneven, calibration):
    model = uneven("llama")
    with torch.no_grad():
        model.model.norm.weight[5] = 0
        model.lm_head.weight[:, 7] = 0
    reference = model(torch.tensor([IDS]))
    quantize_model(model, calibration=calibration)
    assert error_of(model, reference) < 0.05
    assert bool((model.lm_head.input_scale > 0).all())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("wrong", [torch.ones(3), torch.full((64,), torch.nan), torch.ones(64, dtype=torch.float16)])
def test_factors_that_do_not_fit_are_refused(tmp_path, engine, wrong, uneven, calibration):
    model = uneven("llama")
    quantize_model(model, calibration=calibration)
    file = save(tmp_path / "packed", model) / "model.safetensors"
    save_file({**load_file(file), "lm_head.input_scale": wrong}, file)
    with pytest.raises(ArtifactError, match="input_scale"):
        load_step(file.parent, engine, "cpu", 4, "fp32", 1)
