"""ONNX Runtime GenAI: all sequences in one generator. `--model` is what its model builder made in int4."""

import json
from argparse import Namespace

from timing import PREFILL, Prompts, Work, loop, serve, timed_prefill


def load(options: Namespace) -> Work:
    import numpy as np
    import onnxruntime_genai as genai

    config = genai.Config(str(options.model))
    session = {"intra_op_num_threads": options.threads, "inter_op_num_threads": 1}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    model = genai.Model(config)
    prompts = Prompts(options)

    def work(name: str) -> dict[str, float]:
        asked = prompts.of(name)
        parameters = genai.GeneratorParams(model)
        length = len(asked[0]) + options.new_tokens + 1
        parameters.set_search_options(
            max_length=length, min_length=length, batch_size=len(asked), do_sample=False, past_present_share_buffer=True
        )
        generator = genai.Generator(model, parameters)

        def first() -> None:
            generator.append_tokens(np.array(asked, np.int32))
            generator.generate_next_token()

        if name == PREFILL:
            return timed_prefill(len(asked[0]), first)
        return loop(len(asked), options.new_tokens, first, generator.generate_next_token)

    return work


serve(load)
