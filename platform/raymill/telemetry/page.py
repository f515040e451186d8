"""A page of text, tables and plots that a browser opens offline: what the data card and a training run's report are.

In: a template that extends page.html.j2 beside this file, its values, and plotly figures by name. Out: self-contained
HTML, the same bytes for the same values. It needs no network: plotly.js stands in it (4.8 MB, nearly all of its size).
Text is data there, never markup: the template escapes everything, and the page's own policy forbids any script but its
two by their hashes. Costs half a second and the 60 MB that plotly holds until its process ends, so writers of pages start
one of their own.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_HEIGHT_PX = 340
_SCRIPT = re.compile(r"<script[^>]*>(.*?)</script>", re.DOTALL)


def render_page(
    template: Path,
    values: Mapping[str, Any],
    figures: Mapping[str, Any],
    filters: Mapping[str, Callable[..., str]],
) -> str:
    """The page. The template has its `values`, its `filters`, and as `plots` an element for each of the figures."""
    import jinja2
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    plots, drawing = _drawn(figures)
    library = get_plotlyjs()
    return environment.get_template(template.name).render(
        values,
        plots=plots,
        library=_trusted(library),
        drawing=_trusted(drawing),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {_hash(library)} {_hash(drawing)}",
    )


def _drawn(figures: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Each plot's element, to be put where it belongs, and the one script that draws them all."""
    from plotly.io import to_html

    plots, scripts = {}, []
    for number, (name, figure) in enumerate(figures.items()):
        figure.update_layout(
            template="none",
            paper_bgcolor="rgba(0,0,0,0)",
            plot_bgcolor="rgba(0,0,0,0)",
            margin={"l": 8, "r": 8, "t": 24, "b": 32, "pad": 4},
            font={"family": "system-ui, sans-serif", "size": 13},
            xaxis={"automargin": True, "zeroline": False},
            yaxis={"automargin": True, "zeroline": False},
        )
        markup = to_html(
            figure,
            config={"displayModeBar": False, "responsive": True},
            include_plotlyjs=False,
            full_html=False,
            div_id=f"plot-{number}",
            default_height=f"{figure.layout.height or _HEIGHT_PX}px",
        )
        scripts += _SCRIPT.findall(markup)
        plots[name] = _trusted(_SCRIPT.sub("", markup))
    return plots, "\n".join(scripts)


def _trusted(markup: str) -> Any:
    """Marks what this file and plotly wrote as no text to escape; nothing else passes here."""
    from markupsafe import Markup

    return Markup(markup)  # noqa: S704


def _hash(script: str) -> str:
    """A script as the content security policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
