"""Records and further pieces = kept + dropped + quarantined, or the program stops."""

from __future__ import annotations

from collections import Counter

import pytest

from raymill.corpus.accounting import Account


def account() -> Account:
    dropped, quarantined = Counter(too_short=2, symbols=2), Counter(nul=1)
    return Account(8, 2, 5, dropped, quarantined, Counter(removed_lines=4))


def test_a_gap_is_found() -> None:
    account().check()
    lost = account()
    lost.kept -= 1
    with pytest.raises(AssertionError, match="8 records came in, 9 are placed"):
        lost.check()


def test_sums_and_moves_stay_exact() -> None:
    total = Account()
    total.add(account())
    total.add(Account.from_json(account().to_json()))
    total.drop_kept("exact_duplicate", 3)
    total.drop_kept("near_duplicate", 0)
    total.check()
    assert (total.records, total.pieces, total.kept) == (16, 4, 7)
    assert total.changed == {"removed_lines": 8}
    assert total.dropped == {"too_short": 4, "symbols": 4, "exact_duplicate": 3}


def test_the_line_ranks_reasons() -> None:
    assert account().losses() == "dropped 4: symbols 2, too_short 2; quarantined 1: nul 1"
    assert Account().losses() == "dropped 0; quarantined 0"
