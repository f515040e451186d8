import json
import random
import resource
import time
from pathlib import Path

import jsonschema
import numpy as np
import pytest

pytest.importorskip("llguidance")

from raymill.errors import RequestError
from raymill.inference.grammar import Grammars
from raymill.inference.sampling import Sampler, Sampling, choose
from raymill.tokenizer.tokenizer import Tokenizer

TEXTS = [
    '{"name": "Zo\u00eb", "size": 12.5, "tags": ["a", "b"]}',
    "true false null \u4e2d\u6587 \U0001f600 words and more words",
] * 20


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 330)


@pytest.fixture(scope="module")
def grammars(tokenizer) -> Grammars:
    return Grammars(tokenizer)


def allowed(match) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(match.mask().view(np.uint8), bitorder="little")).tolist())


def feed(tokenizer, match, text):
    for token in tokenizer.encode(text):
        match.advance(token)


def complete(tokenizer, grammar, seed, max_tokens=3000):
    """What a model that knows nothing says under the grammar: its logits are noise that leans to closing marks."""
    rng = np.random.default_rng(seed)
    lean = np.array([2.5 if set(tokenizer.token_bytes(i)) & set(b'"]}0') else 0.0 for i in range(tokenizer.vocab_size)])
    sampler, ids = Sampler(Sampling(seed=seed), match=grammar.start()), []
    while len(ids) < max_tokens:
        logits = (rng.normal(0, 1, tokenizer.vocab_size) + lean).astype(np.float32)
        ((token, _),) = choose(logits[None], (0,), [sampler])
        sampler.push(token)
        if token == tokenizer.end_id:
            return ids
        ids.append(token)
    raise AssertionError("does not end")


def random_schema(rng, depth=0):
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern", "date"]
    kind = rng.choice(kinds + ["object", "array", "tuple", "any"] * (2 if depth < 2 else 0))

    def below():
        return random_schema(rng, depth + 1)

    if kind == "object":
        names = rng.sample(["a", "b b", "\u00e9", "\U0001f600", 'q"'], rng.randint(0, 3))
        extra = rng.choice([False, below()])
        needed = rng.sample(names, rng.randint(0, len(names)))
        properties = {name: below() for name in names}
        return {"type": "object", "properties": properties, "required": needed, "additionalProperties": extra}
    if kind == "array":
        least = rng.randint(0, 2)
        return {"type": "array", "items": below(), "minItems": least, "maxItems": least + rng.randint(0, 2)}
    if kind == "tuple":
        return {"type": "array", "prefixItems": [below(), below()], "items": False, "minItems": 1}
    if kind == "any":
        return {"anyOf": [below(), below()]}
    if kind == "string":
        least = rng.randint(0, 3)
        return {"type": "string", "minLength": least, "maxLength": least + rng.randint(0, 8)}
    if kind == "integer":
        return {"type": "integer", "minimum": rng.randint(-50, 0), "exclusiveMaximum": rng.randint(1, 500)}
    others = {
        "number": {"type": "number", "minimum": -1.5, "maximum": 1000},
        "enum": {"enum": ["x", 3, None, "\u4e2d"]},
        "const": {"const": {"k": [1, "two"]}},
        "pattern": {"type": "string", "pattern": "^[a-c]{1,4}-[0-9]+$"},
        "date": {"type": "string", "format": "date"},
    }
    return others.get(kind, {"type": kind})


@pytest.mark.parametrize("seed", range(60))
def test_what_a_model_of_noise_says_conforms_and_ends(tokenizer, grammars, seed):
    schema = random_schema(random.Random(seed))
    for draw in range(3):
        ids = complete(tokenizer, grammars.json_schema(schema), seed * 7 + draw)
        assert all(tokenizer.token_bytes(token) for token in ids), "a special id"
        text = b"".join(map(tokenizer.token_bytes, ids)).decode("utf-8")
        jsonschema.validate(json.loads(text), schema, jsonschema.Draft202012Validator)
        json.dumps(json.loads(text), ensure_ascii=False).encode()  # no half characters


def test_any_object(tokenizer, grammars):
    match = grammars.json_object().start()
    feed(tokenizer, match, '{"a": [1, {"b": null}], "c": "\u00e9"}')
    assert allowed(match) == {tokenizer.end_id}
    other = grammars.json_object().start()
    with pytest.raises(ValueError, match="may not come"):
        feed(tokenizer, other, "[1]")


def test_the_end_comes_only_where_the_text_may_end(tokenizer, grammars):
    match = grammars.json_schema({"type": "integer"}).start()
    assert tokenizer.end_id not in allowed(match)
    feed(tokenizer, match, "1")
    ids = allowed(match)
    assert tokenizer.end_id in ids and tokenizer.encode("2")[0] in ids
    match.advance(tokenizer.end_id)
    with pytest.raises(ValueError, match="may not come"):
        match.advance(tokenizer.encode("2")[0])


def test_special_ids_never_come(tokenizer, grammars):
    special = {token for token in range(tokenizer.vocab_size) if not tokenizer.token_bytes(token)}
    assert len(special) >= 3
    match = grammars.json_schema({"type": "string"}).start()
    for text in ('"', "<", "|", "1"):  # as the text of a special id would begin
        feed(tokenizer, match, text)
        assert not special & allowed(match)
    for token in special - {tokenizer.end_id}:
        with pytest.raises(ValueError, match="may not come"):
            grammars.json_schema({"type": "string"}).start().advance(token)


def test_a_character_may_be_spread_over_ids(tokenizer, grammars):
    match = grammars.json_schema({"type": "string", "maxLength": 1}).start()
    byte_ids = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size)}
    match.advance(byte_ids[b'"'])
    for byte in "\U0001f43b".encode():
        assert byte_ids[b'"'] not in allowed(match) or byte == 0xF0
        match.advance(byte_ids[bytes([byte])])
    assert allowed(match) == {token for token in allowed(match) if tokenizer.token_bytes(token).startswith(b'"')}


def test_matches_of_one_grammar_go_their_own_ways(tokenizer, grammars):
    grammar = grammars.json_schema({"enum": ["ab", "cd"]})
    one, other = grammar.start(), grammar.start()
    feed(tokenizer, one, '"a')
    feed(tokenizer, other, '"c')
    assert allowed(one) != allowed(other)


def test_compiled_schemas_are_kept_and_bounded(tokenizer):
    grammars = Grammars(tokenizer, max_compiled=2)
    schemas = [{"type": "string", "maxLength": n} for n in range(3)]
    first = grammars.json_schema(schemas[0])
    assert grammars.json_schema(dict(schemas[0])) is first
    for schema in schemas[1:]:
        grammars.json_schema(schema)
    assert grammars.json_schema(schemas[0]) is not first


OBJECT = {"type": "object"}


def nest(schema, depth):
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def doubling(count):
    links = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(count)}
    return {"$defs": {**links, f"d{count}": {"type": "null"}}, "$ref": "#/$defs/d0"}


REFUSED = {
    "bytes": ({"enum": ["x" * 70_000]}, "65536"),
    "depth": (nest({"type": "null"}, 40), "32"),
    "deep constant": ({"const": json.loads("[" * 500 + "]" * 500)}, "32"),
    "deep default": ({"type": "null", "default": json.loads("[" * 900 + "]" * 900)}, "32"),
    "enum": ({"enum": list(range(100_000))}, "1000"),
    "properties": ({**OBJECT, "properties": {f"p{i}": {} for i in range(201)}}, "200"),
    "required": ({**OBJECT, "required": [f"p{i}" for i in range(201)]}, "200"),
    "maxLength": ({"type": "string", "maxLength": 10**9}, "10000"),
    "minItems": ({"type": "array", "minItems": 2**63}, "10000"),
    "pattern's length": ({"type": "string", "pattern": "a?" * 200}, "256"),
    "pattern's repeats": ({"type": "string", "pattern": "((a{9}){9}){9}"}, "256"),
    "patterns": ({"anyOf": [{"type": "string", "pattern": f"a{i}"} for i in range(40)]}, "32"),
    "merged patterns": (
        {"allOf": [{"type": "string", "pattern": f".*[a-z]{{{i}}}.*x"} for i in range(3, 12)]},
        "at most 2",
    ),
    "multipleOf": ({"type": "integer", "multipleOf": 999_983}, "1000"),
    "small multipleOf": ({"type": "number", "multipleOf": 1.0000001}, "1000"),
    "common multipleOf": ({"type": "array", "prefixItems": [{"multipleOf": 31}, {"multipleOf": 37}]}, "1000"),
    "branches": ({"allOf": [{"anyOf": [{"properties": {f"{c}{i}": {}}} for c in "ab"]} for i in range(8)]}, "16"),
    "doubling": (doubling(40), "256"),
    "definitions": ({"$defs": {f"d{i}": {} for i in range(65)}}, "64"),
    "large number": ({"type": "integer", "maximum": 10**400}, str(2**53)),
    "infinite number": ({"type": "number", "minimum": float("-inf")}, str(2**53)),
    "ranges": ({"type": "array", "prefixItems": [{"minimum": i, "type": "number"} for i in range(60)]}, "50"),
    "endless reference": ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "endless"),
    "endless object": ({**OBJECT, "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "endless"),
    "endless array": ({"type": "array", "minItems": 1, "items": {"$ref": "#"}}, "endless"),
    "far reference": ({"$ref": "http://127.0.0.1:9/x"}, "names nothing"),
    "missing definition": ({"$ref": "#/$defs/a", "$defs": {"b": {}}}, "names nothing"),
    "reference into a constant": ({"enum": [{"x-guidance": {}}], "$ref": "#/enum/0"}, "names nothing"),
    "not": ({"not": {"type": "string"}}, "'not' is not supported"),
    "uniqueItems": ({"type": "array", "uniqueItems": True}, "'uniqueItems'"),
    "library's switch": ({**OBJECT, "x-guidance": {"lenient": True}}, "'x-guidance'"),
    "ignored keyword": ({"type": "string", "contentEncoding": "base64"}, "'contentEncoding'"),
    "unknown keyword below": ({**OBJECT, "properties": {"a": {"foo": 1}}}, "'foo'"),
    "format": ({"type": "string", "format": "color"}, "'color'"),
    "minProperties": ({**OBJECT, "minProperties": 2}, "minProperties"),
    "old tuple": ({"type": "array", "items": [{}]}, "prefixItems"),
    "no type": ({"type": "strin"}, "strin"),
    "contradiction": ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
    "overlapping oneOf": ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
    "look-ahead": ({"type": "string", "pattern": "(?=a)b"}, "look"),
    "half a character": ({"enum": ["\ud800"]}, "JSON schema"),
    "a text": ("x", "not an object"),
    "properties of another kind": ({"properties": [1]}, "properties"),
    "required of another kind": ({"required": [["a"]]}, "required"),
    "a number for a schema": ({"items": 3}, "'3'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_schema_out_of_bounds_is_refused_at_once(grammars, name):
    schema, told = REFUSED[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    with pytest.raises(RequestError) as caught:
        grammars.json_schema(schema)
    assert time.process_time() - start < 0.05
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10 * 1024
    assert caught.value.status == 400 and caught.value.field == "response_format" and told in str(caught.value)


def test_recursion_that_may_end_is_allowed(tokenizer, grammars):
    tree = {**OBJECT, "properties": {"next": {"$ref": "#"}}, "additionalProperties": False}
    match = grammars.json_schema(tree).start()
    feed(tokenizer, match, '{"next": {"next": {}}}')
    assert allowed(match) == {tokenizer.end_id}
    links = {
        "a": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/b"}]},
        "b": {"type": "array", "items": {"$ref": "#/$defs/a"}},
    }
    grammars.json_schema({"$defs": links, "$ref": "#/$defs/a"})


def test_no_character_is_escaped_by_its_number(tokenizer, grammars):
    match = grammars.json_schema({"type": "string"}).start()
    feed(tokenizer, match, '"\\')
    assert not any(tokenizer.token_bytes(token).startswith(b"u") for token in allowed(match))


def test_blanks_are_bounded(tokenizer, grammars):
    match = grammars.json_object().start()
    with pytest.raises(ValueError, match="may not come"):
        feed(tokenizer, match, "{" + " " * 65)


def test_a_tokenizer_of_another_kind(tmp_path: Path):
    import tokenizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "{", "}", "\u2581{", '"a"']
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE(dict(zip(pieces, range(300), strict=False)), [], byte_fallback=True, unk_token="<unk>")
    )
    inner.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback()]
    )
    inner.add_special_tokens(["<unk>", "<s>", "</s>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.bring(tmp_path / "tokenizer.json", "</s>")
    match = Grammars(tokenizer).json_object().start()
    assert {tokenizer.token_bytes(token) for token in allowed(match)} == {b"{"}
    for piece in (b"{", b'"a"', b":", b" ", b"{", b"}", b"}"):
        match.advance(next(token for token in allowed(match) if tokenizer.token_bytes(token) == piece))
    assert allowed(match) == {tokenizer.end_id}
