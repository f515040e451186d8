"""nanoGPT's way: ids memory-mapped anew for each batch, 8 random places, two slices for each; no document numbers."""

from argparse import Namespace
from typing import Any

import numpy as np
import torch
from timing import FEEDS, Loaded, serve


def load(options: Namespace) -> Loaded:
    path, length = options.tokens / "train-00000.bin", options.seq_len

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        ids = np.memmap(path, np.uint16, "r")
        places = torch.randint(len(ids) - length, (options.batch_size,))
        inputs = [torch.from_numpy(ids[at : at + length].astype(np.int64)) for at in places]
        targets = [torch.from_numpy(ids[at + 1 : at + 1 + length].astype(np.int64)) for at in places]
        return torch.stack(inputs), torch.stack(targets)

    def work() -> dict[str, Any]:
        for _ in range(FEEDS):
            batch()
        return {}

    return {}, work


serve(load)
