"""datatrove's Gopher repetition, Gopher quality and C4 filters, chained with their defaults."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import timing
from datatrove.data import Document
from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter


def load(options: Namespace) -> Callable[[list[str]], Any]:
    chain = [GopherRepetitionFilter(), GopherQualityFilter(), C4QualityFilter()]

    def judge(text: str) -> tuple[str | None, str]:
        document = Document(text=text, id="")
        for each in chain:
            verdict = each.filter(document)
            if verdict is not True:
                return verdict[1], document.text
        return None, document.text

    return lambda texts: [judge(text) for text in texts]


timing.run(load)
