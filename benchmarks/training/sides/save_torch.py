"""torch's own ways to save weights and AdamW's state. `--variant`: save (torch.save), async (distributed.checkpoint's
async_save as it comes) or kept (the same with one stager for all saves, which keeps the copy's memory)."""

import warnings
from argparse import Namespace
from concurrent.futures import Future

import torch
import torch.distributed.checkpoint as dcp
from saved_state import saved, stepped_model
from timing import Loaded, serve
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions


def load(options: Namespace) -> Loaded:
    warnings.simplefilter("ignore")  # that there is one process only
    model, optimizer = stepped_model(options)
    # One stager for all saves keeps its memory; the options are those that async_save sets for its own.
    stager = DefaultStager(StagingOptions(False, False, False, False)) if options.variant == "kept" else None
    target = options.folder / f"torch-{options.variant}"
    running: Future | None = None

    def save() -> None:
        nonlocal running
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        if options.variant == "save":
            torch.save(state, target)
        else:
            writer = dcp.FileSystemWriter(target, overwrite=True)
            running = dcp.async_save(state, storage_writer=writer, async_stager=stager, no_dist=True)

    def wait() -> None:
        if running is not None:
            running.result()

    return {}, lambda: saved(save, wait)


serve(load)
