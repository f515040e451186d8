"""Every metric of the endpoint, declared once; recorded here, scraped as Prometheus text.

`TABLE` is the only place where a metric's name, unit, labels and meaning stand: the alert rules are written from it and
the monitor stage checks a live scrape against it. Names carry the unit, as Prometheus wants: _seconds, _bytes, _total.

Replicas are processes. When PROMETHEUS_MULTIPROC_DIR is set before this module is imported, each writes its numbers to
files in that folder and any of them renders the sum of all on its node: a scrape means the endpoint, whichever replica
answers. Counters of a replica that died stay counted; its gauges go. An increment costs about 1 us.
"""

from __future__ import annotations

import os
import resource
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

SHARED_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(frozen=True)
class Metric:
    """One row of the table."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    known: tuple[tuple[str, ...], ...] = ((),)
    """Label values that are shown from the start, at zero, so that a rate over them is never 'no data'."""
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram, in the metric's unit."""
    over_replicas: Literal["livesum", "livemax"] = "livesum"
    """How a gauge's values of several replicas become one."""


_ROUTES = ("/v1/completions", "/v1/chat/completions")

REQUESTS = Metric(
    "raymill_requests_total",
    "counter",
    "HTTP requests answered, by route and status.",
    ("route", "status"),
    tuple((route, status) for route in _ROUTES for status in ("200", "429", "500")),
)
DURATION = Metric(
    "raymill_request_duration_seconds",
    "histogram",
    "Seconds from the request's head to the last byte of its answer.",
    ("route",),
    tuple((route,) for route in _ROUTES),
    (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0),
)
FIRST_TOKEN = Metric(
    "raymill_first_token_seconds",
    "histogram",
    "Seconds from a parsed request to its first token.",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
PROMPT_TOKENS = Metric("raymill_prompt_tokens_total", "counter", "Tokens of prompts taken in.")
COMPLETION_TOKENS = Metric("raymill_completion_tokens_total", "counter", "Tokens of completions given out.")
GONE = Metric("raymill_clients_gone_total", "counter", "Requests dropped because their client went away.")
FAILED = Metric("raymill_failed_completions_total", "counter", "Completions that ended because the model failed.")
PREEMPTIONS = Metric(
    "raymill_preemptions_total", "counter", "Completions sent back to the queue because the KV cache was full."
)
QUEUED = Metric("raymill_queued_requests", "gauge", "Requests that wait for a slot.")
ACTIVE = Metric("raymill_active_slots", "gauge", "Slots that hold a running completion.")
SLOTS = Metric("raymill_slots", "gauge", "Slots there are.")
REPLICAS_UP = Metric("raymill_replicas_up", "gauge", "Replicas whose engine works.")
REPLICAS_WANTED = Metric("raymill_replicas_wanted", "gauge", "Replicas the job asks for.", over_replicas="livemax")
MEMORY = Metric("raymill_resident_memory_bytes", "gauge", "Memory of the replicas' processes.")
MODEL_INFO = Metric(
    "raymill_model_info",
    "gauge",
    "1 for the model that is served; its properties are the labels.",
    ("model", "quantization", "version"),
    known=(),
    over_replicas="livemax",
)

TABLE = (
    REQUESTS,
    DURATION,
    FIRST_TOKEN,
    PROMPT_TOKENS,
    COMPLETION_TOKENS,
    GONE,
    FAILED,
    PREEMPTIONS,
    QUEUED,
    ACTIVE,
    SLOTS,
    REPLICAS_UP,
    REPLICAS_WANTED,
    MEMORY,
    MODEL_INFO,
)


class Metrics:
    """The recorder of this process; make one. Methods take a row of TABLE and the values of its labels."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._totals: dict[str, float] = {}
        self._lock = threading.Lock()
        self._made = {metric.name: _make(metric, self._registry) for metric in TABLE}

    def add(self, metric: Metric, amount: float = 1, **labels: str) -> None:
        """Raises a counter."""
        made = self._child(metric, labels)
        assert isinstance(made, Counter)
        made.inc(amount)

    def raise_to(self, metric: Metric, total: float) -> None:
        """Raises a counter without labels to what was counted elsewhere. From any thread; what is less changes nothing."""
        made = self._made[metric.name]
        assert isinstance(made, Counter)
        with self._lock:
            made.inc(max(0, total - self._totals.get(metric.name, 0)))
            self._totals[metric.name] = max(total, self._totals.get(metric.name, 0))

    def set(self, metric: Metric, value: float, **labels: str) -> None:
        """Sets a gauge."""
        made = self._child(metric, labels)
        assert isinstance(made, Gauge)
        made.set(value)

    def observe(self, metric: Metric, value: float, **labels: str) -> None:
        """Puts a value into a histogram."""
        made = self._child(metric, labels)
        assert isinstance(made, Histogram)
        made.observe(value)

    def render(self) -> bytes:
        """Prometheus text: of every replica on this node when they share a folder, else of this process."""
        folder = os.environ.get(SHARED_FOLDER)
        if folder is None:
            return bytes(generate_latest(self._registry))
        _forget_dead(Path(folder))
        together = CollectorRegistry()
        MultiProcessCollector(together, path=folder)
        return bytes(generate_latest(together))

    def _child(self, metric: Metric, labels: dict[str, str]) -> Counter | Gauge | Histogram:
        made = self._made[metric.name]
        return made.labels(**labels) if metric.labels else made


def resident_bytes() -> int:
    """Memory of this process; where there is no /proc, the most it ever had."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _make(metric: Metric, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    made: Counter | Gauge | Histogram
    if metric.kind == "counter":
        made = Counter(metric.name, metric.help, metric.labels, registry=registry)
    elif metric.kind == "gauge":
        made = Gauge(metric.name, metric.help, metric.labels, registry=registry, multiprocess_mode=metric.over_replicas)
    else:
        made = Histogram(metric.name, metric.help, metric.labels, registry=registry, buckets=metric.buckets)
    for values in metric.known:
        if values:
            made.labels(*values)
    return made


def _forget_dead(folder: Path) -> None:
    """Drops the gauges of processes that are gone. Prometheus' library leaves that to us."""
    for path in folder.glob("gauge_live*_*.db"):
        pid = int(path.stem.rpartition("_")[2])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            mark_process_dead(pid, str(folder))
