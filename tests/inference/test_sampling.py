import subprocess
import sys
import textwrap
from collections import Counter

import numpy as np
import pytest

from raymill.errors import ArtifactError
from raymill.inference import compiled_draws, native
from raymill.inference.draws import MOST_IDS, check_vocabulary
from raymill.inference.sampling import NO_TOKEN, Sampler, Sampling, choose, score, uniform

needs_compiler = pytest.mark.skipif(native.library() is None, reason="no C++ compiler")


@pytest.fixture(params=["numpy", pytest.param("compiled", marks=needs_compiler)])
def way(request, monkeypatch):
    """Every test with it runs in numpy and in compiled code."""
    if request.param == "numpy":
        monkeypatch.setattr(compiled_draws, "functions", lambda: None)
    return request.param


class Only:
    """A grammar that allows some ids, whatever came."""

    def __init__(self, ids, vocab_size):
        bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
        bits[list(ids)] = 1
        self._mask = np.packbits(bits, bitorder="little").view(np.uint32)

    def mask(self):
        return self._mask

    def advance(self, token):
        pass


def logits_of(probabilities):
    return np.log(np.array(probabilities, np.float32))[None]


def draws(logits_V, count=4000, **settings):
    sampler = Sampler(Sampling(**settings))
    seen = Counter()
    for sampler.number in range(count):
        seen[choose(logits_V, (0,), [sampler])[0][0]] += 1
    return seen


def expected(logits_V, temperature=1.0, top_k=None, min_p=0.0, top_p=1.0):
    """The distribution in fp64, by its definition."""
    scaled = logits_V[0].astype(np.float64) / temperature
    found = np.exp(scaled - scaled.max())
    order = np.argsort(-found, kind="stable")
    found[order[top_k or len(found) :]] = 0
    found[found < min_p] = 0
    found /= found.sum()
    reached = np.cumsum(found[order])
    found[order[int((reached < top_p - 1e-9).sum()) + 1 :]] = 0
    return found / found.sum()


CUTS = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.8},
    {"top_k": 5},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"top_k": 8, "top_p": 0.8},
    {"top_k": 8, "min_p": 0.1},
    {"min_p": 0.05, "top_p": 0.9},
    {"temperature": 1.4, "top_k": 12, "min_p": 0.08, "top_p": 0.85},
]


@pytest.mark.parametrize("cuts", CUTS, ids=str)
def test_draws_follow_the_cut_distribution(way, cuts):
    logits = np.random.default_rng(3).normal(0, 1.5, (1, 150)).astype(np.float32)
    wanted = expected(logits, **cuts)
    count = 3000
    seen = draws(logits, count, seed=11, **cuts)
    assert set(seen) <= set(np.flatnonzero(wanted)), "a token that is cut"
    # Tokens with fewer than 8 expected draws share one cell of the chi-square statistic.
    large = wanted * count >= 8
    hopes = np.append(wanted[large], wanted[~large].sum()) * count
    found = np.append([seen[i] for i in np.flatnonzero(large)], sum(seen[i] for i in np.flatnonzero(~large)))
    kept = hopes > 0
    statistic = ((found[kept] - hopes[kept]) ** 2 / hopes[kept]).sum()
    freedom = kept.sum() - 1
    assert statistic < freedom + 4 * np.sqrt(2 * freedom) + 4  # p of about 1e-4


def test_temperature_zero_is_the_argmax_and_the_lowest_id_among_equals(way):
    logits = np.round(np.random.default_rng(0).normal(0, 1, (8, 200))).astype(np.float32)
    logits[0] = -0.0
    logits[0, 100] = 0.0
    samplers = [Sampler(Sampling(temperature=0)) for _ in range(8)]
    wanted = [(int(token), None) for token in logits.argmax(-1)]
    assert choose(logits, range(8), samplers) == wanted and wanted[0] == (0, None)
    with_settings = [Sampler(Sampling(temperature=0, logit_bias=((5, 0.0),))) for _ in range(8)]
    assert choose(logits, range(8), with_settings) == wanted


def test_rows_are_chosen_by_number(way):
    logits = np.eye(4, dtype=np.float32)
    samplers = [Sampler(Sampling(temperature=temperature)) for temperature in (0, 1e-6)]
    assert [token for token, _ in choose(logits, (3, 1), samplers)] == [3, 1]
    assert [token for token, _ in choose(logits, (2,), samplers[:1])] == [2]


def test_top_p_keeps_the_fewest_that_reach_it(way):
    logits = logits_of([0.2, 0.5, 0.3])
    assert set(draws(logits, 500, top_p=0.4999)) == {1}
    assert set(draws(logits, 500, top_p=0.51)) == {1, 2}
    assert set(draws(logits, 500, top_p=0)) == {1}
    # Of the two likeliest, 0.5 / 0.8 = 0.625 is one token's share.
    assert set(draws(logits, 500, top_k=2, top_p=0.62)) == {1}
    assert set(draws(logits, 500, top_k=2, top_p=0.63)) == {1, 2}


def test_cuts_among_equals_keep_the_lowest_ids(way):
    logits = np.zeros((1, 300), np.float32)
    assert set(draws(logits, 300, top_k=7)) == set(range(7))
    assert set(draws(logits, 300, top_p=0.01)) == {0, 1, 2}
    assert set(draws(logits, 300, top_k=100, top_p=0.05)) == set(range(5))


@pytest.mark.parametrize("settings", [{}, {"top_k": 5}, {"top_p": 0.9}], ids=str)
def test_a_point_between_two_tokens_is_the_later_ones(way, settings, monkeypatch):
    logits = np.array([[-200, 0, -200, 0, 0, -200, 0]], np.float32)  # what weighs nothing is never drawn
    for share, token in enumerate((1, 3, 4, 6)):
        for point, wanted in ((share / 4, token), (np.nextafter((share + 1) / 4, 0), token)):
            monkeypatch.setattr("raymill.inference.sampling.uniform", lambda seed, number, point=point: point)
            assert choose(logits, (0,), [Sampler(Sampling(**settings))])[0][0] == wanted


def test_penalties_and_bias_against_their_definitions(way):
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 2, (1, 90)).astype(np.float32)
    prompt, completion = (3, 4, 4, 80), (4, 9, 9, 9)
    sampling = Sampling(0, 1, None, 0, 0.7, 0.3, 1.4, ((9, 2.5), (50, -1.0)))
    sampler = Sampler(sampling, prompt)
    for token in completion:
        sampler.push(token)
    edited = logits[0].astype(np.float64)
    for token, bias in sampling.logit_bias:
        edited[token] += bias
    for token in {*prompt, *completion}:
        edited[token] = edited[token] / 1.4 if edited[token] > 0 else edited[token] * 1.4
        count = completion.count(token)
        edited[token] -= 0.3 * count + 0.7 * (count > 0)
    # The whole edited row shows in the order in which tokens are taken once the earlier ones are forbidden.
    left, order = set(range(90)), []
    while left:
        sampler.match = Only(left, 90)
        order.append(choose(logits, (0,), [sampler])[0][0])
        left.remove(order[-1])
    assert order == np.argsort(-edited).tolist()


def test_prompt_tokens_count_for_repetition_only(way):
    logits = logits_of([0.6, 0.4])
    for settings, token in (({"presence_penalty": 2.0, "frequency_penalty": 2.0}, 0), ({"repetition_penalty": 2.0}, 1)):
        sampler = Sampler(Sampling(temperature=0, **settings), prompt_ids=(0, 0))
        assert choose(logits, (0,), [sampler])[0][0] == token


def test_a_mask_allows_nothing_else(way):
    logits = np.random.default_rng(1).normal(0, 1, (1, 100)).astype(np.float32)
    for temperature in (0.0, 1.0):
        sampler = Sampler(Sampling(temperature=temperature, logit_bias=((1, 100.0),)), match=Only({2, 64, 99}, 100))
        for sampler.number in range(50):
            assert choose(logits, (0,), [sampler])[0][0] in {2, 64, 99}
    short = Sampler(Sampling(temperature=0), match=Only({2}, 32))  # the model's head is wider than the tokenizer
    assert choose(logits, (0,), [short])[0][0] == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 40, 69])
def test_a_row_that_is_not_finite_has_no_token(way, bad, place):
    logits = np.zeros((2, 70), np.float32)
    logits[0, place] = bad
    for settings in ({"temperature": 0}, {}):
        samplers = [Sampler(Sampling(**settings), logprobs=1 if settings else None) for _ in range(2)]
        (spoilt, fine) = choose(logits, (0, 1), samplers)
        assert spoilt == (NO_TOKEN, None) and fine[0] >= 0
    assert not compiled_draws.is_finite(logits) and compiled_draws.is_finite(logits[1])


@pytest.mark.parametrize("vocab_size", [70, 5000])  # fewer blocks than likeliest ids, and more
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_has_no_order_and_no_score(way, bad, vocab_size):
    logits = np.zeros((2, vocab_size), np.float32)
    logits[0, ::40], logits[1, 7] = bad, 3.0
    spoilt, fine = score(logits, (1, 7), 20)
    assert np.isnan([spoilt.logprob, *(nats for _, nats in spoilt.top)]).all() and len(spoilt.top) == 20
    assert fine.top[0] == (7, fine.logprob) and np.isfinite(fine.logprob)


def test_a_mask_that_allows_nothing_gives_no_token(way):
    sampler = Sampler(Sampling(), match=Only((), 70), logprobs=2)
    assert choose(np.zeros((1, 70), np.float32), (0,), [sampler]) == [(NO_TOKEN, None)]


@pytest.mark.parametrize("vocab_size", [3, 64, 5000])
def test_logprobs_are_of_the_raw_logits(way, vocab_size):
    logits = np.random.default_rng(2).normal(0, 4, (3, vocab_size)).astype(np.float32)
    wide = logits.astype(np.float64)
    wanted = (
        wide - np.log(np.exp(wide - wide.max(-1, keepdims=True)).sum(-1, keepdims=True)) - wide.max(-1, keepdims=True)
    )
    sampling = Sampling(temperature=0.5, top_k=2, presence_penalty=1.0, logit_bias=((1, 50.0),))
    chosen = choose(logits, range(3), [Sampler(sampling, logprobs=5) for _ in range(3)])
    for row, (token, found) in enumerate(chosen):
        order = np.argsort(-wide[row])[:5]
        assert found.token == token and found.logprob == pytest.approx(wanted[row, token], abs=1e-7)
        assert [each for each, _ in found.top] == order.tolist()
        assert [value for _, value in found.top] == pytest.approx(wanted[row, order], abs=1e-7)
    scored = score(logits, [2, 0, 1], 5)
    assert [each.logprob for each in scored] == pytest.approx([wanted[0, 2], wanted[1, 0], wanted[2, 1]], abs=1e-7)
    assert [each.top for each in scored] == [found.top for _, found in chosen]
    assert choose(logits, (0,), [Sampler(sampling, logprobs=0)])[0][1].top == ()


def test_a_draw_depends_on_its_own_row_only(way):
    logits = np.random.default_rng(0).normal(0, 1, (6, 200)).astype(np.float32)
    samplers = [Sampler(Sampling(temperature=t, seed=s)) for t, s in ((1, 1), (0, 2), (0.7, 3), (1, 1), (2, 5), (1, 6))]
    together = choose(logits, range(6), samplers)
    assert together == [choose(logits[i : i + 1], (0,), [samplers[i]])[0] for i in range(6)]
    assert choose(logits, range(6), samplers) == together, "choosing changes nothing"


@needs_compiler
@pytest.mark.parametrize(
    "target", [None, *(pytest.param(target, marks=pytest.mark.slow) for target in native.build.TARGETS[1:])]
)
def test_compiled_code_and_numpy_choose_the_same(target, monkeypatch):
    if target not in (None, *native.build.runnable_targets()):
        pytest.skip("this CPU does not run it")
    library = compiled_draws.functions(target)
    rng = np.random.default_rng(9)
    shapes = [1, 2, 7, 63, 64, 65, 128, 1000, 20_000]
    for vocab_size in rng.choice(shapes, 60, p=[0.1, 0.1, 0.1, 0.15, 0.15, 0.15, 0.13, 0.1, 0.02]):
        logits = rng.normal(0, rng.choice([0.1, 1, 3, 10]), (16, vocab_size))
        grain = rng.choice([0, 0, 1, 0.25])  # coarse grains make ties
        logits = (np.round(logits / grain) * grain if grain else logits).astype(np.float32)
        samplers = [any_sampler(rng, int(vocab_size)) for _ in range(16)]
        monkeypatch.setattr(compiled_draws, "functions", lambda: None)
        plain = choose(logits, range(16), samplers)
        monkeypatch.setattr(compiled_draws, "functions", lambda: library)
        assert choose(logits, range(16), samplers) == plain


def any_sampler(rng, vocab_size):
    sampling = Sampling(
        temperature=float(rng.choice([0, 1e-310, 1e-5, 0.7, 1, 1, 2])),
        top_p=float(rng.choice([1, 0.999999, 0.9, 0.5, 0, rng.random()])),
        top_k=[None, 1, 2, vocab_size, vocab_size + 5, max(1, vocab_size // 2)][rng.integers(6)],
        min_p=float(rng.choice([0, 0, 1e-9, 0.05, 1, rng.random()])),
        presence_penalty=float(rng.choice([0, 1.5, -2])),
        frequency_penalty=float(rng.choice([0, 0.3, -1])),
        repetition_penalty=float(rng.choice([1, 1.3, 0.5])),
        logit_bias=tuple(
            (int(token), float(rng.normal()) * 10) for token in rng.choice(vocab_size, min(vocab_size, 3), False)
        ),
        seed=int(rng.integers(2**40)),
    )
    match = Only(rng.choice(vocab_size, -(-vocab_size // 3), False), vocab_size) if rng.random() < 0.3 else None
    sampler = Sampler(sampling, tuple(rng.integers(0, vocab_size, 4).tolist()), match, [None, 0, 5][rng.integers(3)])
    for token in rng.integers(0, vocab_size, 3).tolist():
        sampler.push(token)
    return sampler


def test_seeds_and_counters_give_other_numbers_in_the_unit_interval():
    numbers = [uniform(seed, number) for seed in (0, 1, 2**63 - 1) for number in range(1000)]
    assert len(set(numbers)) == 3000 and min(numbers) >= 0 and max(numbers) < 1
    assert sum(numbers) / 3000 == pytest.approx(0.5, abs=0.02)
    assert uniform(5, 7) == uniform(5, 7)


def test_the_largest_vocabulary_is_drawn_from_evenly(way):
    """Equal logits weigh the most together: the sum of one id more would overflow."""
    check_vocabulary(MOST_IDS, "config.json")
    logits = np.zeros((1, MOST_IDS), np.float32)
    ids = [token for seed in range(4) for token, _ in choose(logits, (0,), [Sampler(Sampling(seed=seed))])]
    assert ids == [int(uniform(seed, 0) * MOST_IDS) for seed in range(4)]
    with pytest.raises(ArtifactError, match="a vocabulary of 1,048,576 ids is too large"):
        check_vocabulary(MOST_IDS + 1, "config.json")


def test_the_draws_of_a_seed_stay_what_they_were(way):
    """A seed is a promise across versions, too."""
    logits = np.arange(20, dtype=np.float32)[None] / 5
    sampler, tokens = Sampler(Sampling(seed=42, top_p=0.95)), []
    for sampler.number in range(12):
        tokens.append(choose(logits, (0,), [sampler])[0][0])
    assert tokens == [10, 15, 12, 19, 15, 13, 16, 18, 16, 14, 18, 15]


def test_no_torch_and_no_numba():
    code = """
        import sys
        sys.modules["torch"] = sys.modules["numba"] = None
        import raymill.inference.sampling, raymill.inference.grammar, raymill.inference.requests
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
