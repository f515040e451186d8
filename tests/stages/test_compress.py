from io import StringIO

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from raymill.artifact import Draft
from raymill.cluster.config import ClusterConfig
from raymill.cluster.session import Cluster
from raymill.compression.quantize import load_served_model
from raymill.config import Config
from raymill.dataset.shards import INDEX, ShardEntry, ShardIndex, TokenStream
from raymill.errors import ArtifactError, QualityError, UsageError
from raymill.evaluation.comparison import Quality
from raymill.model.config import ModelConfig
from raymill.model.files import read_config
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
    screen = StringIO()
    shown = Inputs(inputs.artifacts, inputs.draft, inputs.run_folder, Progress("compress", screen))
    with pytest.raises(QualityError, match=r"int8 makes the model .* worse") as refused:
        compress.run(compress.Config(max_quality_loss=0.0, calibration_sequences=None), shown, Cluster(ClusterConfig()))
    assert "perplexity" in str(refused.value) and "max_quality_loss" in str(refused.value)
    assert "hint: set compress.calibration_sequences" in str(refused.value)
    assert not inputs.draft.final.exists()
    assert all(row in screen.getvalue() for row in ("weights", "tokens/s, 1 sequence", "continuation of four"))


QUICK = {"max_sequences": 8, "max_choices": 8, "calibration_sequences": 8, "max_quality_loss": 1.0}


def test_pruning_a_recovery_run_and_int4_in_one_stage(inputs):
    left = inputs.draft.work / "pruned" / "recovery"
    left.mkdir(parents=True)
    (left / "half").touch()
    prune = {"kind": "neurons", "share": 0.3, "recovery_steps": 3, "recovery_batch_size": 4}
    config = compress.Config(method="int4", prune=prune, kv_cache="int8", **QUICK)
    made = compress.run(config, inputs, Cluster(ClusterConfig()))
    values = read_config(made.path)
    assert values["intermediate_size"] == 64
    assert (values["quantization"]["method"], values["quantization"]["group_size"]) == ("int4", 32)
    assert load_served_model(made.path)(torch.arange(8)[None]).shape == (1, 8, 300)
    assert made.manifest.summary.startswith("30% of neurons pruned, int4 in groups of 32, int8 KV cache: ")
    figures = made.figures
    heads = 2 * 2 * 2  # keys and values of two layers of two heads
    assert figures["kv_cache_bytes_per_token_before"] == heads * 16 * 4
    assert figures["kv_cache_bytes_per_token"] == heads * (16 + 4)
    assert [entry.path for entry in made.manifest.files] == ["config.json", "model.safetensors", "tokenizer.json"]


def test_pruning_alone_leaves_an_ordinary_checkpoint(inputs):
    config = compress.Config(method="fp32", prune={"kind": "layers", "share": 0.5}, **QUICK)
    made = compress.run(config, inputs, Cluster(ClusterConfig()))
    values = read_config(made.path)
    assert values["num_hidden_layers"] == 1 and "quantization" not in values
    assert made.manifest.summary.startswith("50% of layers pruned: ")


@pytest.mark.parametrize("kind", ["magnitude", "wanda"])
def test_weights_pruned_before_half_precision_stay_zero(inputs, kind):
    config = compress.Config(method="bf16", prune={"kind": kind, "share": 0.5}, **QUICK)
    made = compress.run(config, inputs, Cluster(ClusterConfig()))
    weight = load_file(made.path / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert weight.dtype == torch.bfloat16 and float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.01)


def test_weights_pruned_before_gptq_stay_zero(inputs):
    made, prune = [], {"kind": "magnitude", "share": 0.5}
    for method in ("fp32", "int8"):
        compress._make(compress.Config(method=method, prune=prune, **QUICK), inputs)
        made.append(load_file(inputs.draft.path / "model.safetensors")["model.layers.1.mlp.up_proj.weight"])
    pruned, rounded = made
    assert bool(rounded.any()) and not bool(rounded[pruned == 0].any())


@pytest.mark.parametrize(
    ("config", "milder"),
    [
        ({"method": "int8"}, "serve the full-precision checkpoint"),
        ({"method": "int4"}, "set compress.method to int8"),
        ({"method": "int4", "group_size": 128}, "lower compress.group_size, set compress.method to int8"),
        ({"method": "int4", "calibration_sequences": None}, "set compress.calibration_sequences, for example to 64"),
        ({"prune": {"kind": "wanda", "share": 0.5}}, "lower compress.prune.share"),
        (
            {"prune": {"kind": "heads", "share": 0.5, "recovery_steps": 5}},
            "raise compress.prune.recovery_steps, lower compress.prune.share",
        ),
        ({"prune": {"kind": "heads", "share": 0.5}}, "set compress.prune.recovery_steps, lower compress.prune.share"),
    ],
)
def test_a_refusal_names_what_loses_less(config, milder):
    worse = Quality(11.0, 0.1, 0.1)
    with pytest.raises(QualityError) as refused:
        compress._check_loss(compress.Config(**config), Quality(10.0, 0.2, 0.2), worse)
    assert refused.value.fix == f"{milder}, or raise compress.max_quality_loss"


def test_the_model_is_made_without_a_look_at_held_out_text(inputs, monkeypatch):
    read = []
    read_into = TokenStream.read_into

    def noted(stream, start, ids):
        read.append(stream.split)
        read_into(stream, start, ids)

    monkeypatch.setattr(TokenStream, "read_into", noted)
    prune = {"kind": "heads", "share": 0.5}
    compress._make(compress.Config(method="int4", prune=prune, **QUICK), inputs)
    assert set(read) == {"train"}


def test_before_and_after_are_shown_figure_by_figure(inputs):
    screen = StringIO()
    shown = Inputs(inputs.artifacts, inputs.draft, inputs.run_folder, Progress("compress", screen))
    figures = compress.run(compress.Config(method="fp16", **QUICK), shown, Cluster(ClusterConfig())).figures
    lines = [line.removeprefix("compress: ") for line in screen.getvalue().splitlines()]
    assert lines[0].split() == ["before", "after", "change"]
    assert [line[:22].strip() for line in lines[1:]] == [
        "weights",
        "KV cache of a token",
        "tokens/s, 1 sequence",
        "tokens/s, 8 sequences",
        "perplexity",
        "next-token accuracy",
        "continuation of four",
    ]
    assert lines[1].split()[-1] == f"{figures['weights_bytes'] / figures['weights_bytes_before'] - 1:+.2%}"
    assert figures["weights_bytes"] < 0.52 * figures["weights_bytes_before"]


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"method": "int4", "group_size": 64}, "int4 groups of 64 do not divide the model's hidden_dim 96"),
        ({"prune": {"kind": "neurons", "share": 0.05}}, "5% of 96 neurons is none of them"),
    ],
)
def test_what_cannot_be_is_refused_before_the_draft_is_touched(inputs, config, why):
    (inputs.draft.path / "kept").touch()
    with pytest.raises(UsageError, match=why):
        compress.run(compress.Config(**config), inputs, Cluster(ClusterConfig()))
    assert (inputs.draft.path / "kept").exists()


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
    "wrong",
    [
        {"method": "int3"},
        {"max_quality_loss": -0.1},
        {"max_sequences": 0},
        {"max_quality_loss": float("nan")},
        {"group_size": 48},
        {"calibration_sequences": 0},
        {"method": "fp32"},
        {"prune": {"kind": "wanda", "share": 0.5}, "calibration_sequences": None},
        {"prune": {"kind": "wanda", "share": 0.5, "recovery_steps": 5}},
        {"prune": {"kind": "heads", "share": 1.0}},
    ],
)
def test_settings_out_of_bounds_are_refused(wrong):
    with pytest.raises(ValidationError):
        compress.Config(**wrong)
