"""Main content out of pages, the charset of their bytes, and pages made to do harm."""

from __future__ import annotations

import builtins
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest

from raymill.corpus.html import Extractor, decode, extract
from raymill.errors import UsageError

ARTICLE = "The river follows the mountain to the garden, and the teacher repairs the bridge before winter comes. " * 6
PAGE = (
    "<!doctype html><html><head><title>News</title><script>var menu = 1;</script></head><body>"
    "<nav><ul><li><a href='/'>Home</a></li><li><a href='/about'>Imprint</a></li></ul></nav>"
    f"<main><article><h1>A river</h1><p>{ARTICLE}</p><p>Later {ARTICLE}</p></article></main>"
    "<footer class='footer'>Copyright of the house</footer></body></html>"
)
HOSTILE = {
    "empty": "",
    "nested": "<div>" * 10_000 + "hello" + "</div>" * 10_000,
    "nested further": "<div>" * 100_000 + "hello",
    "stray end tags": "<div></x>" * 30_000,
    "misnested": "<b>" * 5_000 + "<div></b>" * 20_000,
    "tables": "<table>" * 50_000,
    "reopened": "".join(f"<b a={each}>" for each in range(2_000)) + "<p>x" * 50_000,
    "lists": "<ul><li>" * 50_000,
    "comments": "<!--" * 300_000,
    "attributes": "<a " + "x=y " * 200_000 + ">",
    "class": '<div class="' + "nav-" * 300_000 + '">x',
    "signs": "<" * 1_000_000,
    "scripts": "<script>" * 100_000,
    "foreign": "<svg><style>" + "<g>" * 50_000,
    "surrogate": "<p>\ud800 hello",
    "zeros": "\0" * 1_000_000,
}


def available(extractor: Extractor) -> None:
    if extractor == "trafilatura":
        try:
            extract("", extractor)
        except UsageError as error:
            pytest.skip(str(error.why))


@pytest.mark.parametrize("extractor", ["resiliparse", "trafilatura"])
@pytest.mark.parametrize("page", [PAGE, PAGE.encode()], ids=["str", "bytes"])
def test_the_article_stays_and_the_page_around_it_goes(extractor: Extractor, page: bytes | str) -> None:
    available(extractor)
    text = extract(page, extractor)
    assert text.count("repairs the bridge") == 12
    assert "A river" in text
    for around in ("Imprint", "var menu", "Copyright", "<p>"):
        assert around not in text


@pytest.mark.parametrize("extractor", ["resiliparse", "trafilatura"])
@pytest.mark.parametrize("page", HOSTILE.values(), ids=HOSTILE)
def test_no_page_raises_or_takes_long(extractor: Extractor, page: str) -> None:
    available(extractor)
    extract("", extractor)
    start = time.process_time()
    extract(page, extractor)
    extract(page.encode("utf-8", "surrogatepass"), extractor)
    assert time.process_time() - start < 10


def test_a_deep_page_still_gives_its_text() -> None:
    assert extract(HOSTILE["nested"], "resiliparse").strip() == "hello"
    assert extract(HOSTILE["surrogate"], "resiliparse").strip().endswith("hello")


@pytest.mark.parametrize("extractor", ["resiliparse", "trafilatura"])
def test_bytes_that_are_no_page(extractor: Extractor) -> None:
    available(extractor)
    for each in (
        bytes(range(256)) * 500,
        b"\xff\xfe<p>a",
        b"\xef\xbb\xbf",
        b"\x1f\x8b\x08" * 1000,
        b'<meta charset="rot13">a',
    ):
        extract(each, extractor)


GREETING = "Gr\u00fc\u00dfe, \u20ac5"


@pytest.mark.parametrize(
    ("page", "text"),
    [
        (GREETING.encode(), GREETING),
        (GREETING.encode("utf-8-sig"), GREETING),
        (GREETING.encode("utf-16"), GREETING),
        (GREETING.encode("utf-32"), GREETING),
        (b'<meta charset="windows-1252">' + GREETING.encode("cp1252"), '<meta charset="windows-1252">' + GREETING),
        (b"<meta charset=iso-8859-1>" + GREETING.encode(), "<meta charset=iso-8859-1>" + GREETING),
        (
            b'<meta http-equiv="Content-Type" content="text/html; charset=shift_jis">'
            + "\u65e5\u672c".encode("shift_jis"),
            '<meta http-equiv="Content-Type" content="text/html; charset=shift_jis">\u65e5\u672c',
        ),
        (b"<meta charset=utf-16>plain", "<meta charset=utf-16>plain"),
        (b"<meta charset=nonsense>plain", "<meta charset=nonsense>plain"),
        ("\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! ".encode("cp1251") * 20, None),
    ],
    ids=[
        "utf-8",
        "bom",
        "utf-16",
        "utf-32",
        "declared",
        "declared wrongly",
        "http-equiv",
        "no utf-16",
        "unknown",
        "guess",
    ],
)
def test_charsets(page: bytes, text: str | None) -> None:
    assert decode(page) == (text or "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440! " * 20)


def test_an_error_inside_trafilatura_is_a_page_without_content(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise RecursionError

    monkeypatch.setitem(sys.modules, "trafilatura", SimpleNamespace(extract=fail))
    assert extract("<p>text", "trafilatura") == ""


def test_a_missing_trafilatura_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import_module = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "trafilatura":
            raise ModuleNotFoundError("No module named 'trafilatura'")
        return import_module(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r'pip install "raymill\[trafilatura\]"'):
        extract("<p>text", "trafilatura")
