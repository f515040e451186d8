"""The monitor stage against a stand-in endpoint; tests/stages/test_serve.py runs it against a real one."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import yaml

from raymill.artifact import Draft
from raymill.cluster.config import ClusterConfig
from raymill.cluster.session import Cluster
from raymill.config import Config
from raymill.errors import MachineError
from raymill.stages import monitor
from raymill.stages.contract import Inputs
from raymill.telemetry.alerts import Thresholds
from raymill.telemetry.metrics import MODEL_INFO, REPLICAS_UP, Metrics
from raymill.telemetry.progress import Progress


class Endpoint(BaseHTTPRequestHandler):
    drop = b""

    def do_GET(self):
        body = b"{}"
        if self.path == "/metrics":
            if self.headers["Authorization"] != "Bearer sk-metrics":
                self.send_error(403)
                return
            metrics = Metrics()
            metrics.set(REPLICAS_UP, 1)
            metrics.set(MODEL_INFO, 1, model="m", quantization="int8", version="1")
            lines = metrics.render().splitlines(keepends=True)
            body = b"".join(line for line in lines if not self.drop or self.drop not in line)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def inputs(tmp_path):
    Endpoint.drop = b""
    server = HTTPServer(("127.0.0.1", 0), Endpoint)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    (tmp_path / "metrics_key").write_text("sk-metrics")
    draft = Draft(tmp_path / "serve-0")
    port = server.server_address[1]
    values = {"url": f"http://127.0.0.1:{port}/v1", "host": "127.0.0.1", "port": port, "model": "m", "replicas": 1}
    (draft.path / "endpoint.json").write_text(json.dumps(values))
    made = draft.publish("endpoint", "serve", config=Config(), inputs={}, summary="", figures={})
    yield Inputs({"endpoint": made}, Draft(tmp_path / "monitor-0"), tmp_path, Progress("monitor"))
    server.shutdown()
    thread.join()
    server.server_close()


def run(inputs, **changes):
    return monitor.run(monitor.Config(**changes), inputs, Cluster(ClusterConfig()))


def test_files_and_a_health_report_are_published(inputs):
    made = run(inputs, scrape_interval_s=5, alerts=Thresholds(queued_requests=7))
    assert [entry.path for entry in made.manifest.files] == ["alerts.yml", "health.json", "prometheus.yml"]
    assert yaml.safe_load(made.file("prometheus.yml").read_text())["global"]["scrape_interval"] == "5s"
    assert "raymill_queued_requests > 7" in made.file("alerts.yml").read_text()
    assert made.figures["replicas_up"] == 1 and made.figures["alert_rules"] >= 6
    assert "1 of 1 replicas up" in made.manifest.summary


def test_a_declared_metric_that_is_not_shown_is_named(inputs):
    Endpoint.drop = b"raymill_queued_requests"
    with pytest.raises(MachineError, match="does not show raymill_queued_requests"):
        run(inputs)
    assert not inputs.draft.final.exists()


def test_a_wrong_key_or_a_dead_endpoint_is_a_message(inputs, tmp_path):
    (tmp_path / "metrics_key").write_text("sk-other")
    with pytest.raises(MachineError, match="does not answer"):
        run(inputs)


def test_promtools_refusal_is_a_message(inputs, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    tool = tmp_path / "bin" / "promtool"
    tool.write_text("#!/bin/sh\necho broken rule >&2\nexit 1\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(MachineError, match="promtool refuses") as refused:
        run(inputs)
    assert "broken rule" in str(refused.value)
    tool.write_text("#!/bin/sh\nexit 0\n")
    assert "promtool accepts them" in run(inputs).manifest.summary
