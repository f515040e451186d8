"""transformers, eager, fp32: its model with its own cache, greedy."""

from argparse import Namespace

from timing import PREFILL, Prompts, Work, loop, serve, timed_prefill


def load(options: Namespace) -> Work:
    import torch
    import transformers

    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    prompts = Prompts(options)

    def work(name: str) -> dict[str, float]:
        asked = torch.tensor(prompts.of(name))
        state = {}

        def forward(ids: torch.Tensor) -> None:
            output = model(ids, past_key_values=state.get("cache"), use_cache=True, logits_to_keep=1)
            state["cache"] = output.past_key_values
            state["made"] = output.logits[:, -1].argmax(-1, keepdim=True)

        def first() -> None:
            forward(asked)

        if name == PREFILL:
            return timed_prefill(asked.shape[1], first)
        return loop(len(asked), options.new_tokens, first, lambda: forward(state["made"]))

    return work


serve(load)
