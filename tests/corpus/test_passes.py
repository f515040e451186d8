"""Both passes without Ray: exact accounts, the same bytes in any order and after any kill, nothing half written."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from raymill.corpus import passes
from raymill.corpus.filters import Rules
from raymill.corpus.passes import Recipe, clean_shard, decide, read_split_counts, split_shard
from raymill.corpus.readers import ReadLimits
from raymill.corpus.sources import InputShard, group, list_files

Prose = Callable[[int], str]
RECIPE = Recipe(ReadLimits("text", 1 << 16, 1 << 20), Rules(True, 50, False), near_duplicates=True)


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


def make(sources: Path, out: Path, shuffle_seed: int | None = None) -> dict[str, bytes]:
    """The corpus of these sources; with a seed its shards are worked on in another order."""
    out.mkdir(exist_ok=True)
    shards = group(list_files([str(sources)]), 4000)
    order = list(range(len(shards)))
    random.Random(shuffle_seed).shuffle(order)
    for index in order if shuffle_seed is not None else range(len(shards)):
        if not passes.is_clean(index, out):
            clean_shard(shards[index], RECIPE, out)
    decision = decide(len(shards), 0.1, out)
    for index in reversed(order):
        if not passes.is_split(index, out):
            split_shard(index, out, out)
    passes.join_quarantine(len(shards), out, out / "quarantine.jsonl")
    (out / "rejected.json").write_text(json.dumps(decision.samples))
    (out / "account.json").write_text(json.dumps(decision.account.to_json()))
    (out / "files.json").write_text(json.dumps(read_split_counts(len(shards), out)))
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
    for entry in json.loads(files["files.json"]):
        table = rows(tmp_path / "out" / entry["path"])
        assert len(table) == entry["documents"] > 0
        assert sum(len(row["text"].encode()) for row in table) == entry["text_bytes"]


def test_quarantine_says_where(sources: Path, tmp_path: Path) -> None:
    files = make(sources, tmp_path / "out")
    found = {(entry["file"], entry["row"]): entry for entry in map(json.loads, files["quarantine.jsonl"].splitlines())}
    assert found[("latin.txt", None)] == {
        "file": "latin.txt", "row": None, "offset": 3, "reason": "not_utf8", "detail": "byte 0xe9",
    }  # fmt: skip
    assert found[("rows.jsonl", 6)]["reason"] == "bad_json"
    assert found[("rows.jsonl", 5)]["detail"] == "no 'text'; fields: no"


def test_rejected_duplicates_name_their_original(sources: Path, tmp_path: Path) -> None:
    samples = json.loads(make(sources, tmp_path / "out")["rejected.json"])
    originals = {sample["id"]: sample.get("duplicate_of") for sample in samples}
    assert originals["late-copy.txt"] == "good-03.txt"
    assert originals["rows.jsonl#3"] == "good-07.txt"
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
    open_aside, writes = passes.open_aside, 0

    class Killed(BaseException):
        pass

    def counted(*args: Any) -> Any:
        nonlocal writes
        writes += 1
        if writes == fatal_write:
            raise Killed
        return open_aside(*args)

    monkeypatch.setattr(passes, "open_aside", counted)
    with pytest.raises(Killed):
        make(sources, tmp_path / "killed")
    assert not list((tmp_path / "killed").glob(".*.tmp"))
    monkeypatch.setattr(passes, "open_aside", open_aside)
    assert make(sources, tmp_path / "killed") == expected


def test_verdicts_hold_over_many_row_groups(tmp_path: Path, prose: Prose, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "sources"
    folder.mkdir()
    seeds = [*range(10), *range(4), *range(10, 30)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"text": prose(seed)}) for seed in seeds))
    expected = make(folder, tmp_path / "one")
    monkeypatch.setattr(passes, "_ROW_GROUP_BYTES", 3000)
    files = make(folder, tmp_path / "many")
    assert pq.ParquetFile(tmp_path / "many" / "clean-00000.parquet").num_row_groups > 5
    for split in ("train", "val"):
        found = documents(files, tmp_path / "many", split)
        assert found == documents(expected, tmp_path / "one", split)
        assert found


def test_a_shard_of_nothing_readable(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")
    clean_shard(InputShard(0, tuple(list_files([str(tmp_path)]))), RECIPE, tmp_path)
    decision = decide(1, 0.1, tmp_path)
    split_shard(0, tmp_path, tmp_path)
    assert decision.account.quarantined == {"not_utf8": 1}
    assert read_split_counts(1, tmp_path) == []
