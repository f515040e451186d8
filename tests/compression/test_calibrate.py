import numpy as np
import pytest
import torch

from raymill.compression.calibrate import Walk, read_calibration
from raymill.compression.format import Quantization
from raymill.compression.quantize import quantize_model
from raymill.dataset.shards import INDEX, ShardEntry, ShardIndex, TokenStream
from raymill.errors import DataError, QualityError


@pytest.fixture
def tokens(tmp_path):
    ids = np.arange(1000, dtype="<u2") % 50
    shards = []
    for split in ("train", "val"):
        ids.tofile(tmp_path / f"{split}-00000.bin")
        shards.append(ShardEntry(path=f"{split}-00000.bin", split=split, documents=20, tokens=1000, text_bytes=4000))
    index = ShardIndex(dtype="uint16", vocab_size=50, end_of_document_id=0, shards=tuple(shards))
    (tmp_path / INDEX).write_text(index.model_dump_json())
    return tmp_path


def test_sequences_are_spread_over_the_train_split_with_their_documents(tokens):
    calibration = read_calibration(TokenStream(tokens, "train"), 4, 20)
    assert calibration.ids_ST[:, 0].tolist() == [0, 240 % 50, 500 % 50, 740 % 50]
    assert calibration.documents_ST[1].tolist() == [0] * 10 + [1] * 10


def test_held_out_text_is_never_calibrated_on(tokens):
    with pytest.raises(AssertionError):
        read_calibration(TokenStream(tokens, "val"), 4, 20)


def test_a_short_split_gives_what_it_has_and_an_empty_one_is_refused(tokens):
    stream = TokenStream(tokens, "train")
    assert read_calibration(stream, 100, 300).ids_ST.shape == (3, 300)
    with pytest.raises(DataError, match="no calibration sequence"):
        read_calibration(stream, 4, 2000)


def test_moments_are_of_what_each_layer_reads_in_the_whole_model(small_model, calibration):
    model = small_model("qwen3")
    seen = {}
    names = ("self_attn.k_proj", "self_attn.o_proj", "mlp.down_proj")
    for name in names:
        layer = model.model.layers[1].get_submodule(name)
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0].flatten(0, 1)}))
    model(calibration.ids_ST, calibration.documents_ST)
    whole = dict(seen)
    walk = Walk(model, calibration)
    walk.advance(model.model.layers[0])
    for name in names:
        x = whole[name].double()
        moments = walk.moments(model.model.layers[1], model.model.layers[1].get_submodule(name))
        assert torch.allclose(moments, x.t() @ x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("method", ["int8", "int4"])
def test_a_model_whose_activations_are_not_finite_is_refused(small_model, calibration, method, bad):
    model = small_model()
    model.model.layers[1].input_layernorm.weight[3] = bad
    with pytest.raises(QualityError, match="cannot be calibrated"):
        quantize_model(model, Quantization(method), calibration)
