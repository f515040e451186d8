import json

import pytest
import torch

from raymill.export.formats import export
from raymill.tokenizer.chat import Message, render_chat

transformers = pytest.importorskip("transformers")
PROMPT = "The quick brown"


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize("method", ["fp32", "int8", "int4"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gpt2"])
def test_transformers_gives_the_same_logits_and_text(
    tmp_path, checkpoint, widened, greedy, tokenizer, architecture, method
):
    folder = checkpoint(architecture, method)
    export(folder, "hugging_face", tmp_path / "out")
    ours, theirs = widened(folder), load(tmp_path / "out")
    ids = torch.randint(0, tokenizer.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = float((theirs(ids).logits - ours(ids)).abs().max())
    assert difference < 1e-4, f"logits differ by {difference:.2e}"
    of_library = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    pipe = transformers.pipeline("text-generation", model=theirs, tokenizer=of_library)
    made = pipe(PROMPT, max_new_tokens=16, max_length=None, eos_token_id=-1, return_full_text=False)
    text = tokenizer.decode(greedy(ours, tokenizer.encode(PROMPT), 16))
    assert made[0]["generated_text"] == text and len(set(text)) > 3


@pytest.mark.parametrize("name", ["mistral", "qwen3"])
def test_sliding_windows_go_along(tmp_path, checkpoint, widened, tokenizer, name):
    folder = checkpoint(name, sliding_window=5)
    export(folder, "hugging_face", tmp_path / "out")
    ids = torch.arange(40)[None] + 3
    with torch.no_grad():
        assert float((load(tmp_path / "out")(ids).logits - widened(folder)(ids)).abs().max()) < 1e-4


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2"])
def test_auto_tokenizer_gives_our_ids_and_our_chats(tmp_path, checkpoint, tokenizer, texts, architecture):
    export(checkpoint(architecture), "hugging_face", tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in [*texts, " leading", "", "a\r\nb", "12345678 9"]:
        assert theirs(text)["input_ids"] == tokenizer.encode(text), text
        assert theirs.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    turns = [("system", "Be brief."), ("user", "Who's there? "), ("assistant", "Me.\n")]
    messages = [{"role": role, "content": content} for role, content in turns]
    chat = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(chat) == render_chat(tokenizer, [Message(*turn) for turn in turns])
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.end_id, tokenizer.end_id)


def test_a_brought_tokenizer_puts_nothing_around_a_text(tmp_path, checkpoint, tokenizer):
    import tokenizers

    from raymill.tokenizer.tokenizer import Tokenizer

    tokenizer.save(tmp_path / "theirs.json")
    inner = tokenizers.Tokenizer.from_file(str(tmp_path / "theirs.json"))
    inner.add_special_tokens(["</s>"])
    ends = [("</s>", inner.token_to_id("</s>"))]
    inner.post_processor = tokenizers.processors.TemplateProcessing(single="</s> $A", special_tokens=ends)
    inner.save(str(tmp_path / "theirs.json"))
    brought = Tokenizer.bring(tmp_path / "theirs.json", "</s>")
    export(checkpoint(tokenizer=brought), "hugging_face", tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("The fox")["input_ids"] == brought.encode("The fox")
    assert theirs.eos_token == "</s>"
    again = Tokenizer.load(tmp_path / "out" / "tokenizer.json")
    assert again.end_id == brought.end_id, "it can be trained on"


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_halves_are_stored_and_declared(tmp_path, checkpoint, precision, dtype):
    made = export(checkpoint(), "hugging_face", tmp_path / "out", precision)
    model = load(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert made.precision == precision
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == str(dtype).split(".")[1]


def test_generation_stops_at_either_end(tmp_path, checkpoint, tokenizer):
    export(checkpoint(), "hugging_face", tmp_path / "out")
    ends = load(tmp_path / "out").generation_config.eos_token_id
    assert ends == [tokenizer.end_id, tokenizer.special_id("<|im_end|>")]
