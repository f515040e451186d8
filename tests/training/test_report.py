"""The report: one page of one file, every figure on it, spikes kept, text that stays text; and the live line."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from raymill.training.report import REPORT, live_line, render_report, thinned, write_report

HOSTILE = '</script><img src=x onerror="alert(1)">{{ 7 * 7 }}<!--'
ROW = {
    "step": 1,
    "loss": 3.0,
    "learning_rate": 1e-3,
    "gradient_norm": 0.5,
    "tokens": 128,
    "tokens_per_s": 12345.6,
    "mfu": 0.412,
    "memory_bytes": 812_000_000,
    "elapsed_s": 1.0,
}
VALIDATION = {"step": 4, "loss_nats": 2.75, "bits_per_byte": 1.21, "accuracy": 0.4, "elapsed_s": 4.0}
EVENT = {
    "step": 3,
    "batch": 2,
    "kind": "nan",
    "action": "roll_back",
    "loss": None,
    "gradient_norm": None,
    "sequences": [{"shard": "train-00007.bin", "row": 41}] * 5,
}


class Page(HTMLParser):
    """What a page shows, its elements, and its scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.scripts, self.tags, self.attributes, self.open = "", [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        else:
            self.text += data


def rows(steps: int) -> list[dict]:
    return [{**ROW, "step": step, "tokens": 128 * step, "loss": 3.0 / step} for step in range(1, steps + 1)]


def page(title: str = "tiny", settings: dict | None = None, events: tuple = (EVENT,)) -> str:
    figures = {"parameters": 12_345_678, "validation_bits_per_byte": 1.2101}
    settings = settings or {"steps": 6, "optimizer": {"name": "muon", "learning_rate": 0.003}}
    return render_report(title, settings, figures, rows(6), [VALIDATION], events)


def test_the_page_shows_figures_settings_and_events():
    shown = Page(page()).text
    told = ["6 steps, 768 tokens", "12,345,678", "1.21", "optimizer.learning_rate", "0.003", "muon", "nan", "roll back"]
    told += ["shard train-00007.bin, row 41", "and 2 more"]
    titles = ["Loss", "Validation", "Accuracy", "Learning rate", "Gradient norm", "Speed", "MFU", "Memory"]
    for figure in [*told, *titles]:
        assert figure in shown, figure


def test_the_curves_hold_the_rows():
    drawing = Page(page()).scripts[-1]
    curves = {name: _numbers(drawing, name) for name in ("train", "validation")}
    assert curves["train"] == ([128, 256, 384, 512, 640, 768], [3.0 / step for step in range(1, 7)])
    assert curves["validation"] == ([512], [2.75])
    assert '"dash":"dot"' in drawing and "384" in drawing  # the event at its tokens


def _numbers(drawing: str, name: str) -> tuple[list, list]:
    traces, _ = json.JSONDecoder().raw_decode(drawing[drawing.index("[{") :])
    (trace,) = [trace for trace in traces if trace["name"] == name]
    return trace["x"], trace["y"]


def test_a_figure_no_row_has_is_not_drawn():
    bare = [{**row, "mfu": None} for row in rows(3)]
    shown = Page(render_report("tiny", {}, {}, bare, [], ())).text
    assert "MFU" not in shown and "Accuracy" not in shown and "went wrong" not in shown
    assert "No step was done" in Page(render_report("tiny", {}, {}, [], [], ())).text


def test_a_page_needs_nothing_but_itself_and_runs_only_its_own_scripts():
    found = Page(page())
    assert found.tags.count("script") == 2
    assert not [pair for pair in found.attributes if pair[1] in ("src", "href")]
    (policy,) = [
        value for tag, name, value in found.attributes if tag == "meta" and name == "content" and "src" in value
    ]
    assert policy.startswith("default-src 'none'") and policy.count("'sha256-") == 2


def test_hostile_text_stays_text():
    found = Page(page(HOSTILE, {HOSTILE: HOSTILE}, ({**EVENT, "sequences": [{"shard": HOSTILE}]},)))
    assert "img" not in found.tags
    assert found.text.count("{{ 7 * 7 }}") >= 4


def test_a_long_curve_keeps_its_ends_and_its_spikes():
    ys = [1.0] * 100_000
    ys[31_415], ys[27_182], ys[5] = 9.0, -9.0, None
    xs, kept = thinned(range(100_000), ys)
    assert len(xs) <= 1000 and sorted(xs) == xs
    assert (xs[0], xs[-1]) == (0, 99_999)
    assert {(31_415, 9.0), (27_182, -9.0)} <= set(zip(xs, kept, strict=True))


def test_the_report_is_written_beside_its_rows_the_same_bytes_twice(tmp_path: Path):
    for name, lines in (("metrics", rows(6)), ("validation", [VALIDATION]), ("events", [EVENT])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report(tmp_path, "tiny", {"steps": 6}, {"parameters": 7})
    first = (tmp_path / REPORT).read_bytes()
    assert 4_000_000 < len(first) < 6_000_000
    assert re.search(r"6 steps, 768 tokens", Page(first.decode()).text)
    write_report(tmp_path, "tiny", {"steps": 6}, {"parameters": 7})
    assert (tmp_path / REPORT).read_bytes() == first


@pytest.mark.parametrize(
    ("row", "validation", "line"),
    [
        (ROW, VALIDATION, "step 1/300  loss 3.000  val 2.750  12,346 tokens/s  MFU 41 %  812 MB  lr 1.00e-03"),
        (
            ROW,
            VALIDATION | {"loss_nats": None},
            "step 1/300  loss 3.000  val no number  12,346 tokens/s  MFU 41 %  812 MB  lr 1.00e-03",
        ),
        (ROW | {"mfu": None}, None, "step 1/300  loss 3.000  12,346 tokens/s  812 MB  lr 1.00e-03"),
        (
            ROW | {"loss": None, "memory_bytes": 3_260_000_000, "event": "nan_skipped"},
            None,
            "step 1/300  loss no number  12,346 tokens/s  MFU 41 %  3.3 GB  lr 1.00e-03  nan_skipped",
        ),
    ],
)
def test_the_live_line_says_what_is_known(row: dict, validation: dict | None, line: str):
    assert live_line(row, 300, validation) == line
