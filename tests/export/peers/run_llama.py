"""Run by the peer's Python: GGUF files through llama.cpp. Jobs as JSON on stdin, results as JSON on stdout."""

import json
import sys

import llama_cpp

FP32 = 0  # ggml's number of the type, for the KV cache


def run(job):
    model = llama_cpp.Llama(
        job["file"], n_ctx=64, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False, type_k=FP32, type_v=FP32
    )
    known = job["texts"]
    ids = [model.tokenize(text.encode(), add_bos=True, special=False) for text in known]
    back = [model.detokenize(each).decode() for each in ids]
    model.eval(job["prompt"])
    logits = model.scores[: len(job["prompt"])].tolist()
    made = []
    for _ in range(job["count"]):
        made.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(made[-1:])
    text = model.detokenize(made).decode("utf-8", "replace") if known else ""
    return {"ids": ids, "back": back, "logits": logits, "made": made, "text": text}


print(json.dumps([run(job) for job in json.load(sys.stdin)]))
