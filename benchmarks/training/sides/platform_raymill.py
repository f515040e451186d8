"""The train stage through Ray Train, one worker of one thread; after each of its steps the same process does a bare step.

Bare is forward, backward, clipping and optimizer on a model of its own, with a batch that is ready. Both thus meet the
same minutes of a busy machine. What other threads work meanwhile (saving; of Ray's own only what runs in its steps) counts as the
platform's. The one validation, after the last step, is left out.
"""

import argparse
import json
import os
import shutil
from pathlib import Path
from typing import Any

from shape import shape
from timing import make_parser

from raymill.cluster.config import ClusterConfig
from raymill.cluster.session import Cluster
from raymill.config import load
from raymill.stages import train as stage

TIMES = "times.json"


def worker(settings: dict[str, Any]) -> None:
    """Runs in Ray's worker, in place of the stage's own function, which it calls."""
    import dataclasses
    import time

    import torch

    from raymill.dataset.loader import Loader
    from raymill.dataset.shards import TokenStream
    from raymill.model.transformer import Transformer
    from raymill.stages.train import work_as_worker
    from raymill.training import loop
    from raymill.training.losses import next_token
    from raymill.training.optimizer import build_optimizer

    original = loop.train
    scores = ("loss_nats", "bits_per_byte", "accuracy")
    clocks = (time.perf_counter, time.process_time, time.thread_time)

    def train(config: Any, tokens: Path, folder: Path, place: Any, hooks: Any, start: Any) -> Any:
        stream = TokenStream(tokens, "train")
        sizes = {"seq_len": config.model.max_seq_len, "global_batch_size": config.global_batch_size}
        loader = Loader(stream, **sizes, seed=config.seed)
        model = Transformer(config.model, stream.index.vocab_size).train()
        model.initialize(config.seed)
        optimizer = build_optimizer(model, config.optimizer)
        times: list[dict[str, list[float]]] = []
        before: list[float] = []

        def bare(number: int) -> list[float]:
            batch = loader.batch(number, 0, config.global_batch_size)
            began = [clock() for clock in clocks]
            loss = model(batch.inputs_BT, None, next_token(batch.targets_BT)) / batch.targets_BT.numel()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            return [clock() - at for clock, at in zip(clocks, began, strict=True)]

        def on_step(metrics: Any) -> None:
            product = [clock() - at for clock, at in zip(clocks, before, strict=True)] if before else None
            hooks.on_step(metrics)
            took = bare(metrics.step)
            if product is not None:
                times.append({"product": product, "bare": took})
            (Path(settings["work"]) / "times.json").write_text(json.dumps(times))
            before[:] = [clock() for clock in clocks]

        measured = dataclasses.replace(hooks, on_step=on_step, validate=lambda *_: dict.fromkeys(scores, 0.0))
        return original(config, tokens, folder, place, measured, start)

    loop.train = train
    work_as_worker(settings)


def main() -> None:
    options = _options()
    config = stage.Config(
        num_workers=1,
        max_failures=0,
        model=shape(options),
        steps=options.steps,
        global_batch_size=options.batch_size,
        microbatch_size=options.batch_size,
        mask_documents=False,
        checkpoint_every_steps=options.save_every,
        validate_every_steps=options.steps,
    )
    work = options.folder / "platform"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    settings = {
        "config": config.model_dump(mode="json"),
        "tokens": str(options.tokens.absolute()),
        "work": str(work.absolute()),
        "threads": 1,
        "gpu": False,
        "start": None,
    }
    stage.work_as_worker = worker
    with Cluster(load(ClusterConfig, None)) as cluster:
        cluster.connect()
        stage._trainer(config, settings, work, cluster).fit()
    channel.write((work / TIMES).read_text())
    channel.flush()


def _options() -> argparse.Namespace:
    parser = make_parser()
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--save-every", type=int, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
