import json

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from raymill.artifact import Draft
from raymill.cli import app
from raymill.config import Config
from raymill.errors import ArtifactError, UsageError
from raymill.export import formats
from raymill.export.formats import export, find_checkpoint


def refused(*args, **settings):
    with pytest.raises(UsageError) as caught:
        export(*args, **settings)
    return str(caught.value)


def test_an_unknown_format_lists_those_there_are(tmp_path, checkpoint):
    said = refused(checkpoint(), "exl2", tmp_path / "out")
    assert "there is no format exl2" in said and all(name in said for name in formats.FORMATS)


def test_a_missing_package_is_named_with_the_command(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    said = refused(checkpoint(), "gguf", tmp_path / "out")
    assert "needs gguf" in said and "pip install 'raymill[export]'" in said


def test_a_precision_the_format_has_not_lists_those_it_has(tmp_path, checkpoint):
    said = refused(checkpoint(), "hugging_face", tmp_path / "out", "q8_0")
    assert "as q8_0" in said and "fp32, bf16, fp16" in said


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path, checkpoint):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert "is not empty" in refused(checkpoint(), "hugging_face", tmp_path / "out")
    assert [each.name for each in (tmp_path / "out").iterdir()] == ["mine"]


def test_an_empty_folder_is_filled_and_a_failure_leaves_it_empty(tmp_path, checkpoint, monkeypatch):
    folder = checkpoint()
    (tmp_path / "out").mkdir()

    def fail(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("raymill.export.hugging_face.save_tensors", fail)
        with pytest.raises(OSError, match="No space"):
            export(folder, "hugging_face", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir()) and not list(tmp_path.glob(".*"))
    made = export(folder, "hugging_face", tmp_path / "out")
    assert made.size_bytes == sum(each.stat().st_size for each in (tmp_path / "out").iterdir()) > 0


def test_only_gguf_can_leave_its_tokenizer_out(tmp_path, checkpoint):
    assert "--no-tokenizer" in refused(checkpoint(), "hugging_face", tmp_path / "out", tokenizer=False)


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors: tensors.pop("model.norm.weight"),
        lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.weight_scale": tensors["model.norm.weight"][None]}),
        lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"][1:]}),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(tmp_path, checkpoint, damage):
    folder = checkpoint("llama", "int4")
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(ArtifactError, match="does not match"):
        export(folder, "hugging_face", tmp_path / "out")


@pytest.mark.parametrize("method", ["fp32", "int8"])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_damaged_file_of_ones_own_is_not_to_be_deleted_only(tmp_path, checkpoint, file, method):
    folder = checkpoint("llama", method)
    (folder / file).write_bytes((folder / file).read_bytes()[:-5])
    with pytest.raises(ArtifactError, match="is damaged") as refused:
        export(folder, "hugging_face", tmp_path / "out")
    assert refused.value.fix.startswith("copy it here again; where a job made it")


@pytest.mark.parametrize("method", ["fp32", "int4"])
def test_shards_are_one_model(tmp_path, checkpoint, method):
    folder = checkpoint("llama", method)
    export(folder, "hugging_face", tmp_path / "whole")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{number % 2}.safetensors" for number, name in enumerate(sorted(tensors))}
    for place in set(places.values()):
        save_file({name: each for name, each in tensors.items() if places[name] == place}, folder / place)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    export(folder, "hugging_face", tmp_path / "of_shards")
    whole, of_shards = (tmp_path / name / "model.safetensors" for name in ("whole", "of_shards"))
    assert whole.read_bytes() == of_shards.read_bytes()


def test_a_tokenizer_of_another_model_is_refused(tmp_path, checkpoint):
    folder = checkpoint()
    values = json.loads((folder / "tokenizer.json").read_text())
    for number in range(9):
        values["model"]["vocab"][f"zz{number}"] = 400 + number
    (folder / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ArtifactError, match="is not this model's"):
        export(folder, "hugging_face", tmp_path / "out")


@pytest.fixture
def storage(tmp_path, checkpoint):
    """A run whose train and compress stages each left a checkpoint."""
    run = tmp_path / "storage" / "mine"
    for stage, method in (("train", "fp32"), ("compress", "int8")):
        draft = Draft(run / f"{stage}-00000000")
        for file in checkpoint(method=method).iterdir():
            file.rename(draft.path / file.name)
        draft.publish("checkpoint", stage, config=Config(), inputs={}, summary="", figures={})
    (run / "run.yaml").write_text("")
    return tmp_path / "storage"


def test_a_run_gives_its_last_checkpoint_and_a_stage_its_own(storage):
    assert find_checkpoint(storage, "mine").name.startswith(("compress", "train"))
    assert find_checkpoint(storage, "mine/train").name == "train-00000000"
    assert find_checkpoint(storage, "mine/compress").name == "compress-00000000"
    with pytest.raises(UsageError, match="no checkpoint of tune") as caught:
        find_checkpoint(storage, "mine/tune")
    assert "mine/train" in str(caught.value)
    with pytest.raises(UsageError, match="there is no run yours"):
        find_checkpoint(storage, "yours")


def test_the_command_writes_and_prints_what_it_wrote(storage, tmp_path):
    place = ["--set", f"cluster.storage={json.dumps(str(storage))}"]
    out = tmp_path / "out"
    done = CliRunner().invoke(
        app, ["export", "mine/train", "--format", "hugging_face", "--to", str(out), "--precision", "bf16", *place]
    )
    assert done.exit_code == 0, done.output
    assert done.output.startswith(f"{out}: hugging_face, bf16, ") and "note: " in done.output
    assert (out / "model.safetensors").is_file()
