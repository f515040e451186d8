"""vLLM on a CPU, W8A8 from a compressed-tensors folder: its engine, step by step in this process."""

import itertools
import os
from argparse import Namespace

from timing import PREFILL, Counts, Prompts, Work, serve, timed_prefill

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_LOGGING_LEVEL="ERROR")


def load(options: Namespace) -> Work:
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(os.sched_getaffinity(0))[-options.threads :]))
    import vllm

    engine = vllm.LLM(
        str(options.model),
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=32,
        max_num_batched_tokens=1024,
        enable_prefix_caching=False,
    ).llm_engine
    prompts, numbers = Prompts(options), itertools.count()

    def work(name: str) -> dict[str, float]:
        asked = prompts.of(name)
        new_tokens = 1 if name == PREFILL else options.new_tokens
        wanted = vllm.SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        places: dict[str, int] = {}

        def first() -> None:
            for place, ids in enumerate(asked):
                key = str(next(numbers))
                places[key] = place
                engine.add_request(key, {"prompt_token_ids": ids}, wanted)
            if name == PREFILL:
                run()

        def run() -> None:
            while engine.has_unfinished_requests():
                engine.step()

        if name == PREFILL:
            return timed_prefill(len(asked[0]), first)
        counts = Counts(len(asked), options.new_tokens)
        had = [0] * len(asked)
        first()
        going_on = True
        while going_on:
            made = {}
            for output in engine.step():
                place, count = places[output.request_id], len(output.outputs[0].token_ids)
                made[place] = count - had[place]
                had[place] = count
            going_on = counts.add(made)
        run()
        return {"rate": counts.rate}

    return work


serve(load)
