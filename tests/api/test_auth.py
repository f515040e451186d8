import hashlib
import json

import pytest

from raymill.api.auth import POLICY, KeyFile, route_of
from raymill.api.routes import Settings, create_app
from raymill.errors import MachineError
from raymill.telemetry.metrics import Metrics

PATHS = {path.replace("{id}", "tiny"): role for path, role in POLICY.items()}
ASKED = [
    *PATHS,
    "/",
    "/docs",
    "/v1",
    "/v1/embeddings",
    "/admin",
    "/metrics/",
    "/health/x",
    "//health",
    "/v1/models/a/b",
]


def paths_of(app):
    return {route.path for route in app.routes}


def status(served, path, key):
    headers = {} if key is None else {"Authorization": key}
    with served.http() as http:
        del http.headers["Authorization"]
        response = http.get(path, headers=headers)
    assert response.status_code < 400 or set(response.json()["error"]) == {"message", "type", "param", "code"}
    return response.status_code


@pytest.mark.parametrize("path", ASKED)
@pytest.mark.parametrize(
    "key", [None, "", "Bearer", "Bearer  x", "Bearer sk-wrong", "Basic c2s6", "sk-wrong", "Bearer \u00e9"]
)
def test_without_a_good_key_only_health_answers(served, path, key):
    key = key and key.encode("latin-1")
    assert status(served, path, key) == (200 if path == "/health" else 401)


@pytest.mark.parametrize("path", ASKED)
def test_a_key_opens_its_own_routes_only(served, path):
    for name, key in (("client", served.client_key), ("metrics", served.metrics_key)):
        seen = status(served, path, f"Bearer {key}")
        role = PATHS.get(path, "nobody")
        if role == "nobody":
            assert seen == 404
        elif role not in (None, name):
            assert seen == 403
        else:
            assert seen in (200, 405)


def test_every_route_has_a_policy_and_every_policy_a_route(served):
    app = create_app(
        served.engine, served.tokenizer, Settings(model_name="x", quantization="none"), served.keys, Metrics()
    )
    assert {route_of(path.replace("{model_id}", "x")) for path in paths_of(app)} == set(POLICY)


def test_a_route_without_a_policy_cannot_be_reached(served, tmp_path):
    from starlette.testclient import TestClient

    keys = KeyFile(tmp_path / "api_keys.json")
    key = keys.create("client")
    app = create_app(served.engine, served.tokenizer, Settings(model_name="x", quantization="none"), keys, Metrics())
    app.add_api_route("/secret", lambda: "open", methods=["GET"])
    client = TestClient(app)
    assert client.get("/secret").status_code == 401
    assert client.get("/secret", headers={"Authorization": f"Bearer {key}"}).status_code == 404


def test_only_hashes_are_stored_and_only_the_owner_reads_them(tmp_path):
    keys = KeyFile(tmp_path / "api_keys.json")
    made = [keys.create("client"), keys.create("metrics")]
    text = keys.path.read_text()
    assert keys.path.stat().st_mode & 0o777 == 0o600
    assert all(key.startswith("sk-") and len(key) > 40 and key[3:] not in text for key in made)
    assert hashlib.sha256(made[0].encode()).hexdigest() in text
    assert [keys.role_of(key) for key in (*made, "sk-other", "")] == ["client", "metrics", None, None]


def test_keys_made_and_removed_elsewhere_count_at_once(tmp_path):
    here, elsewhere = KeyFile(tmp_path / "api_keys.json"), KeyFile(tmp_path / "api_keys.json")
    assert not here.has("client")
    key = elsewhere.create("client")
    assert here.role_of(key) == "client"
    second = elsewhere.create("client")
    values = json.loads(here.path.read_text())
    values["keys"] = values["keys"][1:]
    aside = tmp_path / "aside"
    aside.write_text(json.dumps(values))
    aside.chmod(0o600)
    aside.replace(here.path)
    assert (here.role_of(key), here.role_of(second)) == (None, "client")
    here.path.unlink()
    assert here.role_of(second) is None


def test_a_file_others_can_read_or_that_is_damaged_is_refused(tmp_path):
    keys = KeyFile(tmp_path / "api_keys.json")
    key = keys.create("client")
    keys.path.chmod(0o640)
    with pytest.raises(MachineError, match="chmod 600"):
        keys.role_of(key)
    keys.path.chmod(0o600)
    keys.path.write_text('{"keys": [{"role": "admin"}]}')
    with pytest.raises(MachineError, match="damaged"):
        keys.role_of(key)
