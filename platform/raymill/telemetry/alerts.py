"""Prometheus' own files for an endpoint: where to scrape, and when to wake someone.

Every expression is written from the rows of `metrics.TABLE`, so a rule cannot name a metric that does not exist.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field

from raymill.config import Config
from raymill.telemetry.metrics import (
    DURATION,
    FAILED,
    FIRST_TOKEN,
    QUEUED,
    REPLICAS_UP,
    REPLICAS_WANTED,
    REQUESTS,
    Metric,
)

JOB = "raymill"
RULES = "alerts.yml"
SCRAPE = "prometheus.yml"


class Thresholds(Config):
    """When an alert fires."""

    p95_latency_s: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """95 % of requests should be answered within this, seconds."""
    p95_first_token_s: Annotated[float, Field(gt=0, le=3600)] = 2.0
    """95 % of requests should have their first token within this, seconds."""
    error_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of requests that may be answered with a 5xx."""
    queued_requests: Annotated[int, Field(ge=1, le=1_000_000)] = 16
    """Requests that may wait for a slot for two minutes."""


def scrape_config(target: str, credentials_file: Path, interval_s: int) -> str:
    """prometheus.yml: scrapes `host:port` with the key in `credentials_file`, loads the rules beside it."""
    job = {
        "job_name": JOB,
        "metrics_path": "/metrics",
        "scheme": "http",
        "authorization": {"type": "Bearer", "credentials_file": str(credentials_file)},
        "static_configs": [{"targets": [target]}],
    }
    interval = f"{interval_s}s"
    tree = {
        "global": {"scrape_interval": interval, "evaluation_interval": interval},
        "rule_files": [RULES],
        "scrape_configs": [job],
    }
    return yaml.safe_dump(tree, sort_keys=False)


def alert_rules(thresholds: Thresholds) -> str:
    """alerts.yml: one group of rules."""
    failed = f'sum(rate({REQUESTS.name}{{status=~"5.."}}[5m]))'
    rules = [
        _rule("EndpointDown", f'up{{job="{JOB}"}} == 0', "1m", "critical", "The endpoint does not answer the scrape."),
        _rule(
            "ReplicaLost",
            f"{REPLICAS_UP.name} < {REPLICAS_WANTED.name}",
            "30s",
            "critical",
            "Only {{ $value }} replicas work.",
        ),
        _rule(
            "ErrorRateHigh",
            f"{failed} / sum(rate({REQUESTS.name}[5m])) > {thresholds.error_ratio:g}",
            "2m",
            "critical",
            "{{ $value | humanizePercentage }} of the requests fail.",
        ),
        _rule(
            "ModelFails",
            f"increase({FAILED.name}[5m]) > 0",
            "0s",
            "critical",
            "The model failed {{ $value }} completions in five minutes.",
        ),
        _slow("LatencyHigh", DURATION, thresholds.p95_latency_s, "answered"),
        _slow("FirstTokenSlow", FIRST_TOKEN, thresholds.p95_first_token_s, "begun"),
        _rule(
            "QueueLong",
            f"{QUEUED.name} > {thresholds.queued_requests}",
            "2m",
            "warning",
            "{{ $value }} requests wait for a slot: add replicas or slots.",
        ),
    ]
    return yaml.safe_dump({"groups": [{"name": JOB, "rules": rules}]}, sort_keys=False, width=200)


def _slow(name: str, metric: Metric, limit_s: float, what: str) -> dict[str, Any]:
    quantile = f"histogram_quantile(0.95, sum by (le) (rate({metric.name}_bucket[5m])))"
    summary = f"5 % of the requests are {what} after {{{{ $value }}}} s or later; the limit is {limit_s:g} s."
    return _rule(name, f"{quantile} > {limit_s:g}", "5m", "warning", summary)


def _rule(name: str, expression: str, lasting: str, severity: str, summary: str) -> dict[str, Any]:
    return {
        "alert": name,
        "expr": expression,
        "for": lasting,
        "labels": {"severity": severity},
        "annotations": {"summary": summary},
    }
