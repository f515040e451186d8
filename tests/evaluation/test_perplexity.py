import math
from pathlib import Path

import numpy as np
import pytest
import torch

from raymill.dataset.shards import INDEX, ShardEntry, ShardIndex, TokenStream, learn_name
from raymill.errors import DataError
from raymill.evaluation.perplexity import evaluate_stream

VOCAB = 7


def stream_of(
    folder: Path, *shards: list[int], text_bytes: int = 40, masks: list[list[int]] | None = None
) -> TokenStream:
    entries = []
    for number, ids in enumerate(shards):
        name = f"val-{number:05d}.bin"
        np.array(ids, "<u2").tofile(folder / name)
        if masks is not None:
            np.array(masks[number], np.uint8).tofile(folder / learn_name(name))
        sizes = {"documents": 1, "tokens": len(ids), "text_bytes": text_bytes}
        entries.append(ShardEntry(path=name, split="val", has_learn_mask=masks is not None, **sizes))
    index = ShardIndex(dtype="uint16", vocab_size=VOCAB, end_of_document_id=0, shards=tuple(entries))
    (folder / INDEX).write_text(index.model_dump_json())
    return TokenStream(folder, "val")


def uniform(ids_BT: torch.Tensor, documents_BT: torch.Tensor) -> torch.Tensor:
    return torch.zeros(*ids_BT.shape, VOCAB)


def successor(ids_BT: torch.Tensor, documents_BT: torch.Tensor) -> torch.Tensor:
    """Knows that id + 1 follows id, with 5 nats of conviction."""
    return 5.0 * torch.nn.functional.one_hot((ids_BT + 1) % VOCAB, VOCAB).float()


def test_a_uniform_guess_costs_log_vocab_per_token(tmp_path):
    stream = stream_of(tmp_path, [i % VOCAB for i in range(20)])
    scores = evaluate_stream(uniform, stream, seq_len=6, max_sequences=None, batch_size=2)
    assert scores.tokens == 19
    assert scores.perplexity == pytest.approx(VOCAB, rel=1e-6)
    assert scores.bits_per_byte == pytest.approx(math.log2(VOCAB) * 20 / 40, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("seq_len", [1, 6, 19, 500])
def test_every_token_but_the_first_is_predicted_once_across_shards(tmp_path, seq_len, batch_size):
    stream = stream_of(tmp_path, [0, 1, 2, 3, 4, 5, 6, 0, 1], [2, 3, 3, 4, 5, 6, 0, 1, 2, 3, 4])
    scores = evaluate_stream(successor, stream, seq_len=seq_len, max_sequences=None, batch_size=batch_size)
    assert scores.tokens == 19
    assert scores.accuracy == pytest.approx(18 / 19)  # 3 -> 3 is the one surprise
    sure = math.log(math.exp(5) + VOCAB - 1)
    assert scores.loss_nats == pytest.approx(sure - 5 * 18 / 19, rel=1e-5)


def test_a_bounded_evaluation_reads_windows_spread_over_the_stream(tmp_path):
    stream = stream_of(tmp_path, [0, 1, 2, 6, 6, 6, 6, 0, 1, 5, 5, 5])
    scores = evaluate_stream(successor, stream, seq_len=3, max_sequences=2, batch_size=8)
    assert scores.tokens == 6
    assert scores.accuracy == 4 / 6  # windows 0 1 2 6 and 6 0 1 5, not 6 6 6 6
    whole = evaluate_stream(successor, stream, seq_len=3, max_sequences=100, batch_size=8)
    assert whole.tokens == 11


def test_logits_in_half_precision_are_scored_in_full(tmp_path):
    stream = stream_of(tmp_path, [i % VOCAB for i in range(50)])
    half = evaluate_stream(
        lambda ids, documents: successor(ids, documents).bfloat16(), stream, seq_len=8, max_sequences=None, batch_size=4
    )
    full = evaluate_stream(successor, stream, seq_len=8, max_sequences=None, batch_size=4)
    assert half.loss_nats == pytest.approx(full.loss_nats, rel=1e-6)


def test_one_token_is_nothing_to_predict(tmp_path):
    with pytest.raises(DataError, match="nothing to predict"):
        evaluate_stream(uniform, stream_of(tmp_path, [3]), seq_len=4, max_sequences=None, batch_size=1)


@pytest.mark.parametrize(("seq_len", "batch_size"), [(1, 1), (3, 2), (7, 3), (500, 1)])
def test_only_learned_ids_are_judged_and_bits_per_byte_are_not_claimed(tmp_path, seq_len, batch_size):
    shards = [[0, 1, 2, 3, 5, 5, 6, 0, 1], [2, 3, 3, 4, 5, 6]]
    masks = [[1, 0, 0, 1, 1, 0, 0, 1, 1], [1, 0, 1, 0, 0, 1]]
    stream = stream_of(tmp_path, *shards, masks=masks)
    scores = evaluate_stream(successor, stream, seq_len=seq_len, max_sequences=None, batch_size=batch_size)
    assert scores.tokens == 7  # the first id, learned or not, is never predicted
    assert scores.accuracy == pytest.approx(5 / 7)  # 3 -> 5 and 3 -> 3
    assert scores.loss_nats == pytest.approx(math.log(math.exp(5) + VOCAB - 1) - 5 * 5 / 7, rel=1e-5)
    assert scores.bits_per_byte is None


def test_nothing_to_learn_is_nothing_to_judge(tmp_path):
    stream = stream_of(tmp_path, [1, 2, 3], masks=[[1, 0, 0]])
    with pytest.raises(DataError, match="nothing in the val split is to be learned"):
        evaluate_stream(uniform, stream, seq_len=4, max_sequences=None, batch_size=1)


def test_documents_begin_where_an_end_id_is_read(tmp_path):
    stream = stream_of(tmp_path, [1, 2, 0, 3, 4, 0, 5, 6, 1])
    seen = []

    def forward(ids_BT: torch.Tensor, documents_BT: torch.Tensor) -> torch.Tensor:
        seen.append(documents_BT.tolist())
        return uniform(ids_BT, documents_BT)

    evaluate_stream(forward, stream, seq_len=4, max_sequences=None, batch_size=8)
    assert seen == [[[0, 0, 1, 1], [0, 1, 1, 1]]]
