import torch

from raymill.compression.gptq import round_with_moments
from raymill.compression.int8 import row_scales


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scaled(weight):
    """int4's range with one scale a row."""
    return (row_scales(weight) * 127 / 7).expand_as(weight)


def rounded(weight, scale):
    return (weight / scale).round().clamp(-8, 7)


def test_outputs_err_far_less_than_rounding_where_inputs_are_correlated():
    weight = drawn(40, 160)
    x = drawn(2000, 24, seed=1) @ drawn(24, 160, seed=2) + 0.1 * drawn(2000, 160, seed=3)
    scale = scaled(weight)
    values = round_with_moments(weight, scale, (x.t() @ x).double(), -8, 7)
    assert bool((values == values.round()).all()) and values.min() >= -8 and values.max() <= 7
    error, plain = (((each * scale - weight) @ x.t()).square().sum() for each in (values, rounded(weight, scale)))
    assert error < 0.3 * plain


def test_inputs_without_correlation_leave_plain_rounding():
    weight = drawn(40, 160)
    values = round_with_moments(weight, scaled(weight), torch.eye(160, dtype=torch.float64), -8, 7)
    assert torch.equal(values, rounded(weight, scaled(weight)))


def test_inputs_that_are_always_zero_do_no_harm():
    weight, x = drawn(8, 64), drawn(500, 64, seed=1)
    x[:, 10:20] = 0
    values = round_with_moments(weight, scaled(weight), (x.t() @ x).double(), -8, 7)
    assert bool(torch.isfinite(values).all())
    assert torch.equal(values[:, 10:20], rounded(weight, scaled(weight))[:, 10:20])


def test_fewer_tokens_than_channels_are_enough_to_go_on():
    weight, x = drawn(8, 64), drawn(5, 64, seed=1)
    assert bool(torch.isfinite(round_with_moments(weight, scaled(weight), (x.t() @ x).double(), -8, 7)).all())


def test_weights_that_were_pruned_stay_zero_and_the_others_make_up_for_them():
    weight = drawn(40, 160)
    weight[drawn(40, 160, seed=4) > 0] = 0
    x = drawn(2000, 24, seed=1) @ drawn(24, 160, seed=2) + 0.1 * drawn(2000, 160, seed=3)
    scale = scaled(weight)
    values = round_with_moments(weight, scale, (x.t() @ x).double(), -8, 7)
    assert not bool(values[weight == 0].any())
    error, plain = (((each * scale - weight) @ x.t()).square().sum() for each in (values, rounded(weight, scale)))
    assert error < 0.5 * plain
