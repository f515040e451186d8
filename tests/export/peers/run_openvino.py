"""Run by the peer's Python: GGUF files through OpenVINO GenAI. Jobs as JSON on stdin, results as JSON on stdout."""

import json
import sys

import numpy as np
import openvino
import openvino_genai

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}


def run(job):
    pipe = openvino_genai.LLMPipeline(job["file"], "CPU", EXACT)
    tokenizer = pipe.get_tokenizer()
    ids = [tokenizer.encode(text).input_ids.data[0].tolist() if text else [] for text in job["texts"]]
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.do_sample, config.ignore_eos = job["count"], False, True
    config.apply_chat_template = False
    prompt = np.array([job["prompt"]], np.int64)
    inputs = openvino_genai.TokenizedInputs(openvino.Tensor(prompt), openvino.Tensor(np.ones_like(prompt)))
    made = pipe.generate(inputs, config).tokens[0]
    return {"ids": ids, "made": list(made), "text": str(pipe.generate(job["texts"][0], config))}


print(json.dumps([run(job) for job in json.load(sys.stdin)]))
