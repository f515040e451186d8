"""Work over Ray Data: every item once, and errors that reach the user as themselves."""

from __future__ import annotations

import pytest

from raymill.cluster.data import map_items
from raymill.cluster.session import Cluster
from raymill.errors import DataError, MachineError


def test_results_and_errors(cluster: Cluster) -> None:
    def work(item: tuple[str, int]) -> int:
        name, number = item
        if name == "user":
            raise DataError("the text is bad", where="a.txt", fix="mend it")
        if name == "disk":
            raise OSError(28, "No space left on device", "/full")
        return number * number

    assert sorted(map_items(cluster, work, [("ok", number) for number in range(5)])) == [0, 1, 4, 9, 16]
    assert list(map_items(cluster, work, [])) == []
    with pytest.raises(DataError) as bad_text:
        list(map_items(cluster, work, [("user", 0)]))
    assert (bad_text.value.what, bad_text.value.where, bad_text.value.fix) == ("the text is bad", "a.txt", "mend it")
    with pytest.raises(MachineError) as full_disk:
        list(map_items(cluster, work, [("disk", 0)]))
    assert full_disk.value.why == "[Errno 28] No space left on device: '/full'"
