import re
import shutil
import subprocess

import pytest
import yaml
from pydantic import ValidationError

from raymill.telemetry.alerts import RULES, SCRAPE, Thresholds, alert_rules, scrape_config
from raymill.telemetry.metrics import TABLE


def rules_of(**changes):
    return {rule["alert"]: rule for rule in yaml.safe_load(alert_rules(Thresholds(**changes)))["groups"][0]["rules"]}


def test_every_metric_a_rule_names_is_declared():
    declared = {metric.name for metric in TABLE} | {f"{m.name}_bucket" for m in TABLE if m.kind == "histogram"}
    named = {name for rule in rules_of().values() for name in re.findall(r"raymill_\w+", rule["expr"])}
    assert named and named <= declared


def test_every_label_a_rule_asks_for_is_declared():
    labels = {label for metric in TABLE for label in metric.labels} | {"job"}
    asked = {label for rule in rules_of().values() for label in re.findall(r"(\w+)=~?\"", rule["expr"])}
    assert asked and asked <= labels


def test_the_rules_cover_what_can_go_wrong_and_take_the_thresholds():
    rules = rules_of(p95_latency_s=7.5, error_ratio=0.03, queued_requests=99)
    assert {"EndpointDown", "ReplicaLost", "ErrorRateHigh", "LatencyHigh", "FirstTokenSlow", "QueueLong"} <= set(rules)
    assert rules["LatencyHigh"]["expr"].endswith("> 7.5")
    assert rules["ErrorRateHigh"]["expr"].endswith("> 0.03")
    assert rules["QueueLong"]["expr"].endswith("> 99")
    assert all(rule["labels"]["severity"] in ("critical", "warning") for rule in rules.values())


def test_the_scrape_sends_the_key_from_its_file(tmp_path):
    tree = yaml.safe_load(scrape_config("127.0.0.1:8000", tmp_path / "key", 5))
    job = tree["scrape_configs"][0]
    assert job["static_configs"] == [{"targets": ["127.0.0.1:8000"]}]
    assert job["authorization"] == {"type": "Bearer", "credentials_file": str(tmp_path / "key")}
    assert (tree["rule_files"], tree["global"]["scrape_interval"]) == ([RULES], "5s")


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_accepts_both_files(tmp_path):
    (tmp_path / "key").write_text("sk-x")
    (tmp_path / SCRAPE).write_text(scrape_config("127.0.0.1:8000", tmp_path / "key", 5))
    (tmp_path / RULES).write_text(alert_rules(Thresholds()))
    subprocess.run(["promtool", "check", "config", str(tmp_path / SCRAPE)], check=True)


@pytest.mark.parametrize("wrong", [{"p95_latency_s": 0}, {"error_ratio": 1.5}, {"queued_requests": 0}])
def test_thresholds_out_of_bounds_are_refused(wrong):
    with pytest.raises(ValidationError):
        Thresholds(**wrong)
