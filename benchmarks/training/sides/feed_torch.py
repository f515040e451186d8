"""torch's DataLoader in this process over memory-mapped windows, shuffled, its own collation, no document numbers."""

from argparse import Namespace
from typing import Any

import numpy as np
import torch
from timing import FEEDS, Loaded, serve
from torch.utils.data import DataLoader, Dataset


class Windows(Dataset):
    def __init__(self, options: Namespace) -> None:
        self._ids = np.asarray(np.memmap(options.tokens / "train-00000.bin", np.uint16, "r"))
        self._length = options.seq_len

    def __len__(self) -> int:
        return (len(self._ids) - 1) // self._length

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = number * self._length
        ids = torch.from_numpy(self._ids[start : start + self._length + 1].astype(np.int64))
        return ids[:-1], ids[1:]


def load(options: Namespace) -> Loaded:
    loader = DataLoader(Windows(options), batch_size=options.batch_size, shuffle=True, drop_last=True)
    batches = iter(loader)

    def work() -> dict[str, Any]:
        nonlocal batches
        for _ in range(FEEDS):
            try:
                next(batches)
            except StopIteration:
                batches = iter(loader)
                next(batches)
        return {}

    return {}, work


serve(load)
