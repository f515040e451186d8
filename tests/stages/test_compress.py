import numpy as np
import pytest
import torch
from pydantic import ValidationError

from raymill.artifact import Draft
from raymill.cluster.config import ClusterConfig
from raymill.cluster.session import Cluster
from raymill.compression.quantize import load_served_model
from raymill.config import Config
from raymill.dataset.shards import INDEX, ShardEntry, ShardIndex
from raymill.errors import ArtifactError, QualityError
from raymill.evaluation.comparison import Quality
from raymill.model.config import ModelConfig
from raymill.model.transformer import Transformer
from raymill.model.weights import save_model
from raymill.stages import compress
from raymill.stages.contract import Inputs
from raymill.telemetry.progress import Progress
from raymill.tokenizer.tokenizer import Tokenizer


def publish(folder, kind, stage):
    return Draft(folder).publish(kind, stage, config=Config(), inputs={}, summary="", figures={})


@pytest.fixture
def inputs(tmp_path):
    tokenizer = Tokenizer.train(["the cat sat on the mat"] * 20, 300)
    model = Transformer(
        ModelConfig(num_layers=2, model_dim=64, num_heads=4, num_kv_heads=2, hidden_dim=96, max_seq_len=32), 300
    )
    model.initialize(seed=0)
    draft = Draft(tmp_path / "train-00000000")
    save_model(draft.path, model, tokenizer.end_id)
    tokenizer.save(draft.path / "tokenizer.json")
    (draft.path / "metrics.jsonl").write_text("{}\n")
    checkpoint = publish(tmp_path / "train-00000000", "checkpoint", "train")
    tokens = Draft(tmp_path / "tokenize-00000000")
    shards = []
    for seed, split in enumerate(("val", "train")):
        ids = np.random.default_rng(seed).integers(1, 300, 2000).astype("<u2")
        ids.tofile(tokens.path / f"{split}-00000.bin")
        shards.append(ShardEntry(path=f"{split}-00000.bin", split=split, documents=1, tokens=2000, text_bytes=8000))
    index = ShardIndex(dtype="uint16", vocab_size=300, end_of_document_id=0, shards=tuple(shards))
    (tokens.path / INDEX).write_text(index.model_dump_json())
    tokens = publish(tmp_path / "tokenize-00000000", "tokens", "tokenize")
    draft = Draft(tmp_path / "compress-00000000")
    return Inputs({"checkpoint": checkpoint, "tokens": tokens}, draft, tmp_path, Progress("compress"))


def test_the_result_is_smaller_measured_and_runs(inputs):
    (inputs.draft.path / "model.safetensors").write_bytes(b"half of an earlier attempt")
    (inputs.draft.path / "left-over").mkdir()
    (inputs.draft.path / "left-over" / "file").touch()
    threads = torch.get_num_threads()
    made = compress.run(
        compress.Config(max_sequences=8, batch_size=4, calibration_sequences=8), inputs, Cluster(ClusterConfig())
    )
    assert torch.get_num_threads() == threads
    figures = made.figures
    assert figures["weights_bytes_before"] / figures["weights_bytes"] > 3
    assert 0 < abs(figures["quality_loss"]) < 0.02
    speeds = [f"tokens_per_s_{count}_sequences_{when}" for count in (1, 8) for when in ("before", "after")]
    assert all(figures[name] > 0 for name in speeds)
    assert made.manifest.summary.startswith("int8: ") and "perplexity " in made.manifest.summary
    assert [entry.path for entry in made.manifest.files] == ["config.json", "model.safetensors", "tokenizer.json"]
    assert load_served_model(made.path)(torch.arange(8)[None]).shape == (1, 8, 300)


def write_own_text(model, path):
    """What the model itself finds likeliest, window by window: any change makes it less likely."""
    ids = torch.arange(1, 64)[:, None]
    with torch.no_grad():
        for _ in range(31):
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1).clamp_min(1)], dim=1)
    stream = np.fromfile(path, "<u2")
    stream[:2000] = ids.flatten()[:2000].numpy()
    stream.tofile(path)


def test_a_model_that_lost_too_much_is_refused_with_the_figures_and_nothing_is_published(inputs):
    shape = ModelConfig(num_layers=2, model_dim=64, num_heads=4, num_kv_heads=2, hidden_dim=96, max_seq_len=32)
    model = Transformer(shape, 300)
    model.initialize(seed=2)
    with torch.no_grad():
        # One outlier per row takes the whole range of its int8 values; the rest rounds to nothing.
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight.mul_(20)[:, 0] = 1e4
    save_model(inputs["checkpoint"].path, model, 0)
    write_own_text(model, inputs["tokens"].path / "val-00000.bin")
    with pytest.raises(QualityError, match=r"int8 makes the model .* worse") as refused:
        compress.run(
            compress.Config(max_quality_loss=0.0, calibration_sequences=None), inputs, Cluster(ClusterConfig())
        )
    assert "perplexity" in str(refused.value) and "max_quality_loss" in str(refused.value)
    assert not inputs.draft.final.exists()


def test_nan_is_worse_than_any_bound(inputs, monkeypatch):
    bad = Quality(float("nan"), 0.0, 0.0)
    monkeypatch.setattr(compress, "_measure_quality", lambda *args: (bad, bad))
    with pytest.raises(QualityError):
        compress.run(
            compress.Config(max_quality_loss=1.0, calibration_sequences=None), inputs, Cluster(ClusterConfig())
        )


def test_a_compressed_checkpoint_is_not_compressed_again(inputs, tmp_path):
    made = compress.run(compress.Config(max_sequences=8, calibration_sequences=None), inputs, Cluster(ClusterConfig()))
    again = Inputs({**inputs.artifacts, "checkpoint": made}, Draft(tmp_path / "compress-1"), tmp_path, inputs.progress)
    with pytest.raises(ArtifactError, match="compressed already"):
        compress.run(compress.Config(), again, Cluster(ClusterConfig()))


def test_a_checkpoint_without_its_tokenizer_is_refused(inputs):
    (inputs["checkpoint"].path / "model.safetensors").unlink()
    with pytest.raises(ArtifactError, match="missing"):
        compress.run(compress.Config(), inputs, Cluster(ClusterConfig()))


@pytest.mark.parametrize(
    "wrong", [{"method": "int3"}, {"max_quality_loss": -0.1}, {"max_sequences": 0}, {"max_quality_loss": float("nan")}]
)
def test_settings_out_of_bounds_are_refused(wrong):
    with pytest.raises(ValidationError):
        compress.Config(**wrong)
