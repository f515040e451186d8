import torch

from raymill.compression.kv_cache import round_keys_and_values


def test_attention_reads_keys_and_values_in_steps_of_their_own_row(small_model):
    model, seen = small_model("qwen3"), []
    attention = model.model.layers[0].self_attn
    inner = attention.attend

    def listen(q, k, v, **how):
        seen.extend([k, v])
        return inner(q, k, v, **how)

    attention.attend = listen
    ids = torch.arange(1, 25)[None]
    plain = model(ids)
    whole = list(seen)
    seen.clear()
    round_keys_and_values(model)
    rounded = model(ids)
    for before, after in zip(whole, seen, strict=True):
        step = before.abs().amax(-1, keepdim=True) / 127
        assert bool(((after / step).round() - after / step).abs().max() < 1e-3), "whole steps"
        assert 0 < float(((after - before).abs() / step).max()) <= 0.5001
    error = float((rounded - plain).norm() / plain.norm())
    assert 0 < error < 0.02
