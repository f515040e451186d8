from collections import Counter

import pytest
import torch

from raymill.inference.sampling import Sampling, choose, uniform


def draws(probabilities, count=4000, **settings):
    logits = torch.tensor(probabilities).log()[None].expand(count, -1)
    chosen = choose(logits, [Sampling(seed=1, **settings)] * count, range(count))
    return Counter(chosen)


def test_temperature_zero_is_the_argmax():
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    assert choose(logits, [Sampling(temperature=0)] * 5, [0] * 5) == logits.argmax(-1).tolist()


def test_a_draw_follows_the_probabilities():
    seen = draws([0.5, 0.3, 0.2])
    assert [seen[i] / 4000 for i in range(3)] == pytest.approx([0.5, 0.3, 0.2], abs=0.03)


def test_temperature_sharpens():
    assert draws([0.5, 0.3, 0.2], temperature=0.5)[0] / 4000 == pytest.approx(0.25 / 0.38, abs=0.03)
    assert draws([0.5, 0.3, 0.2], temperature=1e-6) == {0: 4000}


def test_top_k_keeps_the_likeliest():
    seen = draws([0.2, 0.5, 0.3], top_k=2)
    assert set(seen) == {1, 2} and seen[1] / 4000 == pytest.approx(5 / 8, abs=0.03)


def test_top_p_keeps_the_fewest_that_reach_it():
    assert set(draws([0.2, 0.5, 0.3], top_p=0.5)) == {1}
    assert set(draws([0.2, 0.5, 0.3], top_p=0.51)) == {1, 2}
    assert set(draws([0.2, 0.5, 0.3], top_p=1e-9)) == {1}


def test_top_p_is_measured_within_top_k():
    # Of the two likeliest, 0.5 / 0.8 = 0.625 is one token's share.
    assert set(draws([0.2, 0.5, 0.3], top_k=2, top_p=0.62)) == {1}
    assert set(draws([0.2, 0.5, 0.3], top_k=2, top_p=0.63)) == {1, 2}


@pytest.mark.parametrize(
    "settings", [{}, {"top_p": 0.9}, {"top_p": 0.999}, {"top_k": 600}, {"top_k": 600, "top_p": 0.7}]
)
def test_the_shortcut_through_the_likeliest_changes_nothing(settings, monkeypatch):
    logits = torch.randn(300, 1000, generator=torch.Generator().manual_seed(0)) * 1.5
    sampling = [Sampling(seed=3, **settings)] * 300
    quick = choose(logits, sampling, range(300))
    monkeypatch.setattr("raymill.inference.sampling._LIKELIEST", 1000)
    assert quick == choose(logits, sampling, range(300))


def test_a_draw_depends_on_its_own_row_only():
    logits = torch.randn(6, 200, generator=torch.Generator().manual_seed(0))
    samplings = [Sampling(temperature=t, seed=s) for t, s in ((1, 1), (0, 2), (0.7, 3), (1, 1), (2, 5), (1, 6))]
    together = choose(logits, samplings, range(6))
    assert together == [choose(logits[i : i + 1], [samplings[i]], [i])[0] for i in range(6)]


def test_seeds_and_counters_give_other_numbers_in_the_unit_interval():
    numbers = [uniform(seed, number) for seed in (0, 1, 2**63 - 1) for number in range(1000)]
    assert len(set(numbers)) == 3000 and min(numbers) >= 0 and max(numbers) < 1
    assert sum(numbers) / 3000 == pytest.approx(0.5, abs=0.02)
    assert uniform(5, 7) == uniform(5, 7)
