import numpy as np
import pytest
import torch

from raymill.errors import UsageError
from raymill.export.formats import export
from raymill.export.gguf_tokenizer import vocabulary_of
from raymill.export.source import read_source
from raymill.tokenizer.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")
STRETCHED = {"factor": 4.0, "original_max_seq_len": 16}


def tensors_of(folder):
    reader = gguf.GGUFReader(folder / "model.gguf")
    return {
        each.name: (each.tensor_type.name, gguf.quants.dequantize(each.data, each.tensor_type))
        for each in reader.tensors
    }


def field(folder, name):
    return gguf.GGUFReader(folder / "model.gguf").get_field(name).contents()


@pytest.mark.parametrize(("method", "kind"), [("int8", "Q8_0"), ("int4", "Q4_0")])
def test_quantized_integers_are_taken_over(tmp_path, checkpoint, method, kind):
    folder = checkpoint("qwen2", method)
    made = export(folder, "gguf", tmp_path / "out")
    found, source = tensors_of(tmp_path / "out"), read_source(folder)
    assert made.precision == kind.lower()
    assert found["blk.1.ffn_up.weight"][0] == kind and found["token_embd.weight"][0] == "Q8_0"
    for theirs, ours in [("blk.1.ffn_up", "model.layers.1.mlp.up_proj"), ("token_embd", "model.embed_tokens")]:
        values = source.full(f"{ours}.weight").numpy()
        lossless = method == "int4" and theirs != "token_embd"
        assert np.allclose(found[f"{theirs}.weight"][1], values, rtol=0 if lossless else 2**-11, atol=1e-7)


def test_rows_that_blocks_do_not_divide_stay_halves(tmp_path, checkpoint):
    export(checkpoint("llama", hidden_dim=72), "gguf", tmp_path / "out", "q8_0")
    found = tensors_of(tmp_path / "out")
    assert found["blk.0.ffn_down.weight"][0] == "F16" and found["blk.0.ffn_up.weight"][0] == "Q8_0"


def test_a_tied_head_is_stored_once_and_special_tokens_are_control(tmp_path, checkpoint, tokenizer):
    export(checkpoint("llama"), "gguf", tmp_path / "out")
    assert "output.weight" not in tensors_of(tmp_path / "out")
    out = tmp_path / "out"
    assert field(out, "tokenizer.ggml.pre") in ("llama-bpe", "smaug-bpe")
    assert [kind == 3 for kind in field(out, "tokenizer.ggml.token_type")][:4] == [True, True, True, False]
    assert field(out, "tokenizer.ggml.eos_token_id") == tokenizer.end_id
    assert field(out, "tokenizer.ggml.add_bos_token") is False
    assert "<|im_start|>" in field(out, "tokenizer.chat_template")


@pytest.mark.parametrize(
    ("architecture", "settings", "words"),
    [
        ("mistral", {"sliding_window": 8}, "sliding window of 8"),
        ("qwen3", {"rope_scaling": {"kind": "llama3", **STRETCHED}}, "rope_scaling llama3"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(tmp_path, checkpoint, architecture, settings, words):
    with pytest.raises(UsageError, match=words):
        export(checkpoint(architecture, **settings), "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*")), "nothing is left"


def test_a_window_no_text_is_longer_than_is_no_window(tmp_path, checkpoint):
    export(checkpoint("mistral", sliding_window=64), "gguf", tmp_path / "out")


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "char"])
def test_a_cut_without_a_name_is_refused_but_the_model_alone_is_written(tmp_path, checkpoint, texts, kind):
    folder = checkpoint(tokenizer=Tokenizer.train(texts * 3, 600, kind))
    with pytest.raises(UsageError, match=r"no way to say[\s\S]*--no-tokenizer"):
        export(folder, "gguf", tmp_path / "out")
    made = export(folder, "gguf", tmp_path / "out", tokenizer=False)
    assert field(tmp_path / "out", "tokenizer.ggml.model") == "none"
    assert "give ids" in made.notes[0]


def test_words_that_merges_do_not_make_get_the_cut_that_asks_merges(tmp_path, checkpoint, tokenizer):
    import json

    tokenizer.save(tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    whole = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
    content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "".join(pair) != whole]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    folder = checkpoint(tokenizer=Tokenizer.load(tmp_path / "tokenizer.json"))
    assert vocabulary_of(read_source(folder)).pre == "smaug-bpe"
    assert vocabulary_of(read_source(checkpoint())).pre == "llama-bpe"


def job_of(folder, out, text, texts, greedy, model):
    tokenizer = read_source(folder).tokenizer
    prompt = tokenizer.encode(text)
    made = greedy(model, prompt, 16)
    ours = {"ids": [tokenizer.encode(each) for each in texts], "made": made, "text": tokenizer.decode(made)}
    ours["logits"] = model(torch.tensor([prompt]))[0].numpy()
    return {"file": str(out / "model.gguf"), "texts": texts, "prompt": prompt, "count": 16}, ours


def test_llama_cpp_gives_the_same_ids_logits_and_text(tmp_path, checkpoint, widened, greedy, texts, peer):
    kinds = [
        ("llama", "int8", {}),
        ("llama", "fp32", {"rope_scaling": {"kind": "llama3", **STRETCHED}}),
        ("mistral", "fp32", {"rope_scaling": {"kind": "yarn", **STRETCHED}}),
        ("mistral", "fp32", {"rope_scaling": {"kind": "linear", "factor": 3.0}}),
        ("qwen2", "int4", {}),
        ("qwen3", "fp32", {"rope_scaling": {"kind": "yarn", **STRETCHED, "beta_fast": 8.0}}),
        ("gpt2", "fp32", {}),
    ]
    cases = []
    for number, (architecture, method, settings) in enumerate(kinds):
        folder, out = checkpoint(architecture, method, **settings), tmp_path / f"out{number}"
        export(folder, "gguf", out, "fp32")
        cases.append(job_of(folder, out, texts[0], texts, greedy, widened(folder)))
    for kind, (_, ours), theirs in zip(kinds, cases, peer("run_llama", [job for job, _ in cases]), strict=True):
        assert theirs["ids"] == ours["ids"] and theirs["back"] == texts, kind
        assert (theirs["made"], theirs["text"]) == (ours["made"], ours["text"]), kind
        difference = np.abs(np.array(theirs["logits"]) - ours["logits"]).max()
        bound = 2e-2 if kind[0] == "gpt2" else 1e-4  # llama.cpp looks GELU up in a table of halves
        assert difference < bound, (kind, difference)


@pytest.mark.parametrize("kind", ["word", "irregular"])
def test_llama_cpp_cuts_as_other_vocabularies_do(tmp_path, checkpoint, widened, greedy, texts, tokenizer, peer, kind):
    import json

    made = Tokenizer.train(texts * 3, 600, "word") if kind == "word" else tokenizer
    if kind == "irregular":
        made.save(tmp_path / "tokenizer.json")
        content = json.loads((tmp_path / "tokenizer.json").read_text())
        whole = max(content["model"]["vocab"], key=content["model"]["vocab"].get)
        content["model"]["merges"] = [pair for pair in content["model"]["merges"] if "".join(pair) != whole]
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        made = Tokenizer.load(tmp_path / "tokenizer.json")
    folder = checkpoint(tokenizer=made)
    export(folder, "gguf", tmp_path / "out")
    job, ours = job_of(folder, tmp_path / "out", "The quick brown", texts, greedy, widened(folder))
    theirs = peer("run_llama", [job])[0]
    assert theirs["ids"] == ours["ids"] and theirs["made"] == ours["made"]


def test_llama_cpp_runs_a_model_without_tokenizer(tmp_path, checkpoint, widened, greedy, texts, peer):
    folder = checkpoint(tokenizer=Tokenizer.train(texts * 3, 600, "unigram"))
    export(folder, "gguf", tmp_path / "out", tokenizer=False)
    job, ours = job_of(folder, tmp_path / "out", "The quick", [], greedy, widened(folder))
    assert peer("run_llama", [job])[0]["made"] == ours["made"]


def test_openvino_gives_the_same_text_for_ids(tmp_path, checkpoint, widened, greedy, peer):
    cases = []
    for architecture in ("llama", "mistral", "qwen2", "qwen3"):
        for method, precision in (("fp32", "fp16"), ("int8", "q8_0"), ("int4", "q4_0")):
            folder, out = checkpoint(architecture, method), tmp_path / f"{architecture}-{method}"
            export(folder, "gguf", out, precision)
            text = "The quick brown"
            cases.append((architecture, method, *job_of(folder, out, text, [text], greedy, widened(folder))))
    found = peer("run_openvino", [job for _, _, job, _ in cases])
    for (architecture, method, _, ours), theirs in zip(cases, found, strict=True):
        assert theirs["made"] == ours["made"] and theirs["ids"] == ours["ids"], (architecture, method)
