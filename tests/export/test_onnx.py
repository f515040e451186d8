import numpy as np
import pytest
import torch

from raymill.compression.quantize import load_served_model
from raymill.export.formats import export

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
KINDS = [
    ("llama", {}),
    ("llama", {"rope_scaling": {"kind": "llama3", "factor": 4.0, "original_max_seq_len": 16}}),
    ("mistral", {"sliding_window": 5}),
    ("qwen2", {}),
    ("qwen3", {"rope_scaling": {"kind": "yarn", "factor": 4.0, "original_max_seq_len": 16}}),
    ("gpt2", {}),
]


class Session:
    """The graph with its cache kept from call to call."""

    def __init__(self, folder):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.run = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        self.reset(1)

    def reset(self, batch):
        shapes = {each.name: each.shape for each in self.run.get_inputs() if each.name.startswith("past")}
        self.past = {name: np.zeros((batch, shape[1], 0, shape[3]), np.float32) for name, shape in shapes.items()}
        self.mask = np.zeros((batch, 0), np.int64)

    def __call__(self, ids, mask=None):
        """Logits of the ids that follow what was given before."""
        ids = np.asarray(ids)
        self.mask = np.concatenate([self.mask, np.ones_like(ids) if mask is None else mask], axis=1)
        positions = np.maximum(self.mask.cumsum(1) - 1, 0)[:, -ids.shape[1] :]
        given = {"input_ids": ids, "attention_mask": self.mask, "position_ids": positions, **self.past}
        names = [each.name for each in self.run.get_outputs()]
        made = dict(zip(names, self.run.run(names, given), strict=True))
        self.past = {name: made[name.replace("past_key_values", "present")] for name in self.past}
        return made["logits"]


def same(found, expected, method):
    """Logits within 1e-4. Under int8 a norm summed in another order may round one activation to the next integer, and
    what attends to that position moves with it: most positions are as close, and all are near."""
    close = np.abs(found - expected).max(-1) < 1e-4
    print(f"{np.abs(found - expected).max():.1e}, {close.mean():.0%} within 1e-4")
    if method != "int8":
        return close.all()
    return close.mean() > 0.5 and np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


def draw(tokenizer, shape, seed=0):
    return torch.randint(0, tokenizer.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("architecture", "settings"), KINDS)
@pytest.mark.parametrize("method", ["fp32", "int8", "int4"])
def test_onnxruntime_gives_our_logits_with_and_without_cache(
    tmp_path, checkpoint, widened, tokenizer, architecture, settings, method
):
    folder = checkpoint(architecture, method, **settings)
    made = export(folder, "onnx", tmp_path / "out")
    ours = load_served_model(folder) if method == "int8" else widened(folder)
    assert made.precision == ("int8" if method == "int8" else "fp32")
    onnx.checker.check_model(tmp_path / "out" / "model.onnx", full_check=True)
    session = Session(tmp_path / "out")
    for length in (1, 7, 40):
        ids = draw(tokenizer, (2, length), length)
        expected = ours(ids).numpy()
        session.reset(2)
        assert same(session(ids), expected, method)
        session.reset(2)
        chunks = [session(part) for part in ids.split([*[3] * (length // 4), length - 3 * (length // 4)], dim=1)]
        assert same(np.concatenate(chunks, axis=1), expected, method), "in chunks, with the cache"


def test_padding_to_the_left_changes_nothing(tmp_path, checkpoint, widened, tokenizer):
    folder = checkpoint("mistral", sliding_window=5)
    export(folder, "onnx", tmp_path / "out")
    session = Session(tmp_path / "out")
    ids = draw(tokenizer, (1, 9))
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), ids], dim=1)
    logits = session(padded, np.array([[0] * 4 + [1] * 9]))
    assert np.isfinite(logits).all()
    assert np.abs(logits[:, 4:] - widened(folder)(ids).numpy()).max() < 1e-4


def test_int8_is_stored_as_int8_and_opset_17_is_declared(tmp_path, checkpoint):
    export(checkpoint("qwen2", "int8"), "onnx", tmp_path / "out")
    model = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    assert [each.version for each in model.opset_import] == [17]
    kinds = {each.name: each.data_type for each in model.graph.initializer}
    assert kinds["model.layers.0.mlp.up_proj.weight"] == onnx.TensorProto.INT8
    assert kinds["model.embed_tokens.weight"] == onnx.TensorProto.INT8
    assert (tmp_path / "out" / "tokenizer.json").is_file()
