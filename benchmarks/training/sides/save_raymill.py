"""raymill's checkpoint: a copy in memory that is kept, written by the background thread. A turn lasts until it is published."""

from argparse import Namespace
from typing import Any

from saved_state import saved, stepped_model
from timing import Loaded, serve

from raymill.model.files import WEIGHTS
from raymill.training.background import Background
from raymill.training.checkpoint import OPTIMIZER, write_checkpoint
from raymill.training.snapshot import Snapshot


def load(options: Namespace) -> Loaded:
    model, optimizer = stepped_model(options)
    config = model.config.to_hugging_face(model.vocab_size, 0)
    snapshot, background, step = Snapshot(), Background(), 0

    def state() -> dict[str, dict[str, Any]]:
        moments = {
            f"{name}/{parameter_name}": tensor
            for parameter_name, parameter in model.named_parameters()
            for name, tensor in optimizer.state[parameter].items()
        }
        return {WEIGHTS: dict(model.named_parameters()), OPTIMIZER: moments}

    snapshot.reserve(state())

    def save() -> None:
        nonlocal step
        step += 1
        number, files = step, snapshot.take(state())

        def job() -> None:
            write_checkpoint(options.folder / "raymill", number, files, config, {})
            snapshot.release()

        background.submit("save", job)

    size = sum(tensor.nbytes for tensors in state().values() for tensor in tensors.values())
    return {"state_bytes": size}, lambda: saved(save, background.finish)


serve(load)
