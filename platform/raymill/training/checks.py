"""What can be found wrong with a run's inputs before a worker starts."""

from __future__ import annotations

from pathlib import Path

from raymill.artifact import Artifact
from raymill.dataset.loader import Loader
from raymill.dataset.shards import TokenStream
from raymill.errors import UsageError
from raymill.model.config import describe_difference
from raymill.model.files import TOKENIZER, read_config, read_model_config
from raymill.training.config import TrainingConfig


def check_start(config: TrainingConfig, start: Artifact, tokens: Artifact) -> None:
    """UsageError unless the checkpoint to start from has this job's shape and tokenizer."""
    fix = "set train.model as in its config.json, and start from tokens made with its tokenizer"
    if "quantization" in read_config(start.path):
        raise UsageError(
            f"the model in {start.path} is quantized", where="start_from", fix="start from the one it was made of"
        )
    found, vocab_size = read_model_config(start.path)
    why = describe_difference(found, config.model)
    if vocab_size != tokens.figures["vocab_size"]:
        why = f"its vocabulary has {vocab_size} ids, that of the tokens {tokens.figures['vocab_size']}"
    if why:
        raise UsageError(f"the model in {start.path} is not that of train.model", where="start_from", why=why, fix=fix)
    if start.file(TOKENIZER).read_bytes() != tokens.file(TOKENIZER).read_bytes():
        raise UsageError(f"the model in {start.path} was trained with another tokenizer", where="start_from", fix=fix)


def check_tokens(config: TrainingConfig, tokens: Path) -> None:
    """DataError, before any worker starts, when the splits cannot make a batch or a validation, or hold an unknown id."""
    length = config.model.max_seq_len
    train, val = TokenStream(tokens, "train"), TokenStream(tokens, "val")
    Loader(train, seq_len=length, global_batch_size=config.global_batch_size, seed=config.seed, packing=config.packing)
    Loader(val, seq_len=length, global_batch_size=1, seed=config.seed)
    for stream in (train, val):
        stream.check_vocabulary()
