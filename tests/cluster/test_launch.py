"""The launcher files: Ray's own launcher accepts them, KubeRay's shape holds, and no secret stands in them."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from raymill.cluster.config import ClusterConfig
from raymill.cluster.launch import render
from raymill.cluster.session import ensure_token
from raymill.config import load
from raymill.errors import ConfigError, UsageError

ROOT = Path(__file__).resolve().parents[2]
AUTOSCALER = Path(ray.__file__).parent / "autoscaler"
JOB = (ROOT / "jobs" / "tiny.yaml").read_text()
MACHINES = ["aws", "gcp", "azure", "on_premise"]
pytestmark = pytest.mark.usefixtures("home")


def place(name: str, *overrides: str) -> ClusterConfig:
    return load(ClusterConfig, ROOT / "cluster" / f"{name}.yaml", overrides)


def launcher(name: str, *overrides: str) -> dict[str, Any]:
    files = render(place(name, *overrides), JOB)
    assert list(files) == ["launcher.yaml"]
    tree: dict[str, Any] = yaml.safe_load(files["launcher.yaml"])
    return tree


@pytest.mark.parametrize("name", MACHINES)
def test_rays_launcher_accepts_it(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(launcher(name))
    validate_config(prepared)
    assert prepared["cluster_name"] == place(name).name


@pytest.mark.parametrize("name", MACHINES)
def test_raymill_and_the_token_get_there(name: str) -> None:
    tree = launcher(name)
    assert tree["file_mounts"]["~/.ray/auth_token"] == "~/.local/state/raymill/ray_token"
    assert any("raymill-*.whl" in command for command in tree["setup_commands"])
    for start in (tree["head_start_ray_commands"][-1], tree["worker_start_ray_commands"][-1]):
        assert "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.ray/auth_token" in start
        assert "PATH=$HOME/raymill-env/bin:" in start
    assert "--dashboard-host=127.0.0.1" in tree["head_start_ray_commands"][-1]


@pytest.mark.parametrize("name", ["aws", "gcp", "azure"])
def test_roles_become_node_types(name: str) -> None:
    tree, config = launcher(name), place(name)
    types = tree["available_node_types"]
    assert list(types) == ["head", "data-worker", "train-worker", "serve-worker"]
    train = config.roles.train.machines
    assert train is not None
    assert types["train-worker"]["resources"] == {"CPU": train.cpus, "GPU": train.gpus}
    assert types["train-worker"]["max_workers"] == train.max_count
    assert tree["max_workers"] == sum(each["max_workers"] for each in types.values())
    assert types["head"]["max_workers"] == 0


def test_a_role_without_machines_adds_none() -> None:
    assert list(launcher("aws", "roles.data.machines=null")["available_node_types"]) == [
        "head",
        "train-worker",
        "serve-worker",
    ]


@pytest.mark.parametrize(
    ("name", "spot"),
    [
        ("aws", {"InstanceMarketOptions": {"MarketType": "spot"}}),
        ("gcp", {"scheduling": [{"preemptible": True}]}),
        ("azure", {"priority": "Spot"}),
    ],
)
def test_spot_machines(name: str, spot: dict[str, Any]) -> None:
    types = launcher(name)["available_node_types"]
    nodes = {role: types[role]["node_config"] for role in ("data-worker", "train-worker")}
    if name == "azure":
        nodes = {role: node["azure_arm_parameters"] for role, node in nodes.items()}
    ((key, value),) = spot.items()
    assert nodes["data-worker"][key] == value
    assert nodes["train-worker"].get(key) != value


def test_azure_parameters_are_those_of_its_template() -> None:
    template = json.loads((AUTOSCALER / "_private" / "_azure" / "azure-vm-template.json").read_text())
    for node in launcher("azure")["available_node_types"].values():
        assert set(node["node_config"]["azure_arm_parameters"]) <= set(template["parameters"])


def test_on_premise_hosts() -> None:
    tree = launcher("on_premise")
    assert tree["provider"] == {
        "type": "local",
        "head_ip": "node1.example.org",
        "worker_ips": ["node2.example.org", "node3.example.org"],
    }
    assert tree["auth"] == {"ssh_user": "raymill", "ssh_private_key": "~/.ssh/id_ed25519"}


# What KubeRay 1.5's CRDs ask for, as far as we use them; a name they do not know is refused.
def known(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


COUNT = {"type": "integer", "minimum": 0}
START = {"type": "object", "additionalProperties": {"type": "string"}}
QUANTITY = {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": r"^[0-9.]+(Mi|Gi|m)?$"}]}
SIZE = {"type": "object", "additionalProperties": QUANTITY}
CONTAINER = known(
    name={"type": "string"},
    image={"type": "string"},
    resources=known(requests=SIZE, limits=SIZE),
    ports={"type": "array", "items": known(name={"type": "string", "maxLength": 15}, containerPort=COUNT)},
    volumeMounts={"type": "array", "items": known(name={"type": "string"}, mountPath={"pattern": "^/"})},
    securityContext={"type": "object"},
) | {"required": ["name", "image", "resources"]}
POD = known(
    spec=known(
        containers={"type": "array", "minItems": 1, "items": CONTAINER},
        volumes={"type": "array"},
        securityContext={"type": "object"},
        tolerations={"type": "array"},
    )
)
CLUSTER = known(
    rayVersion={"type": "string"},
    authOptions=known(mode={"enum": ["disabled", "token"]}),
    enableInTreeAutoscaling={"type": "boolean"},
    autoscalerOptions=known(idleTimeoutSeconds=COUNT, version={"enum": ["v1", "v2"]}),
    headGroupSpec=known(rayStartParams=START, template=POD) | {"required": ["template"]},
    workerGroupSpecs={
        "type": "array",
        "items": known(
            groupName={"type": "string"},
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=START,
            template=POD,
        )
        | {"required": ["groupName", "maxReplicas", "minReplicas", "template"]},
    },
) | {"required": ["headGroupSpec"]}
SPECS = {
    "RayCluster": CLUSTER,
    "RayJob": known(
        entrypoint={"type": "string"},
        shutdownAfterJobFinishes={"type": "boolean"},
        ttlSecondsAfterFinished=COUNT,
        backoffLimit=COUNT,
        rayClusterSpec=CLUSTER,
    ),
    "RayService": known(serveConfigV2={"type": "string"}, rayClusterConfig=CLUSTER),
}


def resources(*overrides: str) -> dict[str, list[dict[str, Any]]]:
    files = render(place("kubernetes", *overrides), JOB)
    return {name: list(yaml.safe_load_all(text)) for name, text in files.items()}


def test_kuberay_resources_have_the_shape() -> None:
    files = resources()
    assert list(files) == ["raycluster.yaml", "rayjob.yaml", "rayservice.yaml"]
    kinds = []
    for document in [each for documents in files.values() for each in documents]:
        kinds.append(document["kind"])
        assert document["metadata"]["namespace"] == "default"
        if document["kind"] in SPECS:
            assert document["apiVersion"] == "ray.io/v1"
            jsonschema.validate(document["spec"], SPECS[document["kind"]])
    assert kinds == ["RayCluster", "ConfigMap", "RayJob", "RayService"]


def test_pods_have_what_the_file_says() -> None:
    (cluster,) = resources()["raycluster.yaml"]
    groups = {group["groupName"]: group for group in cluster["spec"]["workerGroupSpecs"]}
    assert list(groups) == ["data", "train", "serve"]
    train = groups["train"]["template"]["spec"]
    assert train["containers"][0]["resources"]["limits"] == {
        "cpu": 8,
        "memory": "65536Mi",
        "ephemeral-storage": "200Gi",
        "nvidia.com/gpu": 1,
    }
    assert (groups["train"]["minReplicas"], groups["train"]["maxReplicas"]) == (0, 8)
    assert {"name": "storage", "mountPath": "/mnt/raymill"} in train["containers"][0]["volumeMounts"]
    assert "tolerations" in groups["data"]["template"]["spec"]
    assert "tolerations" not in train
    assert cluster["spec"]["rayVersion"] == ray.__version__
    assert train["securityContext"]["runAsNonRoot"] is True


def test_every_mount_has_its_volume() -> None:
    files, job = resources()["rayjob.yaml"]
    for pod in pods(job["spec"]["rayClusterSpec"]):
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == set(volumes)
        assert volumes["files"]["configMap"]["name"] == files["metadata"]["name"]


def pods(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [group["template"]["spec"] for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]]


def test_the_job_that_travels_is_the_job(tmp_path: Path) -> None:
    files, job = resources()["rayjob.yaml"]
    assert files["data"]["job.yaml"] == JOB
    (tmp_path / "cluster.yaml").write_text(files["data"]["cluster.yaml"])
    assert load(ClusterConfig, tmp_path / "cluster.yaml") == place("kubernetes")
    assert "/etc/raymill/job.yaml --on /etc/raymill/cluster.yaml" in job["spec"]["entrypoint"]


def test_the_service_serves_the_jobs_run() -> None:
    (service,) = resources()["rayservice.yaml"]
    serving = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = serving["applications"]
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    assert application["args"]["run_folder"] == "/mnt/raymill/tiny"
    assert application["args"]["serve"] == {"replicas": 2}
    assert application["args"]["role"]["gpus_per_worker"] == 1
    assert serving["http_options"]["port"] == 8000


def test_a_changed_file_has_another_name() -> None:
    names = {resources(*change)["rayjob.yaml"][0]["metadata"]["name"] for change in ([], ["idle_timeout_min=6"])}
    assert len(names) == 2


def test_a_job_that_does_not_serve_has_no_service(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("name: x\nprepare: {}\n")
    assert list(render(place("kubernetes"), (tmp_path / "job.yaml").read_text())) == ["raycluster.yaml", "rayjob.yaml"]


def test_without_a_job_there_is_only_the_cluster() -> None:
    assert list(render(place("kubernetes"), None)) == ["raycluster.yaml"]


@pytest.mark.parametrize("name", [*MACHINES, "kubernetes"])
def test_no_secret_is_written(name: str) -> None:
    secret = ensure_token().read_text()
    assert secret not in "".join(render(place(name), JOB).values())


def test_this_machine_needs_no_launcher() -> None:
    with pytest.raises(UsageError, match="needs no launcher"):
        render(ClusterConfig(), JOB)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["provider=kubernetes", "storage=/x"], "needs image, volume_claim"),
        (["provider=aws", "storage=/x"], "needs region"),
        (["provider=on_premise", "storage=/x"], "needs ssh"),
        (["provider=aws", "region=x"], "storage runs is relative"),
    ],
)
def test_what_a_place_needs(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load(ClusterConfig, None, overrides)
