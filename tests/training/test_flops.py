import pytest
import torch

from raymill.model.config import ModelConfig
from raymill.training.flops import peak_flops, training_flops_per_token, utilization

LLAMA = ModelConfig(num_layers=2, model_dim=64, num_heads=4, num_kv_heads=2, hidden_dim=160, max_seq_len=128)
VOCAB = 512


def test_a_token_costs_six_operations_per_weight_and_twelve_per_position_seen() -> None:
    weights = 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 160) + VOCAB * 64
    attention = 12 * 2 * 4 * 16 * (128 + 1) / 2
    assert training_flops_per_token(LLAMA, VOCAB, 128) == 6 * weights + attention


def test_the_count_is_that_of_the_matrix_products_torch_runs() -> None:
    # Matrices alone: attention of one position sees one position, and costs next to nothing.
    from torch.utils.flop_counter import FlopCounterMode

    from raymill.model.transformer import Transformer

    model = Transformer(LLAMA, VOCAB).double()  # torch's own products: the counter does not know ours
    ids_BT = torch.zeros(8, 1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        # The first block's input needs a gradient as in training: the embedding is learned.
        model(ids_BT).sum().backward()
    assert counter.get_total_flops() / 8 == pytest.approx(training_flops_per_token(LLAMA, VOCAB, 1), rel=0.02)


def test_an_untied_head_costs_what_a_tied_one_does() -> None:
    untied = LLAMA.model_copy(update={"tie_embeddings": False})
    assert training_flops_per_token(untied, VOCAB, 128) == training_flops_per_token(LLAMA, VOCAB, 128)


def test_a_window_lowers_the_cost_of_attention_to_the_positions_it_shows() -> None:
    model = LLAMA.model_copy(update={"architecture": "mistral", "sliding_window": 32})
    seen = sum(min(position + 1, 32) for position in range(128)) / 128
    saved = training_flops_per_token(LLAMA, VOCAB, 128) - training_flops_per_token(model, VOCAB, 128)
    assert saved == pytest.approx(12 * 2 * 64 * (64.5 - seen))


@pytest.mark.parametrize(
    ("device", "precision", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 80GB HBM3", "fp8", 1979),
        ("NVIDIA H200", "fp32", 67),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A10G", "bf16", 70),
        ("NVIDIA L4", "fp8", 242.5),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("Tesla T4", "fp32", 8.1),
        ("Tesla T4", "bf16", None),
        ("NVIDIA A1000", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("AMD Instinct MI300X", "bf16", None),
    ],
)
def test_a_gpu_has_the_peak_its_vendor_publishes_or_none(device: str, precision: str, tera: float | None) -> None:
    peak = peak_flops(device, precision, 1)
    assert peak == (None if tera is None else tera * 1e12)


def test_a_cpu_is_measured_and_the_threads_are_as_before() -> None:
    before = torch.get_num_threads()
    peak = peak_flops("cpu", "fp32", 1)
    assert peak is not None and 1e9 < peak < 1e12
    assert torch.get_num_threads() == before


def test_utilization_is_of_all_workers_together() -> None:
    assert utilization(1000.0, 2e6, 1e9, 4) == 0.5
    assert utilization(1000.0, 2e6, None, 4) is None
