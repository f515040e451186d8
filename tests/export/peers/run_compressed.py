"""Run by the peer's Python: compressed-tensors folders through transformers. JSON on stdin, JSON on stdout."""

import json
import sys

import compressed_tensors  # noqa: F401
import torch
import transformers


def run(job):
    model = transformers.AutoModelForCausalLM.from_pretrained(job["folder"]).eval()
    names = [name for name, part in model.named_modules() if getattr(part, "quantization_scheme", None) is not None]
    made = list(job["prompt"])
    with torch.no_grad():
        logits = model(torch.tensor([made])).logits[0].tolist()
        for _ in range(job["count"]):
            made.append(int(model(torch.tensor([made])).logits[0, -1].argmax()))
    return {"logits": logits, "made": made[len(job["prompt"]) :], "quantized": names}


print(json.dumps([run(job) for job in json.load(sys.stdin)]))
