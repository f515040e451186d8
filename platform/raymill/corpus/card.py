"""The data card: what came in, what stayed and why the rest did not, as JSON and as one page a browser opens offline.

`build_card` takes the counts that a prepared corpus left and gives plain JSON values, cleaned of what a page or a JSON
file cannot hold. `render_card` makes the page (telemetry/page.py) from that and nothing else, the same bytes for the same
card. Costs half a second, whatever the size of the corpus.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymill.artifact import write_atomic
from raymill.telemetry.page import render_page

SAMPLES_PER_REASON = 5
EXCERPT_CHARS = 300
_LENGTH_BINS = 64
_FILES_SHOWN = 200
_GROUPS_SHOWN = 30
_LABEL_CHARS = 60
_TEMPLATE = Path(__file__).with_name("card.html.j2")
_UNITS = ("KB", "MB", "GB", "TB")
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
"""What no page and no JSON file should hold: control characters, marks that reorder text, halves of characters."""


class Lengths:
    """How many documents have about which size: a bin per power of two. Shards fill one each, and they add up."""

    def __init__(self, bins: NDArray[np.int64] | None = None) -> None:
        self.bins = np.zeros(_LENGTH_BINS, np.int64) if bins is None else bins
        """Documents by bit length of their size: bin 0 has 0 bytes, bin n has 2**(n-1) to 2**n - 1 bytes."""

    def add(self, size_bytes: int) -> None:
        """Counts one document."""
        self.bins[size_bytes.bit_length()] += 1

    def merge(self, other: Lengths) -> None:
        self.bins += other.bins

    def to_json(self) -> list[int]:
        """Counts by bin, without the empty bins at the end."""
        return [int(count) for count in np.trim_zeros(self.bins, "b")]

    @classmethod
    def from_json(cls, counts: Sequence[int]) -> Lengths:
        lengths = cls()
        lengths.bins[: len(counts)] = counts
        return lengths


@dataclass(frozen=True)
class Volume:
    """How much one source, kind or language has."""

    documents: int
    text_bytes: int


@dataclass(frozen=True)
class InputFile:
    """A file that was read."""

    name: str
    size_bytes: int
    fingerprint: str
    """sha256, etag, or whatever else tells that the file is the same."""


@dataclass(frozen=True)
class Lineage:
    """What the corpus was made from, and by what."""

    files: Sequence[InputFile]
    config: Mapping[str, Any]
    """The stage's settings, every default written out."""
    config_digest: str
    code_version: str
    library_versions: Mapping[str, str]
    created: str | None = None
    """When; None keeps the card the same to the byte when it is made again."""


@dataclass(frozen=True)
class Findings:
    """What is told of the documents beside their counts."""

    samples: Iterable[Mapping[str, Any]]
    """Dropped documents: id, reason, and text or duplicate_of."""
    groups: Mapping[str, Mapping[str, Volume]]
    """Kept documents by a property, such as source, kind or language, and by its value."""
    lengths_before: Lengths
    """Sizes of the documents that could be read, bytes of text."""
    lengths_after: Lengths
    """Sizes of those that were kept."""
    cluster_sizes: Mapping[int, int]
    """How many clusters of duplicates have how many documents."""
    pii: Mapping[str, int]
    """Redactions by kind."""


def build_card(
    name: str, account: Mapping[str, Any], meanings: Mapping[str, str], findings: Findings, lineage: Lineage
) -> dict[str, Any]:
    """The card as JSON values.

    account: `Account.to_json()`; further numbers and tables of numbers in it are shown as they are named.
    meanings: a sentence per reason of dropping or quarantine; a reason without one is shown by its name.
    """
    placed = account["kept"] + sum(account["dropped"].values()) + sum(account["quarantined"].values())
    total = account["records"] + account.get("pieces", 0)
    assert total == placed, f"{total} documents came in, {placed} are accounted for"
    reasons = sorted({*account["dropped"], *account["quarantined"]})
    card = {
        "name": name,
        "account": {"pieces": 0, **account},
        "meanings": {reason: meanings[reason] for reason in reasons if reason in meanings},
        "samples": _few_samples(findings.samples),
        "groups": {
            title: {value: asdict(volume) for value, volume in _largest_first(group)}
            for title, group in findings.groups.items()
        },
        "lengths": {"before": findings.lengths_before.to_json(), "after": findings.lengths_after.to_json()},
        "cluster_sizes": {str(size): findings.cluster_sizes[size] for size in sorted(findings.cluster_sizes)},
        "pii": dict(sorted(findings.pii.items())),
        "lineage": asdict(lineage),
    }
    cleaned: dict[str, Any] = _clean(card)
    return cleaned


def render_card(card: Mapping[str, Any]) -> str:
    """The page, self-contained HTML."""
    values = {
        "card": card,
        "reasons": _reasons(card),
        "extras": _extras(card["account"]),
        "total": card["account"]["records"] + card["account"].get("pieces", 0),
        "config": json.dumps(card["lineage"]["config"], indent=2, ensure_ascii=False),
        "lengths": _length_rows(card["lengths"]),
        "files_shown": _FILES_SHOWN,
        "groups_shown": _GROUPS_SHOWN,
    }
    filters: dict[str, Callable[..., str]] = {"count": "{:,}".format, "size": size_in_words, "share": _share}
    return render_page(_TEMPLATE, values, _figures(card), filters)


def write_page(folder: Path) -> None:
    """Renders `card.json` of a folder to `card.html` in a process of its own: plotly holds 60 MB until its end."""
    subprocess.run([sys.executable, "-m", "raymill.corpus.card", str(folder)], check=True)


def size_in_words(size_bytes: int) -> str:
    """`512 B`, `1.5 KB`, `12.0 MB`: powers of 1,000."""
    if size_bytes < 1000:
        return f"{size_bytes} B"
    power = min((len(str(size_bytes)) - 1) // 3, 4)
    return f"{size_bytes / 1000**power:,.1f} {_UNITS[power - 1]}"


def _few_samples(samples: Iterable[Mapping[str, Any]]) -> dict[str, list[dict[str, str]]]:
    """By reason: the first few, of each the start."""
    few: dict[str, list[dict[str, str]]] = {}
    for sample in samples:
        group = few.setdefault(str(sample["reason"]), [])
        if len(group) < SAMPLES_PER_REASON:
            told = {key: str(sample[key]) for key in ("id", "text", "duplicate_of") if key in sample}
            group.append(told | ({"text": told["text"][:EXCERPT_CHARS]} if "text" in told else {}))
    return dict(sorted(few.items()))


def _largest_first(group: Mapping[str, Volume]) -> list[tuple[str, Volume]]:
    return sorted(group.items(), key=lambda item: (-item[1].text_bytes, -item[1].documents, item[0]))


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return _UNPRINTABLE.sub("\ufffd", value)
    if isinstance(value, Mapping):
        return {_clean(str(key)): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return value if isinstance(value, bool | float | None) else int(value)


def _share(part: int, whole: int) -> str:
    share = 100 * part / whole if whole else 0.0
    return "< 0.1 %" if 0 < share < 0.1 else f"{share:.1f} %"


def _reasons(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every way out of the corpus, the commonest first, quarantine last."""
    return [
        {
            "fate": fate,
            "reason": reason,
            "count": count,
            "meaning": card["meanings"].get(reason, ""),
            "samples": card["samples"].get(reason, []) if fate == "dropped" else [],
        }
        for fate in ("dropped", "quarantined")
        for reason, count in sorted(card["account"][fate].items(), key=lambda item: (-item[1], item[0]))
    ]


def _extras(account: Mapping[str, Any]) -> list[tuple[str, int]]:
    """What was counted beside the equation."""
    rows: list[tuple[str, int]] = []
    for name, value in account.items():
        if name in ("records", "pieces", "kept", "dropped", "quarantined"):
            continue
        rows += (
            [(f"{name}: {key}", count) for key, count in value.items()] if isinstance(value, dict) else [(name, value)]
        )
    return rows


def _length_rows(lengths: Mapping[str, list[int]]) -> list[tuple[str, int, int]]:
    """Sizes in words, documents before, documents after; from the first bin in use to the last."""
    before, after = (Lengths.from_json(lengths[name]).bins.tolist() for name in ("before", "after"))
    used = [index for index in range(_LENGTH_BINS) if before[index] or after[index]]
    return [(_bin_name(index), before[index], after[index]) for index in (range(used[0], used[-1] + 1) if used else ())]


def _bin_name(index: int) -> str:
    """`1 KiB to 2 KiB`: these bins are powers of two."""
    if index == 0:
        return "0 B"
    ends = []
    for power in (index - 1, index):
        unit = min(power // 10, 4)
        ends.append(f"{2 ** (power - 10 * unit)} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}")
    return " to ".join(ends)


def _figures(card: Mapping[str, Any]) -> dict[str, Any]:
    """The page's plots by name."""
    import plotly.graph_objects as go

    figures = {"flow": _flow(card)}
    rows = _length_rows(card["lengths"])
    if rows:
        names = [name.partition(" to ")[0] for name, _, _ in rows]
        figures["lengths"] = go.Figure(
            [
                go.Bar(name="read", x=names, y=[before for _, before, _ in rows], marker_color="#9aa5b1"),
                go.Bar(name="kept", x=names, y=[after for _, _, after in rows], marker_color="#2f7d5b"),
            ]
        )
        figures["lengths"].update_xaxes(type="category", title="this length, up to the next")
        figures["lengths"].update_layout(barmode="group", legend={"orientation": "h", "y": 1.12, "x": 0})
    for number, group in enumerate(card["groups"].values()):
        if len(group) > 1:
            shown = list(group.items())[:_GROUPS_SHOWN][::-1]
            sizes = [volume["text_bytes"] for _, volume in shown]
            labels = _labels(value or "(none)" for value, _ in shown)
            figures[f"group-{number}"] = _bars(labels, sizes, [size_in_words(size) for size in sizes])
    if len(card["cluster_sizes"]) > 1:
        sizes = card["cluster_sizes"].items()
        figures["clusters"] = go.Figure(
            go.Bar(x=[size for size, _ in sizes], y=[count for _, count in sizes], marker_color="#2f7d5b")
        )
        figures["clusters"].update_layout(
            xaxis={"type": "category", "title": "documents in the cluster"}, yaxis={"type": "log", "title": "clusters"}
        )
    return figures


def _flow(card: Mapping[str, Any]) -> Any:
    """A waterfall from all that came in, past every reason, down to what was kept."""
    import plotly.graph_objects as go

    account = card["account"]
    steps = [("came in", account["records"] + account.get("pieces", 0), 0, "#6b7785")]
    left = steps[0][1]
    for row in _reasons(card):
        left -= row["count"]
        steps.append((row["reason"], row["count"], left, "#c8963e" if row["fate"] == "dropped" else "#b4483c"))
    steps.append(("kept", account["kept"], 0, "#2f7d5b"))
    labels = _labels(name for name, _, _, _ in steps)
    figure = go.Figure(
        go.Bar(
            orientation="h",
            y=labels,
            x=[count for _, count, _, _ in steps],
            base=[base for _, _, base, _ in steps],
            marker_color=[color for _, _, _, color in steps],
            text=[f"{count:,}" for _, count, _, _ in steps],
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{y}: %{text}<extra></extra>",
        )
    )
    figure.update_layout(height=80 + 24 * len(steps))
    figure.update_xaxes(range=[0, 1.12 * max(1, steps[0][1])])
    return figure.update_yaxes(autorange="reversed", type="category")


def _bars(labels: list[str], values: list[int], texts: list[str]) -> Any:
    import plotly.graph_objects as go

    bar = go.Bar(
        orientation="h", y=labels, x=values, text=texts, textposition="outside", cliponaxis=False, marker_color="#2f7d5b",
        hovertemplate="%{y}: %{text}<extra></extra>",
    )  # fmt: skip
    figure = go.Figure(bar).update_layout(height=70 + 24 * len(labels))
    figure.update_xaxes(range=[0, 1.15 * max(1, *values)], showticklabels=False)
    return figure.update_yaxes(type="category")


def _labels(names: Iterable[str]) -> list[str]:
    """Names that fit beside a plot, no two the same. Plotly reads some markup in them, so none is left."""
    labels: list[str] = []
    for name in names:
        label = name if len(name) <= _LABEL_CHARS else name[: _LABEL_CHARS - 3] + "..."
        label = " ".join(label.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
        while label in labels:
            label += "'"
        labels.append(label)
    return labels


if __name__ == "__main__":
    _folder = Path(sys.argv[1])
    write_atomic(_folder / "card.html", render_card(json.loads((_folder / "card.json").read_bytes())))
