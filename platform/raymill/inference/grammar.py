"""Output that conforms to a JSON schema: which ids may come next, decided by llguidance.

`Grammars` is made once per tokenizer; a `Grammar` is one compiled schema, shared by requests; a `Match` follows one
completion. Masks cost about 50 us a token.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.uint32]
"""(ceil(V / 32),): bit i % 32 of word i // 32 says whether id i may come next."""


class Match(Protocol):
    """A grammar on the way through one completion."""

    def mask(self) -> Mask:
        """The ids that may come next; the end token only where the text may end."""
        ...

    def advance(self, token: int) -> None:
        """Takes the token that came."""
        ...


class Grammar(Protocol):
    """A compiled constraint."""

    def start(self) -> Match:
        """A completion's beginning."""
        ...
