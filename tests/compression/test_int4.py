import torch

from raymill.compression.int4 import Int4Linear, group_scales, pack, quantize_groups, unpack
from raymill.compression.int8 import quantize_rows


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_two_values_stand_in_a_byte_the_even_column_low():
    values = torch.tensor([[-8, 7, 0, -1]])
    assert pack(values).tolist() == [[0xF0, 0x78]]
    every = torch.arange(-8, 8).repeat(2, 1)
    assert torch.equal(unpack(pack(every)), every.to(torch.int8))


def test_the_layer_is_the_integers_summed_by_group():
    weight, x, bias = drawn(48, 128), drawn(9, 128, seed=1) * 3, drawn(48, seed=2)
    packed, scale = quantize_groups(weight, 32)
    assert packed.shape == (48, 64) and packed.dtype == torch.uint8 and scale.dtype == torch.float16
    values_x, scale_x = quantize_rows(x)
    expected = torch.zeros(9, 48, dtype=torch.float64)
    for group in range(4):
        at = slice(32 * group, 32 * group + 32)
        sums = values_x[:, at].long() @ unpack(packed)[:, at].long().t()
        expected += sums.double() * scale[:, group].double()
    expected = expected * scale_x.double() + bias.double()
    assert torch.allclose(Int4Linear(packed, scale, bias)(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_the_layer_is_blind_to_a_rows_neighbours():
    layer, x = Int4Linear(*quantize_groups(drawn(48, 64), 32)), drawn(2, 5, 64, seed=1)
    alone = torch.stack([torch.cat([layer(x[i, j][None]) for j in range(5)]) for i in range(2)])
    assert torch.equal(alone, layer(x))


def test_a_searched_scale_errs_less_than_the_widest_in_every_group():
    weight = drawn(64, 128)
    groups = weight.unflatten(-1, (-1, 32))

    def errors(scale):
        step = scale.float()[..., None]
        return ((groups / step).round().clamp(-8, 7) * step - groups).square().sum(-1)

    searched, widest = errors(group_scales(weight, 32)), errors(groups.abs().amax(-1) / 7)
    assert searched.sum() < 0.9 * widest.sum()
    assert bool((searched <= widest * 1.05).all())


def test_important_channels_are_rounded_finer():
    weight = drawn(64, 64)
    importance = torch.where(torch.arange(64) % 32 < 4, 1000.0, 1e-3)

    def error(scale):
        step = scale.float().repeat_interleave(32, 1)
        wrong = (weight / step).round().clamp(-8, 7) * step - weight
        return (wrong.square() * importance).sum()

    assert error(group_scales(weight, 32, importance)) < 0.7 * error(group_scales(weight, 32))


def test_zeros_and_weights_beyond_fp16_get_scales_that_are_numbers():
    weight = torch.zeros(3, 32)
    weight[1, 5], weight[2, 7] = 1e9, 1e-12
    packed, scale = quantize_groups(weight, 32)
    assert bool(torch.isfinite(scale).all()) and bool((scale != 0).all())
    assert bool((unpack(packed)[0] == 0).all())
    assert float(scale[1].abs()) == 65504.0 and abs(int(unpack(packed)[1, 5])) >= 7, "as near as the format comes"
