import numpy as np
import torch

from raymill.dataset.shards import INDEX, ShardEntry, ShardIndex, TokenStream
from raymill.evaluation.comparison import compare
from raymill.evaluation.perplexity import evaluate_stream

HOW = {"seq_len": 48, "max_sequences": 6, "max_choices": 8, "batch_size": 4}


def test_each_model_gets_its_own_figures_of_the_same_text(tmp_path):
    starts = np.random.default_rng(0).permutation(90)[:20]
    ids = np.concatenate([(start + np.arange(48)) % 90 + 1 for start in starts]).astype("<u2")
    ids.tofile(tmp_path / "val-00000.bin")
    entry = ShardEntry(path="val-00000.bin", split="val", documents=1, tokens=len(ids), text_bytes=4000)
    index = ShardIndex(dtype="uint16", vocab_size=100, end_of_document_id=0, shards=(entry,))
    (tmp_path / INDEX).write_text(index.model_dump_json())
    stream = TokenStream(tmp_path, "val")
    told = []

    def knows(ids, documents):
        return 9.0 * torch.nn.functional.one_hot(ids % 90 + 1, 100).float()

    def guesses(ids, documents):
        return torch.zeros(*ids.shape, 100)

    good, bad = compare((knows, guesses), stream, on_sequences=lambda done, of: told.append((done, of)), **HOW)
    alone = evaluate_stream(knows, stream, seq_len=48, max_sequences=6, batch_size=4)
    assert (good.perplexity, good.accuracy) == (alone.perplexity, alone.accuracy)
    assert good.accuracy > 0.97 and good.choice_accuracy == 1.0
    assert abs(bad.perplexity - 100) < 0.01 and bad.accuracy == 0.0
    assert told == [(4, 6), (6, 6)]
