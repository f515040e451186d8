"""The KV cache's memory: pages of PAGE_TOKENS positions, as many as a bound allows, reserved once, and who holds which.

A page holds keys and values of PAGE_TOKENS consecutive positions of one sequence in every layer: 2 x num_layers x
num_kv_heads x head_dim numbers for each position, 4 bytes each in fp32; in int8 1 byte each and one fp32 scale for each
head's key and value (4 layers of 2 heads of 64: 128 KiB a page, or 34). Where pages lie is the step's business; the native
one pads a value to 16 numbers, which counts here for every step.

`PagePool` counts who holds a page. A full page is found again by the ids that led to it, so sequences with one beginning
share its pages; pages that no one holds any more stay until others need the memory, least recently used first (the idea
is vLLM's: Kwon et al. 2023, arXiv:2309.06180). A page costs the pool about 1 us in its life, most of it the hash.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Literal

from raymill.errors import MachineError
from raymill.model.config import ModelConfig

PAGE_TOKENS = 32
_PADDED_TO = 16  # kLanes of native/vector.h
KvPrecision = Literal["fp32", "int8"]
PageKey = bytes
"""What a full page holds: a hash of its ids and of everything before them."""


def pages_for(tokens: int) -> int:
    """Pages that hold so many positions."""
    return -(-tokens // PAGE_TOKENS)


def page_bytes(config: ModelConfig, precision: KvPrecision = "fp32") -> int:
    """Memory of one page."""
    rows = config.num_layers * config.num_kv_heads * PAGE_TOKENS
    numbers = config.head_width + -(-config.head_width // _PADDED_TO) * _PADDED_TO  # of a key and a value
    return rows * (4 * numbers if precision == "fp32" else numbers + 2 * 4)


def fit_pages(config: ModelConfig, slots: int, max_bytes: int, precision: KvPrecision = "fp32") -> int:
    """As many pages as fit into `max_bytes`, at most what `slots` whole sequences need.

    MachineError when one sequence of max_seq_len does not fit.
    """
    whole = pages_for(config.max_seq_len)
    size = page_bytes(config, precision)
    fitting = min(slots * whole, max_bytes // size)
    if fitting < whole:
        need_mib = -(-whole * size // 2**20)
        smaller = ", or serve.kv_cache to int8" if precision == "fp32" else ""
        raise MachineError(
            "the KV cache does not fit",
            why=f"one sequence of {config.max_seq_len} tokens needs {need_mib} MiB; {max_bytes / 2**20:g} MiB are allowed",
            fix=f"set serve.max_kv_cache_mib to at least {need_mib}{smaller}",
        )
    return fitting


def first_key(adapter: int) -> PageKey:
    """What precedes a sequence's first page: keys and values depend on the adapter."""
    return adapter.to_bytes(4, "little")


def next_key(before: PageKey, ids: Sequence[int]) -> PageKey:
    """The key of the page that holds `ids` behind `before`. 128 bits: no one can make two that meet."""
    return blake2b(before + array("i", ids).tobytes(), digest_size=16).digest()


class PagePool:
    """Pages by number: free, held by sequences, or idle: held by none but full, so that they can be found again."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._holders = [0] * num_pages
        self._key_of: list[PageKey | None] = [None] * num_pages
        self._page_of: dict[PageKey, int] = {}
        self._free = list(range(num_pages - 1, -1, -1))  # the lowest first: used memory stays together
        self._idle: OrderedDict[int, None] = OrderedDict()  # longest unused first

    @property
    def available(self) -> int:
        """Pages that `take` can still give."""
        return len(self._free) + len(self._idle)

    def take(self) -> int:
        """A page for one's own; there must be one available."""
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            self._unname(page)
        self._holders[page] = 1
        return page

    def share(self, key: PageKey) -> int | None:
        """The page with this content, held once more; None when there is none. No one may write to it."""
        page = self._page_of.get(key)
        if page is not None:
            if not self._holders[page]:
                del self._idle[page]
            self._holders[page] += 1
        return page

    def is_held(self, key: PageKey) -> bool:
        """Whether sharing this content would take none of the available pages."""
        page = self._page_of.get(key)
        return page is not None and self._holders[page] > 0

    def name(self, page: int, key: PageKey) -> None:
        """Says what a held page, full and computed, holds. The first page with this content keeps the name."""
        if key not in self._page_of:
            self._page_of[key] = page
            self._key_of[page] = key

    def forget(self, pages: Iterable[int]) -> None:
        """What these pages hold is not to be trusted: no one finds them any more."""
        for page in pages:
            self._unname(page)

    def release(self, pages: Sequence[int]) -> None:
        """Gives a sequence's pages back. Its last ones go first when memory is needed: without its beginning a page is
        of no use."""
        for page in reversed(pages):
            self._holders[page] -= 1
            assert self._holders[page] >= 0, "a page was released twice"
            if self._holders[page]:
                continue
            if self._key_of[page] is None:
                self._free.append(page)
            else:
                self._idle[page] = None

    def _unname(self, page: int) -> None:
        key = self._key_of[page]
        if key is not None:
            del self._page_of[key]
            self._key_of[page] = None
