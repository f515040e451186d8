"""The table of serving: what counts as a rate, which peers a row is compared with, and the client of the API's streams."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.peers import Peers
from benchmarks.serving import __main__ as table
from benchmarks.serving import bench as benches
from benchmarks.serving import engines, http
from benchmarks.serving.bench import SIDES, Bench
from benchmarks.serving.models import LARGE, SMALL, Shape
from benchmarks.table import OURS
from benchmarks.turns import Talk

sys.path.append(str(SIDES))  # scripts are run by path, so they find each other there

import engine_raymill
import http_client
import timing


def test_a_decode_rate_counts_only_steps_of_all_sequences() -> None:
    calls = [
        (0.0, 0.5, [64, 64]),  # prompts
        (1.0, 1.25, [1, 1]),
        (2.0, 2.25, [1, 1]),
        (3.0, 3.25, [1, 1]),
        (4.0, 4.25, [8, 1]),  # a draft is checked
        (9.0, 9.25, [1]),  # one sequence is done
    ]
    found = engine_raymill.decode_rates(calls, 2)
    assert found == {"rate": 2.0, "step_rate": 8.0, "drafted": 0.25}


def test_a_peers_tokens_count_from_the_last_first_to_the_first_last(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 13.0, 14.0, 15.0])
    monkeypatch.setattr(timing, "now", lambda: next(clock))
    counts = timing.Counts(2, 4)
    assert counts.add({0: 1})  # the other's prompt is still read
    assert counts.add({0: 1, 1: 1})
    assert counts.add({0: 1, 1: 1})
    assert not counts.add({0: 1, 1: 1})
    assert counts.rate == 4 / 2


def test_no_prompt_is_used_twice() -> None:
    options = timing.argparse.Namespace(prompt_tokens=4, prefill_tokens=6, vocab_size=32000)
    prompts = timing.Prompts(options)
    asked = [tuple(ids) for work in ("2", "2", "prefill") for ids in prompts.of(work)]
    assert [len(ids) for ids in asked] == [4, 4, 4, 4, 6]
    assert len(set(asked)) == 5


SIDE = """
import json, sys
sys.path.append(sys.argv[1])
sys.argv[1:] = sys.argv[2:]
import timing
def load(options):
    return lambda work: {"rate": float(options.threads), "work": work}
timing.serve(load)
"""


def test_a_side_tells_its_memory_and_each_kind_of_work(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        SIDE,
        str(SIDES),
        "--model",
        str(tmp_path),
        "--vocab-size",
        "400",
        "--works",
        "1,8",
    ]
    done = subprocess.run([*command, "--threads", "2"], input="go\ngo\n", capture_output=True, text=True, check=True)
    first, *turns, last = map(json.loads, done.stdout.splitlines())
    assert first["loaded_bytes"] >= first["bare_bytes"] > 1e6
    assert turns == [{name: {"rate": 2.0, "work": name} for name in ("1", "8")}] * 2
    assert last["peak_bytes"] >= last["held_bytes"] > 0
    start = subprocess.run([*command, "--start"], capture_output=True, text=True, check=True)
    assert 0 < json.loads(start.stdout)["start_s"] < 60


def test_rows_name_their_peers_and_say_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def turn(rate: float, **more: float) -> dict[str, Any]:
        return {work: {"rate": rate, **more} for work in ("1", "8", "32", "prefill")}

    rates = {"llama.cpp Q8_0": 50.0, "llama.cpp Q4_0": 80.0, "OpenVINO int8": 60.0}
    talks = {name: Talk({}, [turn(rate)]) for name, rate in rates.items()}
    talks |= {OURS: Talk({}, [turn(100.0, step_rate=120.0, drafted=0.5)])}
    talks |= {engines.INT4: Talk({}, [turn(200.0, step_rate=220.0, drafted=0.0)])}
    missing = {"vLLM W8A8": "no such wheel"}
    monkeypatch.setattr(engines, "engine_sides", lambda *_: ([], missing))
    monkeypatch.setattr(engines, "play", lambda *_: talks)
    nothing = Peers(Path(), {}, {})
    rows = {row.work: row for row in engines.small(Bench(nothing, nothing, tmp_path, tmp_path, quick=True))}
    assert len(rows) == 5
    int8, int4, many = (rows[f"12.6M{what}"] for what in (" int8, 1 sequence", " int4, 1 sequence", ", 32 sequences"))
    assert int8.ours == 100 and int8.ratio == pytest.approx(100 / 60) and "llama.cpp Q4_0" not in int8.peers
    assert "no such wheel" in int8.note and "50%" in int8.note and int8.peers["vLLM W8A8"] is None
    assert int4.ours == 200 and int4.ratio == pytest.approx(200 / 80)
    assert many.ratio == pytest.approx(100 / 80) and "int4 200" in many.note and "120" in many.note


def test_shares_are_of_the_same_round() -> None:
    def turns(*rates: float, first: float) -> Talk:
        return Talk({}, [{"8": rate, "32": 2 * rate, "first_ms": first} for rate in rates])

    talks = {
        http._ENGINE: turns(100, 1000, 200, first=5.0),
        http._UVICORN: turns(90, 900, 180, first=6.0),
        http._SERVE: turns(80, 800, 160, first=9.0),
    }
    row = http._share_row(talks, 8, "tokens/s")
    assert row.ours == pytest.approx(80) and row.spread == pytest.approx(0) and "plain uvicorn 90 %" in row.note
    assert http._first_row(talks).ours == pytest.approx(4)


def test_the_client_reads_streams_and_what_they_count() -> None:
    chunk = b'data: {"choices": [{"text": "a"}], "usage": null}\n\n'
    end = b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 7, "total_tokens": 10}}\n\ndata: [DONE]\n\n'

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            assert json.loads(await reader.readexactly(length))["prompt"] == [1, 2, 3]
            writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
            await asyncio.sleep(0.05)
            writer.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            await asyncio.sleep(0.5)
            writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(end), end))
        writer.close()

    async def ask() -> list[http_client.Answer]:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server, http_client.Client(server.sockets[0].getsockname()[1], "sk-1") as client:
            return [await client.complete([1, 2, 3], 7) for _ in range(2)]

    answers = asyncio.run(ask())
    assert [each.tokens for each in answers] == [7, 7]
    assert all(0.04 < each.first_s < 0.5 for each in answers)


def test_shapes_have_the_sizes_they_are_named_by() -> None:
    from raymill.model.config import ModelConfig

    def millions(shape: Shape) -> float:
        sizes = {"num_layers": shape.layers, "model_dim": shape.dim, "num_heads": shape.heads}
        sizes |= {"num_kv_heads": shape.kv_heads, "hidden_dim": shape.hidden_dim}
        return ModelConfig(**sizes, tie_embeddings=shape.tied).num_parameters(shape.vocab_size) / 1e6

    assert millions(SMALL) == pytest.approx(12.6, abs=0.05)
    assert millions(LARGE) == pytest.approx(125, abs=0.5)


def test_every_script_of_a_side_is_there_and_every_pin_is_exact() -> None:
    scripts = {path.stem for path in SIDES.glob("*_*.py")}
    assert {f"engine_{name}" for name in ("raymill", "llama", "openvino", "onnx", "vllm", "transformers")} <= scripts
    assert {"http_raymill", "http_server", "http_client"} <= scripts
    pins = [pin for group in (benches.PINS | benches.VLLM_PINS).values() for pin in group]
    assert all("==" in pin for pin in pins)


def test_rows_are_chosen_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert [*table.WORKS] == ["large", "small", "memory", "start", "http"]
    with pytest.raises(SystemExit):
        table.main(["--rows", "nothing"])
    assert "nothing is no row" in capsys.readouterr().err


def test_prompts_are_the_same_in_every_engine() -> None:
    options = timing.argparse.Namespace(prompt_tokens=4, prefill_tokens=6, vocab_size=32000)
    random.seed(7)
    assert timing.Prompts(options).of("2") == timing.Prompts(options).of("2")
