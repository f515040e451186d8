"""The evaluate stage on Ray gives what one process computes."""

import json
from collections.abc import Callable

import pytest

from raymill.artifact import Artifact
from raymill.cluster.session import Cluster
from raymill.config import Config
from raymill.dataset.shards import TokenStream
from raymill.evaluation.perplexity import evaluate_stream
from raymill.model.config import ModelConfig
from raymill.model.transformer import Transformer
from raymill.model.weights import save_model
from raymill.stages import evaluate
from raymill.stages.contract import Inputs


def test_scores_of_two_workers_are_those_of_one_process(
    cluster: Cluster, tokens: Artifact, inputs: Callable[..., Inputs]
) -> None:
    shape = ModelConfig(num_layers=1, model_dim=16, num_heads=2, num_kv_heads=1, hidden_dim=32, max_seq_len=16)
    model = Transformer(shape, tokens.figures["vocab_size"])
    model.initialize(0)
    draft = inputs("train").draft
    save_model(draft.path, model, end_id=0)
    checkpoint = draft.publish("checkpoint", "train", config=Config(), inputs={}, summary="", figures={})
    made = evaluate.run(evaluate.Config(batch_size=8), inputs("evaluate", checkpoint, tokens), cluster)
    stream = TokenStream(tokens.path, "val")
    alone = evaluate_stream(model, stream, seq_len=16, max_sequences=None, batch_size=8)
    assert len(stream) > 64 * 16  # more than one range, or two workers are not tested
    assert made.figures["tokens"] == alone.tokens == len(stream) - 1
    assert made.figures["bits_per_byte"] == pytest.approx(alone.bits_per_byte, rel=1e-6)
    assert made.figures["accuracy"] == pytest.approx(alone.accuracy)
    assert json.loads(made.file("scores.json").read_text())["perplexity"] == made.figures["perplexity"]
