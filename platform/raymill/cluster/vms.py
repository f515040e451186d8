"""A cluster file for machines (AWS, GCP, Azure, on premise) as a file for Ray's cluster launcher, `ray up`.

The head and each role with machines of its own become node types; on premise the hosts are all alike. Every machine
gets its own Python of the launching machine's version, raymill's wheel, and the Ray token. Ray's dashboard listens on
the head's loopback only: `ray dashboard` brings it here through ssh.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from raymill.cluster.config import ClusterConfig, Machines, Provider, RoleName
from raymill.cluster.session import ensure_token

STORY = """
Made by `raymill plan --write`. From the folder that holds pyproject.toml:
  pip wheel . --no-deps --wheel-dir dist       # what the machines install
  ray up FOLDER/launcher.yaml                  # starts the head; workers come when a job needs them
  ray dashboard FOLDER/launcher.yaml           # leave it open: it brings the dashboard to 127.0.0.1:8265
  raymill submit JOB --on CLUSTER_FILE
  ray down FOLDER/launcher.yaml                # stops paying
"""

_BIN = "$HOME/raymill-env/bin"
# A job's `python` is whatever is on the PATH of `ray start`.
_ENVIRONMENT = (
    f"export PATH={_BIN}:$PATH RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$HOME/.ray/auth_token RAY_USAGE_STATS_ENABLED=0"
)
# What Ray's autoscaler on the head needs to start machines, by provider.
_CLOUD_LIBRARIES: dict[Provider, str] = {
    "aws": "boto3",
    "gcp": "google-api-python-client google-cloud-compute cryptography",
    "azure": "azure-identity azure-mgmt-compute azure-mgmt-network azure-mgmt-resource azure-common msrest msrestazure",
}


def launcher(config: ClusterConfig) -> dict[str, Any]:
    """The launcher file as a tree."""
    assert config.provider not in ("local", "kubernetes")
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    start = f"{_ENVIRONMENT}; ulimit -n 65536; {_BIN}/ray start"
    memory = f"--object-store-memory={int(config.object_store_gib * 2**30)}"
    tree: dict[str, Any] = {
        "cluster_name": config.name,
        "provider": _provider(config),
        "auth": _auth(config),
        "file_mounts": {"~/raymill-dist": "./dist", "~/.ray/auth_token": _below_home(ensure_token())},
        "setup_commands": [
            *config.setup,
            "command -v ~/.local/bin/uv || curl -LsSf https://astral.sh/uv/install.sh | sh",
            f"~/.local/bin/uv venv --allow-existing --python {python} ~/raymill-env",
            "~/.local/bin/uv pip install --python ~/raymill-env/bin/python ~/raymill-dist/raymill-*.whl",
            "chmod 600 ~/.ray/auth_token",
        ],
        # Only the head starts Ray's dashboard, for submit; 6379 is what the workers dial.
        "head_start_ray_commands": [
            f"{_BIN}/ray stop",
            f"{start} --head --port=6379 --dashboard-host=127.0.0.1 --dashboard-port=8265 {memory} "
            "--autoscaling-config=$HOME/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": [f"{_BIN}/ray stop", f"{start} --address=$RAY_HEAD_IP:6379 {memory}"],
    }
    if config.provider == "on_premise":
        return tree
    types = {f"{role}-worker": machines for role, machines in _role_machines(config).items()}
    tree |= {
        "max_workers": sum(machines.max_count for machines in types.values()),
        "idle_timeout_minutes": config.idle_timeout_min,
        "head_node_type": "head",
        "available_node_types": {
            "head": _node_type(config.provider, config.head) | {"min_workers": 0, "max_workers": 0},
            **{
                name: _node_type(config.provider, machines)
                | {"min_workers": machines.min_count, "max_workers": machines.max_count}
                for name, machines in types.items()
            },
        },
        "head_setup_commands": [
            f"~/.local/bin/uv pip install --python ~/raymill-env/bin/python {_CLOUD_LIBRARIES[config.provider]}"
        ],
    }
    return tree


def _below_home(path: Path) -> str:
    """`~/...` where it can be, so that the file says nothing of whose machine made it."""
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)


def _provider(config: ClusterConfig) -> dict[str, Any]:
    if config.provider == "aws":
        zone = {"availability_zone": config.zone} if config.zone else {}
        return {"type": "aws", "region": config.region, **zone, "cache_stopped_nodes": False}
    if config.provider == "gcp":
        return {"type": "gcp", "region": config.region, "availability_zone": config.zone, "project_id": config.project}
    if config.provider == "azure":
        return {"type": "azure", "location": config.region, "resource_group": config.project}
    assert config.ssh is not None
    head, *workers = config.ssh.hosts
    return {"type": "local", "head_ip": head, "worker_ips": workers}


def _auth(config: ClusterConfig) -> dict[str, str]:
    if config.ssh is not None:
        key = {"ssh_private_key": config.ssh.private_key}
        public = {"ssh_public_key": f"{config.ssh.private_key}.pub"} if config.provider == "azure" else {}
        return {"ssh_user": config.ssh.user, **key, **public}
    keys = {"ssh_private_key": "~/.ssh/id_rsa", "ssh_public_key": "~/.ssh/id_rsa.pub"}
    return {"ssh_user": "ubuntu", **(keys if config.provider == "azure" else {})}


def _role_machines(config: ClusterConfig) -> dict[RoleName, Machines]:
    names: tuple[RoleName, ...] = ("data", "train", "serve")
    own = {name: config.roles.of(name).machines for name in names}
    return {name: machines for name, machines in own.items() if machines is not None}


def _node_type(provider: Provider, machines: Machines) -> dict[str, Any]:
    build = {"aws": _aws_node, "gcp": _gcp_node, "azure": _azure_node}[provider]
    resources = {"CPU": machines.cpus} | ({"GPU": machines.gpus} if machines.gpus else {})
    return {"resources": resources, "node_config": build(machines)}


def _aws_node(machines: Machines) -> dict[str, Any]:
    disk = {"VolumeSize": machines.disk_gib, "VolumeType": "gp3"}
    node: dict[str, Any] = {
        "InstanceType": machines.machine_type,
        "BlockDeviceMappings": [{"DeviceName": "/dev/sda1", "Ebs": disk}],
        "MetadataOptions": {"HttpTokens": "required"},
    }
    return node | ({"InstanceMarketOptions": {"MarketType": "spot"}} if machines.spot else {})


def _gcp_node(machines: Machines) -> dict[str, Any]:
    # Google's images with NVIDIA drivers are of the deep learning project; plain Ubuntu has none.
    image = (
        "projects/deeplearning-platform-release/global/images/family/common-cu128-ubuntu-2204-nvidia-570"
        if machines.gpus
        else "projects/ubuntu-os-cloud/global/images/family/ubuntu-2204-lts"
    )
    disk = {"diskSizeGb": machines.disk_gib, "sourceImage": image}
    node: dict[str, Any] = {
        "machineType": machines.machine_type,
        "disks": [{"boot": True, "autoDelete": True, "type": "PERSISTENT", "initializeParams": disk}],
    }
    # A machine with GPUs cannot move to another host while it runs.
    scheduling = ({"preemptible": True} if machines.spot else {}) | (
        {"onHostMaintenance": "TERMINATE"} if machines.gpus else {}
    )
    return node | ({"scheduling": [scheduling]} if scheduling else {})


def _azure_node(machines: Machines) -> dict[str, Any]:
    # Microsoft's data science image holds the NVIDIA drivers.
    parameters: dict[str, Any] = {
        "vmSize": machines.machine_type,
        "imagePublisher": "microsoft-dsvm",
        "imageOffer": "ubuntu-2204",
        "imageSku": "2204-gen2",
        "imageVersion": "latest",
        "osDiskSize": machines.disk_gib,
    }
    return {"azure_arm_parameters": parameters | ({"priority": "Spot"} if machines.spot else {})}
