import pytest

from raymill.api.auth import POLICY, route_of
from raymill.api.keys import KeyFile
from raymill.api.routes import ApiSettings, create_app
from raymill.telemetry.metrics import Metrics

PATHS = {path.replace("{model}", "tiny"): role for path, role in POLICY.items()}
ASKED = [
    *PATHS,
    "/",
    "/docs",
    "/v1",
    "/v1/nothing",
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
    assert (response.status_code == 401) == (response.headers.get("www-authenticate") == "Bearer")
    assert response.status_code < 400 or set(response.json()["error"]) == {"message", "type", "param", "code"}
    return response.status_code


@pytest.mark.parametrize("path", ASKED)
@pytest.mark.parametrize(
    "key", [None, "", "Bearer", "Bearer  x", "Bearer sk-wrong", "Basic c2s6", "sk-wrong", "Bearer \u00e9"]
)
def test_without_a_good_key_only_health_answers(served, path, key):
    key = key and key.encode("latin-1")
    assert status(served, path, key) == (200 if path == "/health" else 401)


def test_a_good_key_is_good_as_a_bearer_only(served):
    for scheme in ("", "Basic ", "Token ", "Bearer"):
        assert status(served, "/v1/models", scheme + served.client_key) == 401
    for scheme in ("Bearer ", "bearer ", "Bearer  "):
        assert status(served, "/v1/models", scheme + served.client_key) == 200


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
        served.engine, served.tokenizer, ApiSettings(model_name="x", quantization="none"), served.keys, Metrics()
    )
    assert {route_of(path.replace("{model}", "x")) for path in paths_of(app)} == set(POLICY)


def test_a_path_falls_under_one_row_of_the_policy_or_none():
    paths = ("/v1/models", "/v1/models/", "/v1/models/x", "/v1/models/x/", "/v1/models/x/y", "/v1/modelsx", "/health/")
    assert [route_of(path) for path in paths] == ["/v1/models", None, "/v1/models/{model}", *[None] * 4]


def test_a_route_without_a_policy_cannot_be_reached(served, tmp_path):
    from starlette.testclient import TestClient

    keys = KeyFile(tmp_path / "api_keys.json")
    key = keys.create("client")
    app = create_app(served.engine, served.tokenizer, ApiSettings(model_name="x", quantization="none"), keys, Metrics())
    app.add_api_route("/secret", lambda: "open", methods=["GET"])
    client = TestClient(app)
    assert client.get("/secret").status_code == 401
    assert client.get("/secret", headers={"Authorization": f"Bearer {key}"}).status_code == 404


@pytest.mark.parametrize("path", ["/secret", "/health", "/v1/models"])
@pytest.mark.parametrize("with_key", [False, True])
def test_a_websocket_is_closed_whatever_routes_exist(served, path, with_key):
    from starlette.testclient import TestClient
    from starlette.websockets import WebSocket, WebSocketDisconnect

    reached = []
    app = create_app(
        served.engine, served.tokenizer, ApiSettings(model_name="x", quantization="none"), served.keys, Metrics()
    )

    async def accept(websocket: WebSocket):
        reached.append(websocket)
        await websocket.accept()

    app.add_api_websocket_route(path, accept)
    headers = {"Authorization": f"Bearer {served.client_key}"} if with_key else {}
    with pytest.raises(WebSocketDisconnect) as closed, TestClient(app).websocket_connect(path, headers=headers):
        pass
    assert closed.value.code == 1008 and not reached
