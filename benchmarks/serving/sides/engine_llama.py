"""llama.cpp through its C interface: one batch of all sequences per step, greedy from its logits. The KV cache is fp16."""

import ctypes
from argparse import Namespace

from timing import PREFILL, Prompts, Work, loop, serve, timed_prefill

_SEQUENCES = 32


def load(options: Namespace) -> Work:
    import llama_cpp as llama
    import numpy as np

    llama.llama_backend_init()
    settings = llama.llama_model_default_params()
    settings.n_gpu_layers = 0
    model = llama.llama_model_load_from_file(str(options.model).encode(), settings)
    shape = llama.llama_context_default_params()
    room = options.prompt_tokens + options.new_tokens + 16
    shape.n_ctx = max(_SEQUENCES * room, options.prefill_tokens + 16)
    shape.n_seq_max, shape.kv_unified = _SEQUENCES, True
    shape.n_batch = shape.n_ubatch = 512
    shape.n_threads = shape.n_threads_batch = options.threads
    context = llama.llama_init_from_model(model, shape)
    batch = llama.llama_batch_init(512, 0, 1)
    vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    prompts = Prompts(options)

    def feed(rows: list[tuple[int, int, int, bool]]) -> None:
        """(id, position, sequence, whether logits are wanted)"""
        batch.n_tokens = len(rows)
        for at, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[at], batch.pos[at] = token, position
            batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
            batch.logits[at] = wanted
        if llama.llama_decode(context, batch) != 0:
            raise RuntimeError("llama_decode failed")

    def likeliest(row: int) -> int:
        at = llama.llama_get_logits_ith(context, row)
        return int(np.ctypeslib.as_array(ctypes.cast(at, ctypes.POINTER(ctypes.c_float)), (vocab_size,)).argmax())

    def work(name: str) -> dict[str, float]:
        asked = prompts.of(name)
        llama.llama_memory_clear(llama.llama_get_memory(context), False)
        made = [0] * len(asked)
        position = len(asked[0])

        def first() -> None:
            """As many whole prompts at once as a batch takes."""
            each = max(1, 512 // position)
            for start in range(0, len(asked), each):
                some = range(start, min(start + each, len(asked)))
                rows = [(t, at, s, at == position - 1) for s in some for at, t in enumerate(asked[s])]
                feed(rows)
                for number, sequence in enumerate(some):
                    made[sequence] = likeliest((number + 1) * position - 1)

        def step() -> None:
            nonlocal position
            feed([(token, position, sequence, True) for sequence, token in enumerate(made)])
            made[:] = [likeliest(row) for row in range(len(made))]
            position += 1

        if name == PREFILL:
            return timed_prefill(position, first)
        return loop(len(asked), options.new_tokens, first, step)

    return work


serve(load)
