"""Where a step's sequences stand: read from the shard files at those places, the ids are the step's targets."""

from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest

from raymill.dataset.loader import IGNORE, Loader
from raymill.dataset.shards import PackingMethod, Place, TokenStream, lengths_name

SHARDS = ([5, 9, 21, 2], [40, 3, 3, 7])


@pytest.fixture
def stream(stream_of: Callable[..., TokenStream], documents_of: Callable[..., list[list[int]]]) -> TokenStream:
    """Two shards of documents whose ids count up."""
    return stream_of([documents_of(SHARDS[0], 1), documents_of(SHARDS[1], 1000)])


@pytest.mark.parametrize("packing", ("concat", "best_fit"))
def test_the_ids_at_the_places_are_the_targets(stream: TokenStream, tmp_path: Path, packing: PackingMethod) -> None:
    loader = Loader(stream, seq_len=8, global_batch_size=3, seed=1, packing=packing)
    for step in range(4):
        found = [
            np.fromfile(tmp_path / place.shard, "<u4")[place.token : place.token + place.tokens]
            for place in loader.places(step)
        ]
        targets = loader.batch(step, 0, 3).targets_BT.numpy()
        assert np.concatenate(found).tolist() == targets[targets != IGNORE].tolist()


@pytest.mark.parametrize("packing", ("concat", "best_fit"))
def test_the_document_is_that_of_the_first_id(stream: TokenStream, packing: PackingMethod) -> None:
    borders = {f"train-{number:05d}.bin": np.cumsum(lengths).tolist() for number, lengths in enumerate(SHARDS)}
    loader = Loader(stream, seq_len=8, global_batch_size=3, seed=1, packing=packing)
    for place in (place for step in range(4) for place in loader.places(step)):
        assert place.document == sum(border <= place.token for border in borders[place.shard])
        assert place.sequence in range(loader.num_sequences)


def test_a_sequence_over_two_shards_has_a_place_in_each(stream: TokenStream) -> None:
    places = stream.places(4, 33, 8)
    assert [astuple(place) for place in places] == [(4, "train-00000.bin", 33, 4, 2), (4, "train-00001.bin", 0, 4, 0)]


def test_without_lengths_the_document_is_not_known(stream: TokenStream, tmp_path: Path) -> None:
    (tmp_path / lengths_name("train-00001.bin")).unlink()
    assert stream.places(0, 40, 2) == [Place(0, "train-00001.bin", 3, 2, None)]
