import os
import subprocess
import sys

import pytest
from prometheus_client.parser import text_string_to_metric_families

from raymill.telemetry.metrics import (
    COMPLETION_TOKENS,
    DURATION,
    PREEMPTIONS,
    QUEUED,
    REQUESTS,
    TABLE,
    Metrics,
    resident_bytes,
)


def read(text):
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_every_name_is_declared_once_and_ends_in_its_unit():
    names = [metric.name for metric in TABLE]
    assert len(set(names)) == len(names)
    units = ("_total", "_seconds", "_bytes", "_requests", "_slots", "_up", "_wanted", "_info")
    assert all(name.startswith("raymill_") and name.endswith(units) for name in names)
    assert all((metric.kind == "counter") == metric.name.endswith("_total") for metric in TABLE)
    assert all(metric.help.endswith(".") for metric in TABLE)


def test_what_is_recorded_is_rendered():
    metrics = Metrics()
    metrics.add(REQUESTS, route="/v1/completions", status="200")
    metrics.add(COMPLETION_TOKENS, 17)
    metrics.set(QUEUED, 3)
    metrics.observe(DURATION, 0.2, route="/v1/completions")
    seen = read(metrics.render())
    assert seen["raymill_requests_total", ("route", "/v1/completions"), ("status", "200")] == 1
    assert seen["raymill_requests_total", ("route", "/v1/completions"), ("status", "500")] == 0
    assert seen[("raymill_completion_tokens_total",)] == 17
    assert seen[("raymill_queued_requests",)] == 3
    assert seen["raymill_request_duration_seconds_bucket", ("le", "0.25"), ("route", "/v1/completions")] == 1
    assert seen["raymill_request_duration_seconds_bucket", ("le", "0.1"), ("route", "/v1/completions")] == 0


def test_a_counter_is_raised_to_what_its_source_counted_even_told_late():
    metrics = Metrics()
    seen = [(metrics.raise_to(PREEMPTIONS, total), read(metrics.render()))[1] for total in (0, 3, 5, 4, 6)]
    assert [each[("raymill_preemptions_total",)] for each in seen] == [0, 3, 5, 5, 6]


REPLICA = """
import sys
from raymill.telemetry.metrics import *
metrics = Metrics()
metrics.add(COMPLETION_TOKENS, 10)
metrics.add(REQUESTS, route="/v1/completions", status="200")
metrics.observe(FIRST_TOKEN, 0.02)
metrics.set(ACTIVE, 2)
metrics.set(REPLICAS_UP, 1)
metrics.set(REPLICAS_WANTED, 2)
metrics.set(MODEL_INFO, 1, model="m", quantization="int8", version="1")
print("ready", flush=True)
for line in sys.stdin:
    sys.stdout.buffer.write(metrics.render() + b"# EOF\\n")
    sys.stdout.flush()
"""


@pytest.fixture
def replicas(tmp_path):
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    started = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                "from __future__ import annotations\n" + REPLICA.replace("import *", "import " + NAMES),
            ],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    assert all(process.stdout.readline() == b"ready\n" for process in started)
    yield started
    for process in started:
        process.kill()
        process.communicate()


NAMES = "ACTIVE, COMPLETION_TOKENS, FIRST_TOKEN, MODEL_INFO, REPLICAS_UP, REPLICAS_WANTED, REQUESTS, Metrics"


def scrape(process):
    process.stdin.write(b"\n")
    process.stdin.flush()
    lines = iter(process.stdout.readline, b"# EOF\n")
    return read(b"".join(lines))


def test_any_replica_renders_the_sum_of_all(replicas):
    for process in replicas:
        seen = scrape(process)
        assert seen[("raymill_completion_tokens_total",)] == 20
        assert seen["raymill_requests_total", ("route", "/v1/completions"), ("status", "200")] == 2
        assert seen[("raymill_first_token_seconds_count",)] == 2
        assert seen["raymill_first_token_seconds_bucket", ("le", "0.025")] == 2
        assert seen[("raymill_active_slots",)] == 4
        assert (seen[("raymill_replicas_up",)], seen[("raymill_replicas_wanted",)]) == (2, 2)
        assert seen["raymill_model_info", ("model", "m"), ("quantization", "int8"), ("version", "1")] == 1
        assert {metric.name for metric in TABLE} <= {name.removesuffix("_count") for name, *_ in seen}


def test_a_killed_replica_keeps_its_counts_and_loses_its_gauges(replicas):
    replicas[0].kill()
    replicas[0].wait()
    seen = scrape(replicas[1])
    assert seen[("raymill_completion_tokens_total",)] == 20
    assert (seen[("raymill_active_slots",)], seen[("raymill_replicas_up",)]) == (2, 1)
    assert seen[("raymill_replicas_wanted",)] == 2


def test_memory_grows_with_what_is_held():
    before = resident_bytes()
    held = bytearray(b"x" * 50_000_000)
    assert 10_000_000 < before < 100 * 2**30
    assert 40_000_000 < resident_bytes() - before < 80_000_000
    del held
