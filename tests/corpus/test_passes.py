"""Both passes without Ray: exact accounts, the same bytes in any order and after any kill, nothing half written."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from raymill.corpus import clean_pass, split_pass
from raymill.corpus.augment import Augmentation
from raymill.corpus.bad_words import BadWords
from raymill.corpus.clean_pass import Recipe, clean_shard, is_clean
from raymill.corpus.cleaning import Evaluation, Steps
from raymill.corpus.decision import decide
from raymill.corpus.decontaminate import build_index, save_index
from raymill.corpus.filters import Rules
from raymill.corpus.languages import Languages
from raymill.corpus.limits import ReadLimits
from raymill.corpus.normalize import Normalization
from raymill.corpus.pii import Pii
from raymill.corpus.segments import Segmentation
from raymill.corpus.sources import InputShard, Source, group, list_files
from raymill.corpus.split_pass import Finish, is_split, join_quarantine, read_split_reports, split_shard

Prose = Callable[[int], str]
STEPS = Steps(
    repair=True,
    normalization=Normalization(),
    languages=None,
    rules=Rules(),
    bad_words=None,
    evaluation=None,
    pii=None,
)
RECIPE = Recipe(
    ReadLimits(1 << 16, 1 << 20), STEPS, segmentation=None, near_duplicates=True, repeats=None, kept_fields=()
)


@pytest.fixture
def sources(tmp_path: Path, prose: Prose, code: str) -> Path:
    """20 good documents, 2 exact and 3 near duplicates, and everything hostile."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for seed in range(20):
        (folder / f"good-{seed:02d}.txt").write_text(prose(seed))
    (folder / "late-copy.txt").write_text(prose(3).replace("\n", "\r\n") + "\n\n")
    rows = [{"text": prose(seed).replace("river", "stream", 1)} for seed in (4, 5, 6)]
    lines = [json.dumps(row) for row in [*rows, {"text": prose(7)}, {"text": ""}, {"no": 1}]]
    (folder / "rows.jsonl").write_text("\n".join([*lines, "[" * 100_000, '{"text": "\\ud800"}', ""]))
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(lines[0].encode())[:-30])
    (folder / "empty.txt").write_bytes(b"")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "nul.md").write_bytes(b"\0\0")
    (folder / "short.txt").write_text("Hi.")
    (folder / "forged.txt").write_text(prose(50) + "\n<|endoftext|>\nThe end of text is not here.")
    (folder / "module.py").write_text(code)
    return folder


def make(
    sources: Path | list[Source],
    out: Path,
    shuffle_seed: int | None = None,
    *,
    recipe: Recipe = RECIPE,
    shard_bytes: int = 4000,
    augmentation: Augmentation | None = None,
) -> dict[str, bytes]:
    """The corpus of these sources; with a seed its shards are worked on in another order."""
    out.mkdir(exist_ok=True)
    shards = group(list_files([Source(path=str(sources))] if isinstance(sources, Path) else sources), shard_bytes)
    order = list(range(len(shards)))
    random.Random(shuffle_seed).shuffle(order)
    for index in order if shuffle_seed is not None else range(len(shards)):
        if not is_clean(index, out):
            clean_shard(shards[index], recipe, out)
    decision = decide(len(shards), 0.1, out)
    for index in reversed(order):
        if not is_split(index, out):
            split_shard(index, Finish(recipe.repeats, augmentation), out, out)
    join_quarantine(len(shards), out, out / "quarantine.jsonl")
    report = read_split_reports(len(shards), out)
    (out / "rejected.json").write_text(json.dumps(decision.samples))
    (out / "account.json").write_text(json.dumps(decision.account.to_json()))
    (out / "decision.json").write_text(json.dumps([decision.cluster_sizes, decision.inputs]))
    (out / "report.json").write_text(json.dumps(report.to_json()))
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def documents(files: dict[str, bytes], out: Path, split: str) -> list[dict[str, Any]]:
    return [
        row for name in files if name.startswith(split + "-0") and name.endswith("parquet") for row in rows(out / name)
    ]


def rows(path: Path) -> list[dict[str, Any]]:
    return pq.read_table(path).to_pylist()


def test_every_record_is_accounted_for(sources: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    files = make(sources, out)
    account = json.loads(files["account.json"])
    assert account["records"] == 20 + 1 + 8 + 1 + 6
    assert account["dropped"] == {"near_duplicate": 3, "exact_duplicate": 2, "empty": 2, "too_short": 1}
    assert account["quarantined"] == {"bad_json": 2, "damaged_archive": 1, "no_text_field": 1, "not_utf8": 1, "nul": 1}
    train, val = documents(files, out, "train"), documents(files, out, "val")
    assert len(train) + len(val) == account["kept"] == 22
    assert len(val) > 0
    assert {row["id"] for row in train + val} == {f"good-{n:02d}.txt" for n in range(20)} | {"forged.txt", "module.py"}
    assert {row["kind"] for row in train + val} == {"prose", "code"}


def test_the_index_of_files_is_true(sources: Path, tmp_path: Path) -> None:
    files = make(sources, tmp_path / "out")
    report = json.loads(files["report.json"])
    for entry in report["files"]:
        table = rows(tmp_path / "out" / entry["path"])
        assert len(table) == entry["documents"] > 0
        assert sum(len(row["text"].encode()) for row in table) == entry["text_bytes"]
    totals = [sum(entry[name] for entry in report["files"]) for name in ("documents", "text_bytes")]
    assert [sum(row[place] for row in report["groups"]) for place in (3, 4)] == totals
    assert {tuple(row[:3]) for row in report["groups"]} == {("sources", "prose", None), ("sources", "code", None)}


def test_quarantine_says_where(sources: Path, tmp_path: Path) -> None:
    files = make(sources, tmp_path / "out")
    found = {
        (entry["file"], entry["reason"]): entry for entry in map(json.loads, files["quarantine.jsonl"].splitlines())
    }
    assert found[("latin.txt", "not_utf8")] == {
        "file": "latin.txt", "row": None, "offset": 3, "reason": "not_utf8", "detail": "byte 0xe9",
    }  # fmt: skip
    assert found[("rows.jsonl", "bad_json")]["file"] == "rows.jsonl"
    assert found[("rows.jsonl", "no_text_field")]["detail"] == "no 'text'; fields: no"


def test_rejected_duplicates_name_their_original(sources: Path, tmp_path: Path) -> None:
    samples = json.loads(make(sources, tmp_path / "out")["rejected.json"])
    originals = {sample["id"]: sample.get("duplicate_of") for sample in samples}
    assert originals["late-copy.txt"] == "good-03.txt"
    lines = (sources / "rows.jsonl").read_bytes().splitlines(keepends=True)
    assert originals[f"rows.jsonl#{sum(map(len, lines[:3]))}"] == "good-07.txt"
    assert originals["rows.jsonl#0"] == "good-04.txt"
    assert {"id": "short.txt", "reason": "too_short", "text": "Hi."} in samples


def test_any_order_gives_the_same_bytes(sources: Path, tmp_path: Path) -> None:
    expected = make(sources, tmp_path / "out")
    assert make(sources, tmp_path / "shuffled", shuffle_seed=1) == expected


@pytest.mark.parametrize("fatal_write", range(1, 60, 7))
def test_a_kill_at_any_write_changes_nothing(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fatal_write: int
) -> None:
    expected = make(sources, tmp_path / "out")
    open_aside, writes = clean_pass.open_aside, 0

    class Killed(BaseException):
        pass

    def counted(*args: Any) -> Any:
        nonlocal writes
        writes += 1
        if writes == fatal_write:
            raise Killed
        return open_aside(*args)

    for module in (clean_pass, split_pass):
        monkeypatch.setattr(module, "open_aside", counted)
    with pytest.raises(Killed):
        make(sources, tmp_path / "killed")
    assert not list((tmp_path / "killed").glob(".*.tmp"))
    for module in (clean_pass, split_pass):
        monkeypatch.setattr(module, "open_aside", open_aside)
    assert make(sources, tmp_path / "killed") == expected


def test_verdicts_hold_over_many_row_groups(tmp_path: Path, prose: Prose, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "sources"
    folder.mkdir()
    seeds = [*range(10), *range(4), *range(10, 30)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"text": prose(seed)}) for seed in seeds))
    expected = make(folder, tmp_path / "one", shard_bytes=1 << 20)
    monkeypatch.setattr(clean_pass, "_ROW_GROUP_BYTES", 3000)
    files = make(folder, tmp_path / "many", shard_bytes=1 << 20)
    assert pq.ParquetFile(tmp_path / "many" / "clean-00000.parquet").num_row_groups > 5
    for split in ("train", "val"):
        found = documents(files, tmp_path / "many", split)
        assert found == documents(expected, tmp_path / "one", split)
        assert found


def test_a_shard_of_nothing_readable(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")
    clean_shard(InputShard(0, tuple(list_files([Source(path=str(tmp_path / "a.txt"))]))), RECIPE, tmp_path)
    decision = decide(1, 0.1, tmp_path)
    split_shard(0, Finish(None, None), tmp_path, tmp_path)
    assert decision.account.quarantined == {"not_utf8": 1}
    assert read_split_reports(1, tmp_path).files == []


def changed(**steps: Any) -> Recipe:
    return replace(RECIPE, steps=replace(STEPS, **steps))


def kept(files: dict[str, bytes], out: Path) -> list[dict[str, Any]]:
    return documents(files, out, "train") + documents(files, out, "val")


def test_large_files_are_cut_and_nothing_is_lost(tmp_path: Path, prose: Prose) -> None:
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"text": prose(seed)}) for seed in range(40)))
    whole = make(folder, tmp_path / "whole", shard_bytes=1 << 20)
    cut = make(folder, tmp_path / "cut", shard_bytes=3000)
    assert (tmp_path / "cut" / "clean-00009.json").exists()
    assert sorted(kept(cut, tmp_path / "cut"), key=str) == sorted(kept(whole, tmp_path / "whole"), key=str)
    assert len(kept(cut, tmp_path / "cut")) == 40


def test_the_inputs_are_known_by_their_hash(sources: Path, tmp_path: Path) -> None:
    _, inputs = json.loads(make(sources, tmp_path / "out")["decision.json"])
    assert inputs["good-00.txt"] == hashlib.sha256((sources / "good-00.txt").read_bytes()).hexdigest()
    assert set(inputs) == {path.name for path in sources.iterdir()}


def test_every_step_drops_for_its_own_reason(tmp_path: Path, prose: Prose, code: str) -> None:
    folder = tmp_path / "sources"
    folder.mkdir()
    for seed in range(8):
        (folder / f"{seed}.txt").write_text(prose(seed))
    secret = "A question that the evaluation asks of every model in the very same words each year."
    (folder / "evaluation.txt").write_text(prose(20) + "\n\n" + secret)
    (folder / "rude.txt").write_text(prose(21) + "\n\nThe zounds of it.")
    (folder / "french.txt").write_text("Le petit chat de la maison boit du lait sur la table de la cuisine. " * 9)
    (folder / "french.py").write_text("# Le petit chat de la maison boit du lait\n" + code)
    (folder / "mail.txt").write_text(prose(22) + "\n\nWrite to jane.doe@example.com today.")
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": secret}))
    (tmp_path / "words.txt").write_text("zounds\n")
    index = tmp_path / "index.npy"
    save_index(build_index([tmp_path / "test.jsonl"]), index)
    recipe = changed(
        languages=Languages(keep=("en",), min_score=0.5),
        bad_words=BadWords(words=str(tmp_path / "words.txt")),
        evaluation=Evaluation(index, 1),
        pii=Pii(),
    )
    files = make(folder, tmp_path / "out", recipe=recipe)
    account = json.loads(files["account.json"])
    assert account["dropped"] == {"bad_words": 1, "contaminated": 1, "language": 1}
    assert account["changed"] == {"redacted_email": 1}
    rows = kept(files, tmp_path / "out")
    (mail,) = [row["text"] for row in rows if row["id"] == "mail.txt"]
    assert "jane.doe" not in mail and "<email>" in mail
    assert {row["language"] for row in rows} == {"en", None}, "code has no language"


def test_segments_become_documents_with_their_place(tmp_path: Path, prose: Prose) -> None:
    (tmp_path / "in").mkdir()
    for seed in range(3):
        (tmp_path / "in" / f"{seed}.txt").write_text(prose(seed))
    recipe = replace(RECIPE, segmentation=Segmentation(method="paragraph", per_segment=3))
    files = make(tmp_path / "in", tmp_path / "out", recipe=recipe)
    account = json.loads(files["account.json"])
    rows = kept(files, tmp_path / "out")
    assert (account["records"], account["pieces"], account["kept"]) == (3, 6, 9)
    assert len(rows) == 9
    for row in rows:
        name, _, place = row["id"].partition("[")
        assert row["text"] == prose(int(name[0]))[row["start_char"] : row["end_char"]]
        assert place == f"{row['start_char']}:{row['end_char']}]"


def test_a_line_that_stood_before_is_cut(tmp_path: Path, prose: Prose) -> None:
    (tmp_path / "in").mkdir()
    menu = "Home | Products | About us | Contact | Imprint of the company"
    for seed in range(4):
        (tmp_path / "in" / f"{seed}.txt").write_text(f"{menu}\n\n{prose(seed)}")
    (tmp_path / "in" / "copy.txt").write_text(f"{menu}\n\n{prose(2)}")
    (tmp_path / "in" / "echo.jsonl").write_text(json.dumps({"text": prose(3).partition("\n\n")[0]}))
    recipe = replace(changed(rules=Rules(sets=frozenset())), repeats="paragraph")
    files = make(tmp_path / "in", tmp_path / "out", recipe=recipe)
    account = json.loads(files["account.json"])
    texts = {row["id"]: row["text"] for row in kept(files, tmp_path / "out")}
    assert [name for name, text in texts.items() if menu in text] == ["0.txt"]
    assert texts["3.txt"] == prose(3)
    assert account["dropped"] == {"exact_duplicate": 1, "only_repeats": 1}
    assert account["changed"] == {"repeated_blocks": 3}


def test_parts_are_kept_and_cleaned_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    talks = [
        [("user", f"How far is town {n}?\r\nAsk caf\u0065\u0301 "), ("assistant", f"Town {n} is {n} miles off.")]
        for n in range(20)
    ]
    rows_in = [{"messages": [{"role": role, "content": text} for role, text in talk]} for talk in talks]
    (tmp_path / "in" / "chat.jsonl").write_text("\n".join(map(json.dumps, rows_in)))
    files = make(tmp_path / "in", tmp_path / "out", recipe=replace(RECIPE, near_duplicates=False))
    found = kept(files, tmp_path / "out")
    assert len(found) == 20
    for row in found:
        assert row["kind"] == "chat"
        data = row["text"].encode()
        ends = [0, *(part["end_byte"] for part in row["parts"])]
        pieces = [data[start:end].decode() for start, end in pairwise(ends)]
        assert ends[-1] == len(data)
        assert pieces[0].endswith("Ask caf\u00e9 ") and "\r" not in pieces[0]
        assert [(part["role"], part["learn"]) for part in row["parts"]] == [("user", False), ("assistant", True)]


def test_augmented_copies_stand_behind_their_documents_in_train_only(tmp_path: Path, prose: Prose) -> None:
    (tmp_path / "in").mkdir()
    for seed in range(20):
        (tmp_path / "in" / f"{seed}.txt").write_text(prose(seed) + " He saw the king.")
    augmentation = Augmentation(swaps=(("king", "queen"),), swap_share=1.0)
    files = make(tmp_path / "in", tmp_path / "out", augmentation=augmentation)
    train, val = documents(files, tmp_path / "out", "train"), documents(files, tmp_path / "out", "val")
    report = json.loads(files["report.json"])
    assert sum(entry["copies"] for entry in report["files"]) == len(train) // 2
    assert sum("queen" in row["text"] for row in train) == len(train) // 2
    assert sum(row[3] for row in report["groups"]) == 20, "the card counts documents, not copies"
    assert val and not any("queen" in row["text"] for row in val)
    assert json.loads(files["account.json"])["kept"] == 20


def test_a_long_prompt_makes_no_task_a_duplicate(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    system = " ".join(f"Rule {n} of this house is kept by each of us every day." for n in range(20))
    talks = [[("system", system), ("user", f"What is {n} and {n}?"), ("assistant", f"{2 * n}.")] for n in range(30)]
    talks += [talks[3], [("system", system), ("assistant", "What is 4 and 4?"), ("assistant", "8.")]]
    lines = [json.dumps({"messages": [{"role": role, "content": text} for role, text in talk]}) for talk in talks]
    (tmp_path / "in" / "chat.jsonl").write_text("\n".join(lines))
    account = json.loads(make(tmp_path / "in", tmp_path / "out")["account.json"])
    assert (account["kept"], account["dropped"]) == (31, {"exact_duplicate": 1}), "who says it makes a difference"


def test_code_keeps_its_repeated_lines(tmp_path: Path, code: str) -> None:
    (tmp_path / "in").mkdir()
    for number in range(4):
        (tmp_path / "in" / f"{number}.py").write_text(code.replace("circle", f"circle_{'abcd'[number] * 9}"))
    recipe = replace(RECIPE, repeats="line", near_duplicates=False)
    rows = kept(make(tmp_path / "in", tmp_path / "out", recipe=recipe), tmp_path / "out")
    assert len(rows) == 4
    for row in rows:
        compile(row["text"], row["id"], "exec")
        assert "return width * height" in row["text"]


def test_segments_of_a_document_stay_on_one_side(tmp_path: Path, prose: Prose) -> None:
    (tmp_path / "in").mkdir()
    for seed in range(40):
        (tmp_path / "in" / f"{seed}.txt").write_text(prose(seed))
    recipe = replace(RECIPE, segmentation=Segmentation(method="window", size_chars=400, overlap_chars=200))
    recipe = replace(recipe, near_duplicates=False)
    files = make(tmp_path / "in", tmp_path / "out", recipe=recipe)
    sides = [
        {row["id"].partition("[")[0] for row in documents(files, tmp_path / "out", split)} for split in ("train", "val")
    ]
    assert sides[1] and not sides[0] & sides[1]


def test_what_is_shown_of_dropped_documents(tmp_path: Path, prose: Prose) -> None:
    (tmp_path / "in").mkdir()
    for seed in range(3):
        (tmp_path / "in" / f"{seed}.txt").write_text(prose(seed))
    (tmp_path / "in" / "short.txt").write_text("Write to jane.doe@example.com.")
    (tmp_path / "in" / "rude.txt").write_text("Zounds! " + prose(9))
    (tmp_path / "words.txt").write_text("zounds\n")
    recipe = changed(bad_words=BadWords(words=str(tmp_path / "words.txt")), pii=Pii())
    samples = json.loads(make(tmp_path / "in", tmp_path / "out", recipe=recipe)["rejected.json"])
    assert {sample["id"]: sample["text"] for sample in samples} == {"short.txt": "Write to <email>.", "rude.txt": ""}


def test_rules_see_the_text_before_its_spelling_is_changed(tmp_path: Path, prose: Prose) -> None:
    (tmp_path / "in").mkdir()
    for seed in range(3):
        (tmp_path / "in" / f"{seed}.txt").write_text(prose(seed))
    recipe = changed(normalization=Normalization(lowercase=True, strip_punctuation=True, stop_words="en"))
    rows = kept(make(tmp_path / "in", tmp_path / "out", recipe=recipe), tmp_path / "out")
    assert len(rows) == 3
    assert not any(mark in row["text"] for row in rows for mark in (".", "The", " the "))


def test_english_stop_words_are_asked_of_english_only(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    nouns = [
        "Haus",
        "Garten",
        "Stadt",
        "Wasser",
        "Berg",
        "Kirche",
        "Wagen",
        "Sonne",
        "Winter",
        "Baum",
        "Vogel",
        "Brot",
        "Lampe",
        "Tisch",
    ]
    verbs = ["liegt", "steht", "wartet", "schweigt", "leuchtet", "altert", "verschwindet", "gedeiht"]
    for seed in range(3):
        draw = random.Random(seed)
        lines = [
            " ".join([draw.choice(nouns), draw.choice(verbs), "neben", draw.choice(nouns), draw.choice(nouns).lower()])
            for _ in range(60)
        ]
        (tmp_path / "in" / f"{seed}.txt").write_text(".\n".join(lines))
    files = make(tmp_path / "in", tmp_path / "plain")
    assert json.loads(files["account.json"])["dropped"] == {"few_stop_words": 3}
    recipe = changed(languages=Languages(keep=("de",), min_score=0.5))
    assert len(kept(make(tmp_path / "in", tmp_path / "told", recipe=recipe), tmp_path / "told")) == 3
