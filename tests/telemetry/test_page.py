"""A page is one file: what its template extends, its plots where they belong, text that stays text, and a policy of hashes."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import jinja2
import pytest

from raymill.telemetry.page import render_page

TEMPLATE = """{% extends "page.html.j2" %}
{% block title %}{{ name }}{% endblock %}
{% block style %}.own { color: red; }{% endblock %}
{% block content %}<h1>{{ name | loud }}</h1>
{% for title, plot in plots.items() %}<h2>{{ title }}</h2>{{ plot }}{% endfor %}{% endblock %}
"""


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "own.html.j2"
    path.write_text(TEMPLATE)
    return path


def render(template: Path, **values: object) -> str:
    import plotly.graph_objects as go

    figures = {"one": go.Figure(go.Bar(y=[1])), "two words": go.Figure(go.Bar(y=[2]), {"height": 90})}
    return render_page(template, values, figures, {"loud": str.upper})


def test_a_template_fills_the_page_with_its_values_and_plots(template: Path) -> None:
    page = render(template, name="<tiny>")
    assert "<title>&lt;tiny&gt;</title>" in page and "<h1>&lt;TINY&gt;</h1>" in page
    assert ".own { color: red; }" in page and "--sheet" in page
    for number, (title, height) in enumerate((("one", 340), ("two words", 90))):
        assert re.search(rf'<h2>{title}</h2>\s*<div style="height:{height}px[^>]*>\s*<div id="plot-{number}"', page)


def test_only_the_scripts_that_the_policy_names_are_there(template: Path) -> None:
    page = render(template, name="tiny")
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert page.count("<script") == 2
    assert f'script-src {" ".join(f"&#39;sha256-{each}&#39;" for each in hashes)}"' in page


def test_a_value_that_is_not_given_is_an_error(template: Path) -> None:
    with pytest.raises(jinja2.UndefinedError, match="name"):
        render(template)
