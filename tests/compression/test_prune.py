import pytest
import torch

from raymill.compression.prune import prune_by_magnitude, prune_by_wanda


def matrices(model):
    return {name: weight for name, weight in model.named_parameters() if "_proj.weight" in name}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_magnitude_takes_the_smallest_of_each_matrix_and_nothing_else(small_model, architecture):
    model, whole = small_model(architecture), small_model(architecture)
    prune_by_magnitude(model, 0.3)
    for name, weight in matrices(model).items():
        before = matrices(whole)[name]
        gone = weight == 0
        assert int(gone.sum()) == int(0.3 * weight.numel())
        assert before[gone].abs().max() <= before[~gone].abs().min()
        assert torch.equal(weight[~gone], before[~gone])
    left = {name: weight for name, weight in model.named_parameters() if name not in matrices(model)}
    assert left and all(torch.equal(weight, dict(whole.named_parameters())[name]) for name, weight in left.items())


def test_wanda_takes_the_least_weight_times_input_of_each_output(small_model, calibration):
    model, whole = small_model(), small_model()
    prune_by_wanda(model, 0.5, calibration)
    seen = {}
    block = whole.model.layers[0]
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        block.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: seen.update({name: inputs[0].flatten(0, 1)})
        )
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"):
        block.get_submodule(name).weight.copy_(model.model.layers[0].get_submodule(name).weight)
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        block.get_submodule(name).weight.copy_(model.model.layers[0].get_submodule(name).weight)
    whole(calibration.ids_ST, calibration.documents_ST)
    for name, before in (("self_attn.q_proj", small_model()), ("mlp.down_proj", small_model())):
        weight = before.model.layers[0].get_submodule(name).weight
        scores = weight.abs() * seen[name].double().square().sum(0).sqrt().float()
        pruned = model.model.layers[0].get_submodule(name).weight
        for row in range(len(weight)):
            least = set(scores[row].argsort()[: weight.shape[1] // 2].tolist())
            assert set((pruned[row] == 0).nonzero().flatten().tolist()) == least
            assert torch.equal(pruned[row][pruned[row] != 0], weight[row][pruned[row] != 0])


def test_wanda_measures_a_block_behind_the_blocks_pruned_before(small_model, calibration):
    model, seen = small_model(), []
    prune_by_wanda(model, 0.5, calibration)
    queries = model.model.layers[1].self_attn.q_proj
    queries.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
    model(calibration.ids_ST, calibration.documents_ST)
    weight = small_model().model.layers[1].self_attn.q_proj.weight
    scores = weight.abs() * seen[0].double().square().sum(0).sqrt().float()
    least = torch.zeros_like(weight, dtype=torch.bool).scatter_(1, scores.argsort(1)[:, :32], True)
    assert torch.equal(queries.weight == 0, least)


def test_wanda_minds_inputs_where_magnitude_does_not(small_model, calibration):
    by_size, by_input = small_model(), small_model()
    for model in (by_size, by_input):
        model.model.layers[0].input_layernorm.weight[:8] *= 100.0
    prune_by_magnitude(by_size, 0.5)
    prune_by_wanda(by_input, 0.5, calibration)
    kept = [
        float((model.model.layers[0].self_attn.q_proj.weight[:, :8] != 0).float().mean())
        for model in (by_size, by_input)
    ]
    assert kept[0] < 0.6 and kept[1] > 0.9
