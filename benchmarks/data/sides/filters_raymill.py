"""raymill's rules for prose, set up as datatrove's defaults."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import timing

from raymill.corpus.filters import Rules, judge


def load(options: Namespace) -> Callable[[list[str]], Any]:
    rules = Rules(
        sets=frozenset({"gopher_repetition", "gopher_quality", "c4_lines", "c4_page"}),
        min_sentences=5,
        drop_curly_brackets=True,
        require_terminal_punctuation=True,
        cut_notices=False,
    )

    def work(texts: list[str]) -> Any:
        verdicts = [judge(text, "prose", rules) for text in texts]
        return ((verdict.reason, verdict.text) for verdict in verdicts)

    return work


timing.run(load)
