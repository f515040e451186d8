"""litgpt's GPT in Llama's layout with the inner step of its pretraining; AdamW fused, which it keeps for GPUs by default."""

from argparse import Namespace
from typing import Any

import torch
from litgpt.config import Config
from litgpt.model import GPT
from litgpt.utils import chunked_cross_entropy
from timing import Batches, Loaded, describe, serve


def load(options: Namespace) -> Loaded:
    torch.manual_seed(0)
    config = Config(
        block_size=options.seq_len,
        vocab_size=options.vocab_size,
        padded_vocab_size=options.vocab_size,
        n_layer=options.layers,
        n_head=options.dim // 64,
        n_embd=options.dim,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        intermediate_size=options.dim * 8 // 3,
    )
    model, batches = GPT(config), Batches(options)
    model.transformer.wte.weight = model.lm_head.weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), fused=True)

    def work() -> dict[str, Any]:
        inputs_BT, targets_BT = batches.next()
        loss = chunked_cross_entropy(model(inputs_BT), targets_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss.item()}

    return describe(model, options), work


serve(load)
