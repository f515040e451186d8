"""raymill's rules for prose, set up as datatrove's defaults."""

from argparse import Namespace
from collections.abc import Callable
from typing import Any

import timing

from raymill.corpus.filters import Rules, judge


def load(options: Namespace) -> Callable[[list[str]], Any]:
    rules = Rules(quality=True, min_words=50, drop_curly_brackets=True)
    return lambda texts: [judge(text, "prose", rules).reason for text in texts]


timing.run(load)
