"""What the sides share: the protocol of benchmarks/turns.py, and how tokens per second are counted, alike for every engine.

A side is a script run by path, ours in our interpreter and a peer's in the peers'. `serve(load)`: `load(options)` builds the
engine and gives a `Work`, what one turn of one kind does:

    decode B    B prompts of `--prompt-tokens` random ids, none used twice; from the moment when all have their first token
                until the first has its last, so that all B are in every step. Tokens over seconds
    prefill     one prompt of `--prefill-tokens`, until its first token. Its tokens over seconds

A turn does each of `--works` once. With `--start` there are no turns: one prompt, and how long it was from the start of the
process to its first token. Seconds are the clock's; with one thread they are CPU seconds of the process, which a
busy machine changes least. Standard library only: what a process holds before it has an engine is Python's.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PREFILL = "prefill"
now = time.perf_counter
"""Seconds, on the clock that `serve` takes."""
Work = Callable[[str], dict[str, float]]
"""From the name of a kind ("8", "prefill") to its figures; "rate" is among them."""


def serve(load: Callable[[argparse.Namespace], Work], before: Callable[[], None] = lambda: None) -> None:
    """`before` imports what is not the engine's to hold."""
    global now
    options = read_options()
    if options.threads == 1:
        now = time.process_time
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints goes to stderr
    before()

    def say(value: dict[str, Any]) -> None:
        channel.write(json.dumps(value) + "\n")
        channel.flush()

    if options.start:
        load(options)(PREFILL)
        say({"start_s": age_s()})
        return
    bare = resident_bytes("VmRSS")
    began = time.monotonic()
    work = load(options)
    load_s = time.monotonic() - began
    loaded = resident_bytes("VmRSS")
    work(options.works[-1])  # what is made on first use
    say({"bare_bytes": bare, "loaded_bytes": loaded, "load_s": load_s})
    while sys.stdin.readline():
        say({name: work(name) for name in options.works})
    say({"held_bytes": resident_bytes("VmRSS"), "peak_bytes": resident_bytes("VmHWM")})


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--works", type=lambda text: text.split(","), required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--prefill-tokens", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--kv", default="fp32", help="precision of our keys and values")
    parser.add_argument("--pages", type=int, help="of our KV cache; as many as fit 128 MiB without it")
    parser.add_argument("--start", action="store_true")
    return parser.parse_args()


class Prompts:
    """Ids that no engine has seen: a prefix kept from an earlier turn would be a prompt not computed."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._random = random.Random(0)
        self._options = options

    def of(self, work: str) -> list[list[int]]:
        """The prompts of one turn of a kind."""
        if work == PREFILL:
            return [self._ids(self._options.prefill_tokens)]
        return [self._ids(self._options.prompt_tokens) for _ in range(int(work))]

    def _ids(self, count: int) -> list[int]:
        return [self._random.randrange(300, self._options.vocab_size) for _ in range(count)]


class Counts:
    """Tokens of the sequences of a decode turn as they come, for engines that hand them out step by step."""

    def __init__(self, sequences: int, new_tokens: int) -> None:
        self._new_tokens = new_tokens
        self._made = [0] * sequences
        self._from: tuple[float, int] | None = None
        self._until: tuple[float, int] | None = None

    def add(self, made: dict[int, int]) -> bool:
        """How many tokens each sequence has got now. False when the turn is over: the first sequence is at its end."""
        for sequence, count in made.items():
            self._made[sequence] += count
        at = now(), sum(self._made)
        if self._from is None and min(self._made) > 0:
            self._from = at
        if max(self._made) < self._new_tokens:
            return True
        self._until = at
        return False

    @property
    def rate(self) -> float:
        assert self._from is not None and self._until is not None, "new_tokens are too few for so many sequences"
        return (self._until[1] - self._from[1]) / (self._until[0] - self._from[0])


def loop(sequences: int, new_tokens: int, first: Callable[[], None], step: Callable[[], None]) -> dict[str, float]:
    """The rate of an engine whose `first` feeds all prompts and whose `step` gives each sequence one token more."""
    first()
    began = now()
    for _ in range(new_tokens - 1):
        step()
    return {"rate": sequences * (new_tokens - 1) / (now() - began)}


def timed_prefill(tokens: int, first: Callable[[], object]) -> dict[str, float]:
    began = now()
    first()
    return {"rate": tokens / (now() - began)}


def age_s() -> float:
    """Seconds since this process was started, to 10 ms."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def resident_bytes(name: str) -> int:
    """Of this process: VmRSS now, VmHWM at its highest."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")
