"""OpenVINO GenAI: its continuous batching, from the GGUF file of int8 weights, step by step."""

import itertools
from argparse import Namespace

from timing import PREFILL, Counts, Prompts, Work, serve, timed_prefill


def load(options: Namespace) -> Work:
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = 32 + options.prefill_tokens
    scheduler.max_num_seqs = 32
    scheduler.cache_size = 1
    scheduler.enable_prefix_caching = False
    settings = {"INFERENCE_NUM_THREADS": options.threads}
    pipeline = genai.ContinuousBatchingPipeline(str(options.model), scheduler, "CPU", settings)
    prompts, numbers = Prompts(options), itertools.count()

    def work(name: str) -> dict[str, float]:
        asked = prompts.of(name)
        config = genai.GenerationConfig()
        config.max_new_tokens = 1 if name == PREFILL else options.new_tokens
        config.do_sample, config.ignore_eos, config.apply_chat_template = False, True, False
        handles = []

        def first() -> None:
            for ids in asked:
                tensor = ov.Tensor(np.array([ids], np.int64))
                handles.append(pipeline.add_request(next(numbers), tensor, config))
            if name == PREFILL:
                run()

        def run() -> None:
            while pipeline.has_non_finished_requests():
                pipeline.step()

        if name == PREFILL:
            return timed_prefill(len(asked[0]), first)
        counts = Counts(len(asked), options.new_tokens)
        first()
        going_on = True
        while going_on:
            pipeline.step()
            made = {}
            for number, handle in enumerate(handles):
                if handle.can_read():
                    made[number] = sum(len(output.generated_ids) for output in handle.read().values())
            going_on = counts.add(made)
        run()
        return {"rate": counts.rate}

    return work


serve(load)
