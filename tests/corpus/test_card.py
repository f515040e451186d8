"""The data card: sums that agree, a page that is one file, the same bytes twice, and text that stays text."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest

from raymill.corpus.card import (
    EXCERPT_CHARS,
    SAMPLES_PER_REASON,
    Findings,
    InputFile,
    Lengths,
    Lineage,
    Volume,
    build_card,
    render_card,
    size_in_words,
)

HOSTILE = '</script><img src=x onerror="alert(1)"></pre>{{ 7 * 7 }}<!--\u202e\ud800\x00'
ACCOUNT = {
    "records": 12_347,
    "pieces": 0,
    "kept": 11_003,
    "dropped": {"too_short": 1_201, "exact_duplicate": 102},
    "quarantined": {"not_utf8": 41},
    "changed": {"repaired": 77},
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


def card(name: str = "tiny", text: str = "Too short.", **account: object) -> dict:
    before, after = Lengths(), Lengths()
    for size in (0, 1, 700, 900, 5000):
        before.add(size)
    after.add(5000)
    samples = [{"id": text, "reason": "too_short", "text": text * 99} for _ in range(9)]
    samples.append({"id": "b.txt", "reason": "exact_duplicate", "duplicate_of": text})
    findings = Findings(
        samples=samples,
        groups={
            "source": {"small": Volume(3, 5_000), text: Volume(11_000, 61_200_000)},
            "language": {"en": Volume(11_003, 61_205_000)},
        },
        lengths_before=before,
        lengths_after=after,
        cluster_sizes={3: 17, 2: 34},
        pii={"email": 1_042},
    )
    files = [InputFile(f"{text}{number}.jsonl", 1_500_000, "ab12") for number in range(3)]
    lineage = Lineage(files, {"min_words": 50, "note": text}, "c0ffee", "0.1.0", {"numpy": "2.1.0"})
    return build_card(name, {**ACCOUNT, **account}, {"too_short": "prose under 50 words"}, findings, lineage)


def test_the_page_shows_every_figure():
    shown = Page(render_card(card())).text
    figures = ["12,347", "11,003", "1,303", "41", "1,201", "102", "89.1 %", "61.2 MB", "1,042", "77", "17", "34"]
    for figure in [*figures, "prose under 50 words", "c0ffee", "numpy 2.1.0", "4.5 MB", "4 KiB to 8 KiB", "min_words"]:
        assert figure in shown, figure


def test_the_sum_must_agree():
    with pytest.raises(AssertionError, match="12348"):
        card(records=12_348)


def test_documents_cut_into_pieces_are_part_of_the_sum():
    shown = Page(render_card(card(records=12_000, pieces=347))).text
    assert "more by cutting" in shown
    assert "347" in shown


def test_the_same_corpus_gives_the_same_bytes_also_by_way_of_json():
    first = render_card(card())
    assert first == render_card(json.loads(json.dumps(card())))
    first.encode()


def test_hostile_text_stays_text():
    page = render_card(card(name=HOSTILE, text=HOSTILE))
    found = Page(page)
    assert "img" not in found.tags
    assert not [pair for pair in found.attributes if pair[1].startswith("on")]
    assert '<img src=x onerror="alert(1)">' in found.text
    assert "{{ 7 * 7 }}" in found.text
    assert not set("\u202e\x00") & set(found.text)
    page.encode()
    plots = found.scripts[-1].lower()
    assert "<img" not in plots
    assert "</script" not in plots
    assert "&lt;img" in plots.replace("\\u003c", "<") or "\\u0026lt;img" in plots


def test_the_page_needs_no_network_and_runs_no_script_but_its_own_two():
    found = Page(render_card(card()))
    assert not [pair for pair in found.attributes if pair[1] in ("src", "href")]
    assert found.tags.count("script") == 2
    (policy,) = [pair[2] for pair in found.attributes if str(pair[2]).startswith("default-src")]
    assert policy.startswith("default-src 'none'")
    assert policy.partition("script-src ")[2].count("sha256-") == 2
    assert "unsafe-inline" not in policy.partition("script-src ")[2]
    assert "http" not in found.scripts[-1]


def test_a_script_has_the_hash_that_the_policy_names():
    import base64
    import hashlib

    found = Page(render_card(card()))
    (policy,) = [pair[2] for pair in found.attributes if str(pair[2]).startswith("default-src")]
    for script in found.scripts:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy


def test_samples_are_few_and_short():
    (samples,) = [card(text="word ")["samples"]["too_short"]]
    assert len(samples) == SAMPLES_PER_REASON == 5
    assert {len(sample["text"]) for sample in samples} == {EXCERPT_CHARS} == {300}


def test_a_corpus_of_nothing_has_a_page():
    nothing = Findings([], {"source": {}}, Lengths(), Lengths(), {}, {})
    account = {"records": 0, "kept": 0, "dropped": {}, "quarantined": {}}
    page = render_card(build_card("none", account, {}, nothing, Lineage([], {}, "0", "0", {})))
    assert "0.0 %" in Page(page).text


def test_lengths_of_shards_add_up_whatever_the_order():
    sizes = [0, 1, 2, 3, 4, 1023, 1024, 2**40]
    whole, left, right = Lengths(), Lengths(), Lengths()
    for number, size in enumerate(sizes):
        whole.add(size)
        (left if number % 2 else right).add(size)
    left.merge(Lengths.from_json(right.to_json()))
    assert left.to_json() == whole.to_json()
    assert whole.to_json()[:4] == [1, 1, 2, 1]
    assert whole.to_json()[10:12] == [1, 1]
    assert sum(whole.to_json()) == len(sizes)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KB"),
        (61_205_000, "61.2 MB"),
        (10**12, "1.0 TB"),
        (10**16, "10,000.0 TB"),
    ],
)
def test_sizes_are_told_in_powers_of_a_thousand(size, words):
    assert size_in_words(size) == words
