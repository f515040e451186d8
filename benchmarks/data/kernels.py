"""The rows that one core does on documents in memory: filters, signatures, encoding; and what must be equal beside them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.data import agreement, curve, packing
from benchmarks.data.corpus import Library
from benchmarks.data.rates import Rate, Side, compare, rate_row
from benchmarks.data.sides.timing import read_texts
from benchmarks.peers import Peers
from benchmarks.table import OURS, Row, columns

VOCAB_SIZE = 16384
_TOKENIZER_MB = 12.0


@dataclass(frozen=True)
class Bench:
    """What every row is given."""

    peers: Peers
    library: Library
    shards: Sequence[Path]
    """The corpus; slow sides read only its beginning."""
    cache: Path
    work: Path
    """A folder of this run, removed at its end."""
    rounds: int
    quick: bool

    @property
    def tokenizer(self) -> Path:
        """A tokenizer.json of 16,384 ids learned from the corpus, the same for every side; kept in the cache."""
        path = self.cache / f"tokenizer-{self.library.digest}-{VOCAB_SIZE}.json"
        if not path.exists():
            from raymill.tokenizer.tokenizer import Tokenizer

            Tokenizer.train(read_texts(list(self.shards), _TOKENIZER_MB), VOCAB_SIZE).save(path)
        return path


def filters(bench: Bench) -> tuple[list[Row], str]:
    """Speed, then decisions: our reasons beside datatrove's for the documents it got."""
    results = bench.work / "filters"
    scale = 1.0 if bench.quick else 3.0
    rates, missing = _compare(bench, {OURS: 30.0, "datatrove": 2 * scale}, "filters", results)
    rows = [rate_row("Gopher + C4 filters", rates, missing)]
    if "datatrove" in missing or any(rate.failure for rate in rates.values()):
        return rows, ""
    ours, theirs = (json.loads((results / f"filters_{name}.json").read_text()) for name in ("raymill", "datatrove"))
    found = agreement.compare(ours[: len(theirs)], theirs)
    for what, share, note in (
        ("decisions equal to datatrove's", found.decisions, f"{found.documents:,} documents"),
        ("also the class of reason", found.classes, "a document may have several faults"),
        ("text left in documents both keep", found.texts, "byte for byte"),
    ):
        rows.append(Row(f"filters, {what}", "%", 100 * share, note=note))
    text = f"\nfilters: the {found.documents:,} documents on which both decided; where they differ\n"
    cells = [["ours", "datatrove", "documents"], *([one, other, str(count)] for one, other, count in found.differences)]
    return rows, text + (columns(cells) if found.differences else "nowhere")


def minhash(bench: Bench) -> tuple[list[Row], str]:
    """Speed of signing; hit rate against theory."""
    scale = 1.0 if bench.quick else 3.0
    limits = {OURS: 28.0, "datatrove": 1 * scale, "text-dedup": 4 * scale, "rensa": 12 * scale, "datasketch": 5 * scale}
    rates, missing = _compare(bench, limits, "minhash", None)
    bins = curve.measure(bench.library, 2000 if bench.quick else 8000)
    inside = sum(each.inside for each in bins)
    pairs = sum(each.pairs for each in bins)
    rows = [
        rate_row("MinHash 112 permutations", rates, missing),
        Row(
            "LSH hit rate within 2 sigma of theory",
            f"of {len(bins)} bins",
            inside,
            note=f"{pairs:,} pairs with J >= 0.2",
        ),
    ]
    cells = [["Jaccard", "pairs", "hits", "rate", "theory", "within 2 sigma"]]
    cells += [
        [
            f"{each.low:.2f}-{each.high:.2f}",
            f"{each.pairs:,}",
            f"{each.hits:,}",
            f"{each.hits / max(1, each.pairs):.4f}",
            f"{each.expected / max(1, each.pairs):.4f}",
            "yes" if each.inside else "NO",
        ]
        for each in bins
    ]
    return rows, "\nLSH: pairs that share a band key, by exact Jaccard similarity of word 5-grams\n" + columns(cells)


def bpe(bench: Bench) -> tuple[list[Row], str]:
    """Speed, and whether every document's ids are those of `tokenizers`."""
    results = bench.work / "bpe"
    scale = 1.0 if bench.quick else 3.0
    limits = {OURS: 30.0, "tokenizers": 4 * scale, "tiktoken": 12 * scale}
    rates, missing = _compare(bench, limits, "bpe", results, ["--tokenizer", str(bench.tokenizer)])
    rows = [rate_row("BPE encode", rates, missing)]
    reference = results / "bpe_tokenizers.json"
    for name in (OURS, "tiktoken"):
        path = results / f"bpe_{name}.json"
        if path.exists() and reference.exists():
            pairs = list(zip(json.loads(path.read_text()), json.loads(reference.read_text()), strict=False))
            unequal = sum(one != other for one, other in pairs)
            note = f"of {len(pairs):,} documents"
            rows.append(
                Row(f"BPE, documents whose ids differ from tokenizers' ({name})", "documents", unequal, note=note)
            )
    return rows, ""


def pack(bench: Bench) -> tuple[list[Row], str]:
    """Padding and cut documents at 2,048."""
    from raymill.tokenizer.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(bench.tokenizer)
    texts = read_texts(list(bench.shards), 8.0 if bench.quick else 30.0)
    _, counts = tokenizer.encode_flat(texts, close=True)
    found = packing.measure(counts)
    sizes = f"{found.documents:,} documents, {found.tokens:,} tokens: {found.rows:,} rows, at least {found.least_rows:,} needed"
    rows = [
        Row("best-fit packing at 2,048: padding", "%", 100 * found.padding, lower_is_better=True, note=sizes),
        Row(
            "best-fit packing: documents cut that would fit",
            "%",
            100 * found.cut,
            {"concat": 100 * found.concat_cut},
            lower_is_better=True,
        ),
    ]
    return rows, ""


def _compare(
    bench: Bench, limits: dict[str, float], work: str, results: Path | None, extra: Sequence[str] = ()
) -> tuple[dict[str, Rate], dict[str, str]]:
    """The rates of the sides that can run, and why the others cannot."""
    if results is not None:
        results.mkdir(parents=True)
    missing = {name: bench.peers.missing[name] for name in limits if name in bench.peers.missing}
    sides = [
        Side(
            name,
            f"{work}_{name.replace('-', '_')}",
            Path(sys.executable) if name == OURS else bench.peers.python,
            limit,
        )
        for name, limit in limits.items()
        if name not in missing
    ]
    return compare(sides, bench.shards, bench.rounds, results, extra), missing
