"""Monitor: an endpoint in, its Prometheus configuration, alert rules and a first health report out.

    prometheus.yml alerts.yml   start Prometheus on them: prometheus --config.file=<artifact>/prometheus.yml
    health.json                 what one health check and one scrape of the live endpoint gave

Prometheus sends the key in the run's `metrics_key` file (mode 0600), which opens /metrics and nothing else.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from pydantic import Field

from raymill.api.keys import METRICS_KEY
from raymill.artifact import Artifact, Kind, write_atomic
from raymill.cluster.config import RoleName
from raymill.config import Config as Settings
from raymill.errors import MachineError
from raymill.stages.contract import Demand, Inputs
from raymill.telemetry.alerts import RULES, SCRAPE, Thresholds, alert_rules, scrape_config

if TYPE_CHECKING:
    from raymill.cluster.session import Cluster

TAKES: tuple[Kind, ...] = ("endpoint",)
MAY_TAKE: tuple[Kind, ...] = ()
GIVES: Kind = "monitor"
ROLE: RoleName = "serve"
LIVE = True

_REPLICAS_TIMEOUT_S = 10.0


class Config(Settings):
    """How the endpoint is watched."""

    scrape_interval_s: Annotated[int, Field(ge=1, le=3600)] = 15
    """Seconds between two scrapes."""
    alerts: Thresholds = Thresholds()
    """When an alert fires."""


def demand(config: Config) -> Demand:
    return Demand(0)


def source_state(config: Config) -> Any:
    return None


def run(config: Config, inputs: Inputs, cluster: Cluster) -> Artifact:
    """Writes the files, checks them where promtool is installed, and looks at the live endpoint once."""
    endpoint, folder = inputs["endpoint"].json("endpoint.json"), inputs.draft.path
    target, key_file = f"{endpoint['host']}:{endpoint['port']}", (inputs.run_folder / METRICS_KEY).absolute()
    write_atomic(folder / SCRAPE, scrape_config(target, key_file, config.scrape_interval_s))
    rules = alert_rules(config.alerts)
    write_atomic(folder / RULES, rules)
    checked = check_with_promtool(folder)
    began = time.perf_counter()
    _get(f"http://{target}/health")
    health_ms = (time.perf_counter() - began) * 1000
    values = _scrape_all(target, key_file.read_text(encoding="utf-8").strip(), endpoint["replicas"])
    missing = missing_metrics(values)
    if missing:
        raise MachineError(
            f"{target} does not show {', '.join(missing)}", where="monitor", fix="serve it with this version of raymill"
        )
    up = int(values["raymill_replicas_up"])
    figures = {
        "health_ms": round(health_ms, 2),
        "replicas_up": up,
        "series": len(values),
        "alert_rules": rules.count("- alert:"),
        "promtool": checked,
    }
    write_atomic(folder / "health.json", json.dumps({**figures, "scrape": values}, indent=1) + "\n")
    summary = (
        f"{up} of {endpoint['replicas']} replicas up, health in {health_ms:.0f} ms, {len(values)} series scraped, "
        f"{figures['alert_rules']} alert rules ({'promtool accepts them' if checked else 'promtool is not installed'})"
    )
    return inputs.publish("monitor", GIVES, config, summary, figures)


def check_with_promtool(folder: Path) -> bool:
    """Whether promtool checked the files; MachineError when it refuses them."""
    if shutil.which("promtool") is None:
        return False
    done = subprocess.run(
        ["promtool", "check", "config", str(folder / SCRAPE)], capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode != 0:
        raise MachineError(
            "promtool refuses the monitoring files",
            where=str(folder),
            why=done.stderr[-500:],
            fix="set monitor.alerts to other values",
        )
    return True


def missing_metrics(values: dict[str, float]) -> list[str]:
    """Declared metrics that a scrape does not hold."""
    from raymill.telemetry.metrics import TABLE

    seen = {series.partition("{")[0] for series in values}
    return [
        metric.name
        for metric in TABLE
        if (f"{metric.name}_count" if metric.kind == "histogram" else metric.name) not in seen
    ]


def _scrape_all(target: str, key: str, replicas: int) -> dict[str, float]:
    """A scrape in which every replica is counted; the last one when some are still missing after 10 s."""
    deadline = time.monotonic() + _REPLICAS_TIMEOUT_S
    while True:
        values = parse_scrape(_get(f"http://{target}/metrics", key))
        if values.get("raymill_replicas_up", 0) >= replicas or time.monotonic() > deadline:
            return values
        time.sleep(0.2)


def parse_scrape(text: str) -> dict[str, float]:
    """Prometheus text as series (name with labels) to value."""
    lines = (line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#"))
    return {series: float(value) for series, _, value in lines}


def _get(url: str, key: str | None = None) -> str:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        with urlopen(Request(url, headers=headers), timeout=10) as response:  # noqa: S310 - the endpoint's own address
            body: bytes = response.read()
    except (URLError, OSError) as error:
        raise MachineError(
            f"{url} does not answer",
            where="monitor",
            why=str(error),
            fix="serve the model first; `raymill doctor` looks further",
        ) from None
    return body.decode()
