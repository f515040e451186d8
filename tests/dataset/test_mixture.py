"""A mixture is exact to the token, the same from any layout of shards, and copies what it planned to the byte."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from raymill.dataset.mixture import MixPlan, Mixture, ShardDocuments, plan_mixture, read_documents, write_mixed_shard
from raymill.dataset.shards import INDEX, ShardEntry, ShardIndex, TokenStream, learn_name, lengths_name
from raymill.errors import DataError

Layout = Sequence[Sequence[int]]
"""Which documents, by number, lie in which shard."""


class Corpus:
    """Documents of three sources; what makes a document is its number alone."""

    def __init__(self, seed: int, count: int = 200) -> None:
        generator = np.random.default_rng(seed)
        self.lengths = generator.integers(1, 50, count).astype(np.uint32)
        self.groups = generator.integers(-1, 3, count).astype(np.int16)
        self.keys = generator.integers(0, 2**64, count, np.uint64)

    def shards(self, layout: Layout) -> list[ShardDocuments]:
        rows = [np.array(part, int) for part in layout]
        return [ShardDocuments(self.lengths[part], self.groups[part], self.keys[part]) for part in rows]

    def available(self) -> list[int]:
        return [int(self.lengths[self.groups == group].sum()) for group in range(3)]


def mixture(tokens: int, seed: int = 0, weights: Sequence[float] = (0.5, 0.2, 0.3), repeats: int = 4) -> Mixture:
    return Mixture(weights=dict(zip("abc", weights, strict=True)), tokens=tokens, seed=seed, max_repeats=repeats)


def pieces(corpus: Corpus, layout: Layout, plan: MixPlan) -> list[tuple[int, int]]:
    """The plan as document numbers and tokens, in order, whatever the layout."""
    begins = [np.cumsum(corpus.lengths[np.array(part, int)]) - corpus.lengths[np.array(part, int)] for part in layout]
    found = []
    for shard in plan.shards:
        for number, start, length in zip(shard.inputs, shard.starts, shard.lengths, strict=True):
            place = int(np.searchsorted(begins[number], start, side="right")) - 1
            assert begins[number][place] == start
            found.append((layout[number][place], int(length)))
    return found


WHOLE = [range(200)]
THIRDS = [range(140, 200), range(70), range(70, 140)]


@pytest.mark.parametrize("seed", range(25))
def test_the_budget_and_every_share_are_met_to_the_token(seed: int) -> None:
    generator = np.random.default_rng(100 + seed)
    corpus = Corpus(seed)
    asked = mixture(int(generator.integers(50, 3000)), seed, generator.random(3) + 0.05)
    plan = plan_mixture(corpus.shards(THIRDS), asked, 500)
    taken = pieces(corpus, THIRDS, plan)
    total = sum(asked.weights.values())
    assert sum(length for _, length in taken) == asked.tokens
    assert plan.left_out_documents == (corpus.groups < 0).sum()
    for group, name in enumerate("abc"):
        mine = [(number, length) for number, length in taken if corpus.groups[number] == group]
        share = plan.shares[name]
        assert share.tokens == sum(length for _, length in mine)
        assert abs(share.tokens - asked.tokens * asked.weights[name] / total) < 1
        assert (share.documents, share.available_tokens) == (len(mine), corpus.available()[group])
        assert sum(length != corpus.lengths[number] for number, length in mine) <= 1
        times = Counter(number for number, _ in mine)
        assert max(times.values(), default=0) - min(times.values(), default=0) <= 1


def test_a_small_source_is_repeated_whole_passes_first() -> None:
    corpus = Corpus(1)
    small = corpus.available()[1]
    plan = plan_mixture(corpus.shards(WHOLE), mixture(5 * small, weights=(1, 3, 1)), 10**6)
    times = Counter(number for number, _ in pieces(corpus, WHOLE, plan) if corpus.groups[number] == 1)
    assert plan.shares["b"].tokens == 3 * small and set(times.values()) == {3}
    assert len(times) == (corpus.groups == 1).sum()


def test_passes_have_different_orders_and_lie_mixed() -> None:
    corpus = Corpus(2)
    only = Mixture(weights={"a": 1, "b": 1, "c": 1}, tokens=3 * min(corpus.available()))
    number = int(np.argmin(corpus.available()))
    twice = only.model_copy(update={"tokens": 6 * min(corpus.available())})
    order = [each for each, _ in pieces(corpus, WHOLE, plan_mixture(corpus.shards(WHOLE), twice, 10**6))]
    mine = [each for each in order if corpus.groups[each] == number]
    first, second = list(dict.fromkeys(mine)), list(dict.fromkeys(mine[::-1]))[::-1]
    assert first != second and first != sorted(first)
    half = [corpus.groups[each] for each in order[: len(order) // 2]]
    assert all(0.3 < half.count(group) / Counter(corpus.groups[order])[group] < 0.7 for group in range(3))


def test_a_part_of_a_source_lies_mixed_too() -> None:
    corpus = Corpus(2)
    asked = mixture(min(corpus.available()), weights=(1, 1, 1))
    order = [each for each, _ in pieces(corpus, WHOLE, plan_mixture(corpus.shards(WHOLE), asked, 10**6))]
    whole = mixture(3 * min(corpus.available()), weights=(1, 1, 1))
    among = [each for each, _ in pieces(corpus, WHOLE, plan_mixture(corpus.shards(WHOLE), whole, 10**6))]
    taken = [each in set(order) for each in among]
    assert 0.3 < sum(taken[: len(taken) // 2]) / sum(taken) < 0.7


def test_a_share_that_ends_with_a_document_cuts_none() -> None:
    corpus = Corpus(2)
    corpus.lengths[:] = 10
    plan = plan_mixture(corpus.shards(WHOLE), mixture(300, weights=(1, 1, 1)), 10**6)
    assert [length for _, length in pieces(corpus, WHOLE, plan)] == [10] * 30


def test_neither_layout_nor_order_of_shards_changes_the_stream() -> None:
    corpus = Corpus(3)
    expected = pieces(corpus, WHOLE, plan_mixture(corpus.shards(WHOLE), mixture(2000), 10**6))
    shuffled = np.array_split(np.random.default_rng(0).permutation(200), 7)
    for layout in (THIRDS, THIRDS[::-1], [part.tolist() for part in shuffled]):
        assert pieces(corpus, layout, plan_mixture(corpus.shards(layout), mixture(2000), 300)) == expected
    assert pieces(corpus, WHOLE, plan_mixture(corpus.shards(WHOLE), mixture(2000, seed=1), 300)) != expected


def test_a_larger_budget_takes_what_a_smaller_one_took() -> None:
    corpus = Corpus(4)
    small, large = (
        Counter(number for number, _ in pieces(corpus, WHOLE, plan_mixture(corpus.shards(WHOLE), mixture(tokens), 500)))
        for tokens in (1000, 3000)
    )
    assert small <= large


def test_output_shards_are_of_nearly_the_size_asked_for() -> None:
    plan = plan_mixture(Corpus(5).shards(WHOLE), mixture(2000), 400)
    sizes = [int(shard.lengths.sum()) for shard in plan.shards]
    assert len(sizes) == 5 and all(abs(size - 400) < 50 for size in sizes)


def test_a_source_that_is_short_is_told_with_what_would_do() -> None:
    corpus = Corpus(6)
    have = corpus.available()[1]
    with pytest.raises(DataError, match="too little of source b for the mixture") as error:
        plan_mixture(corpus.shards(WHOLE), mixture(12 * have, weights=(1, 10, 1), repeats=4), 500)
    assert f"b is {6 * have:,} tokens short" in (error.value.why or "")
    most = 4 * have * 12 // 10
    assert f"tokens to {most:,}" in error.value.fix and "max_repeats to 10" in error.value.fix
    plan_mixture(corpus.shards(WHOLE), mixture(most, weights=(1, 10, 1), repeats=4), 500)
    plan_mixture(corpus.shards(WHOLE), mixture(12 * have, weights=(1, 10, 1), repeats=10), 500)


def test_a_source_that_is_absent_is_told_by_name() -> None:
    corpus = Corpus(7)
    asked = Mixture(weights={"a": 1, "b": 1, "c": 1, "wkii": 1}, tokens=100)
    with pytest.raises(DataError, match="wkii") as error:
        plan_mixture(corpus.shards(WHOLE), asked, 500)
    assert "no document has source wkii: correct the name" in error.value.fix


@pytest.mark.parametrize("weights", [{}, {"a": 0.0}, {"a": -1.0}, {"a": float("nan")}, {"a": True}])
def test_weights_that_make_no_share_are_refused(weights: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Mixture(weights=weights, tokens=10)


def test_quotas_add_up_where_shares_are_no_whole_numbers() -> None:
    assert Mixture(weights={"a": 1, "b": 1, "c": 1}, tokens=11).quotas() == {"a": 4, "b": 4, "c": 3}
    assert Mixture(weights={"a": 1e-9, "b": 1}, tokens=7).quotas() == {"a": 0, "b": 7}


def write_inputs(folder: Path, corpus: Corpus, layout: Layout, masked: set[int]) -> list[ShardEntry]:
    """Ids that tell document and place; of the shards in `masked` every second id is learned."""
    entries = []
    for number, part in enumerate(layout):
        documents = [1000 * each + np.arange(corpus.lengths[each]) for each in part]
        ids = np.concatenate(documents).astype("<u4")
        name = f"in-{number}.bin"
        ids.tofile(folder / name)
        if number in masked:
            (ids % 2).astype(np.uint8).tofile(folder / learn_name(name))
        sizes = {"documents": len(part), "tokens": len(ids), "text_bytes": 3 * len(ids)}
        entries.append(ShardEntry(path=name, split="train", has_learn_mask=number in masked, **sizes))
    return entries


@pytest.mark.parametrize("masked", [set(), {0, 2}])
def test_written_shards_hold_what_was_planned_and_can_be_trained_on(tmp_path: Path, masked: set[int]) -> None:
    corpus = Corpus(8)
    source, goal, work = (tmp_path / name for name in ("source", "goal", "work"))
    for folder in (source, goal, work):
        folder.mkdir()
    entries = write_inputs(source, corpus, THIRDS, masked)
    plan = plan_mixture(corpus.shards(THIRDS), mixture(2500), 600)
    made = []
    for number, shard in enumerate(plan.shards):
        final = goal / f"train-{number:05d}.bin"
        write_mixed_shard(shard, entries, source, final, work, dtype="uint32", vocab_size=200_000)
        report = json.loads((work / f"{final.name}.json").read_bytes())
        made.append(ShardEntry(split="train", **report))
        assert int(np.load(work / f"{final.name}.npy").sum()) == report["tokens"]
        assert abs(report["text_bytes"] - 3 * report["tokens"]) <= 3
    index = ShardIndex(dtype="uint32", vocab_size=200_000, end_of_document_id=0, shards=tuple(made))
    (goal / INDEX).write_text(index.model_dump_json())
    stream = TokenStream(goal, "train")
    expected = [1000 * each + np.arange(length) for each, length in pieces(corpus, THIRDS, plan)]
    ids = np.concatenate(expected)
    assert np.array_equal(stream.read(0, len(stream)), ids) and len(stream) == 2500
    lengths = np.concatenate([stream.lengths(shard) for shard in range(stream.num_shards)])
    assert lengths.tolist() == [len(each) for each in expected]
    unlearned = {each for number in masked for each in THIRDS[number]}
    learned = [(each // 1000 not in unlearned) or each % 2 == 1 for each in ids.tolist()]
    assert stream.learned(0, len(stream)).tolist() == learned
    assert list(goal.glob("*.learn.bin")) == [] if not masked else stream.has_learn_mask


def test_writing_again_changes_no_byte(tmp_path: Path) -> None:
    corpus = Corpus(9)
    entries = write_inputs(tmp_path, corpus, THIRDS, {1})
    (shard,) = plan_mixture(corpus.shards(THIRDS), mixture(900), 10**6).shards
    states = []
    for _ in range(2):
        write_mixed_shard(shard, entries, tmp_path, tmp_path / "out.bin", tmp_path, dtype="uint32", vocab_size=200_000)
        states.append({path.name: path.read_bytes() for path in tmp_path.glob("out.*")})
    assert states[0] == states[1]
    assert set(states[0]) == {"out.bin", lengths_name("out.bin"), learn_name("out.bin"), "out.bin.npy", "out.bin.json"}


def test_documents_are_read_from_a_corpus_file_by_any_column(tmp_path: Path) -> None:
    columns = {"id": ["x#0", "x#1", "y#0"], "text": ["a", "b", "c"], "language": ["de", None, "en"]}
    pq.write_table(pa.table(columns), tmp_path / "train-00000.parquet")
    lengths = np.array([3, 4, 5], np.uint32)
    asked = Mixture(weights={"en": 1, "de": 1}, by="language", tokens=8)
    found = read_documents(tmp_path / "train-00000.parquet", lengths, asked)
    assert found.groups.tolist() == [0, -1, 1] and found.lengths.tolist() == [3, 4, 5]
    assert len(set(found.keys.tolist())) == 3
    with pytest.raises(DataError, match="no column topic") as error:
        read_documents(tmp_path / "train-00000.parquet", lengths, asked.model_copy(update={"by": "topic"}))
    assert "id, text, language" in (error.value.why or "")


def test_a_null_is_no_name(tmp_path: Path) -> None:
    path = tmp_path / "corpus.parquet"
    pq.write_table(pa.table({"id": ["1", "2", "3"], "source": pa.array(["None", None, "a"])}), path)
    wanted = Mixture(weights={"None": 1.0, "a": 1.0}, tokens=2)
    assert read_documents(path, np.ones(3, np.uint32), wanted).groups.tolist() == [0, -1, 1]
