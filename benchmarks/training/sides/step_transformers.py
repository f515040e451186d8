"""transformers' Llama. `--variant inner`: the Trainer's inner step alone; otherwise the Trainer itself, with a dataset
that costs nothing, fused AdamW, no logging and no saving."""

import time
from argparse import Namespace
from typing import Any

import torch
from timing import Batches, Loaded, Turns, describe, read_options, resident_bytes, serve
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments


def build(options: Namespace) -> LlamaForCausalLM:
    torch.manual_seed(0)
    heads = options.dim // 64
    config = LlamaConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.dim,
        intermediate_size=options.dim * 8 // 3,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=options.seq_len,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(config).train()


def load_inner(options: Namespace) -> Loaded:
    model, batches = build(options), Batches(options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)

    def work() -> dict[str, Any]:
        inputs_BT, _ = batches.next()
        model(input_ids=inputs_BT, labels=inputs_BT).loss.backward()  # it moves the labels by one itself
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return {}

    return describe(model, options), work


class Rows(torch.utils.data.Dataset):
    """One sequence per item, as the Trainer wants it."""

    def __init__(self, options: Namespace) -> None:
        self._rows = torch.from_numpy(Batches(options).rows[:, :-1].astype("int64"))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._rows[index], "labels": self._rows[index]}


class TurnByTurn(TrainerCallback):
    """Lets the Trainer do one step per turn; a turn lasts from one step's end to the next one's, less the waiting."""

    def __init__(self, turns: Turns, facts: dict[str, Any], warm: int) -> None:
        self._turns, self._facts, self._warm = turns, facts, warm
        self._began = (0.0, 0.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self._warm:
            self._turns.say(self._facts)
        elif state.global_step > self._warm:
            wall_s, cpu_s = self._began
            self._turns.say({"cpu_s": time.process_time() - cpu_s, "wall_s": time.perf_counter() - wall_s})
        if state.global_step >= self._warm and not self._turns.wait():
            control.should_training_stop = True
        self._began = (time.perf_counter(), time.process_time())


def run_trainer(options: Namespace) -> None:
    turns, model = Turns(options), build(options)
    settings = TrainingArguments(
        output_dir=str(options.folder),
        per_device_train_batch_size=options.batch_size,
        max_steps=100_000,
        learning_rate=1e-3,
        weight_decay=0.1,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    facts = describe(model, options) | {"loaded_bytes": resident_bytes("VmRSS")}
    turn_by_turn = TurnByTurn(turns, facts, options.warm)
    Trainer(model=model, args=settings, train_dataset=Rows(options), callbacks=[turn_by_turn]).train()
    turns.say({"peak_bytes": resident_bytes("VmHWM")})


if __name__ == "__main__":
    if read_options().variant == "inner":
        serve(load_inner)
    else:
        run_trainer(read_options())
