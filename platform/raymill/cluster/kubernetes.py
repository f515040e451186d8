"""A cluster file for Kubernetes as KubeRay resources (ray.io/v1): RayCluster, RayJob, RayService.

The head and each role with machines of its own become pod groups, one pod per machine. Every pod mounts the shared
volume at `storage`. KubeRay makes the Ray token (a Secret) and gives it to the pods: that needs KubeRay 1.5.1 or newer.
The job and the cluster file travel in a ConfigMap. Pods run as user 1000, as in cluster/Dockerfile.
"""

from __future__ import annotations

import hashlib
from typing import Any

import yaml

from raymill import config as settings
from raymill.cluster.config import ClusterConfig, Machines, RoleName

CLUSTER_STORY = """
Made by `raymill plan --write`. Needs the KubeRay operator 1.5.1 or newer and the volume claim that it names.
  kubectl apply -f raycluster.yaml             # a cluster that stays; jobs come by `raymill submit`
  kubectl port-forward service/NAME-head-svc 8265
  export RAY_AUTH_TOKEN=$(kubectl get secret NAME -o jsonpath='{.data.auth_token}' | base64 -d)
"""
JOB_STORY = """
Made by `raymill plan --write`: the job on a cluster of its own, which ends with the job.
  kubectl apply -f rayjob.yaml
"""
SERVICE_STORY = """
Made by `raymill plan --write`: serves what the job made; apply it when the job has succeeded. The API's keys are
in the run's folder on the shared volume.
  kubectl apply -f rayservice.yaml
"""

_FILES = "/etc/raymill"
_USER = 1000
Tree = dict[str, Any]


def ray_cluster(config: ClusterConfig) -> Tree:
    """A cluster that stays."""
    return _resource("RayCluster", config, config.name, _cluster_spec(config, files=None))


def ray_job(config: ClusterConfig, job: str) -> list[Tree]:
    """The job on a cluster of its own: its files, then the RayJob."""
    files = _files(config, job)
    command = f"raymill run {_FILES}/job.yaml --on {_FILES}/cluster.yaml --no-serve"
    spec = {
        "entrypoint": command,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        "backoffLimit": 2,  # a job that runs again goes on where it was
        "rayClusterSpec": _cluster_spec(config, files["metadata"]["name"]),
    }
    return [files, _resource("RayJob", config, f"{config.name}-job", spec)]


def ray_service(config: ClusterConfig, job: str) -> Tree:
    """The endpoint of the job's run, kept up and upgraded by KubeRay."""
    tree = yaml.safe_load(job)
    application = {
        "name": "raymill",
        "route_prefix": "/",
        "import_path": "raymill.stages.serve:application",
        "args": {
            "run_folder": f"{config.storage}/{tree['name']}",
            "serve": tree["serve"],
            "role": config.roles.serve.model_dump(mode="json"),
        },
    }
    serve = {"http_options": {"host": "0.0.0.0", "port": config.endpoint.port}, "applications": [application]}  # noqa: S104 - inside its pod
    spec = {
        "serveConfigV2": yaml.safe_dump(serve, sort_keys=False),
        "rayClusterConfig": _cluster_spec(config, None),
    }
    return _resource("RayService", config, f"{config.name}-service", spec)


def _resource(kind: str, config: ClusterConfig, name: str, spec: Tree) -> Tree:
    metadata = {"name": name, "namespace": config.namespace, "labels": {"app.kubernetes.io/part-of": "raymill"}}
    return {"apiVersion": "ray.io/v1", "kind": kind, "metadata": metadata, "spec": spec}


def _files(config: ClusterConfig, job: str) -> Tree:
    """The job and the cluster file; a changed file has another name, so that pods never see half of a change."""
    data = {"job.yaml": job, "cluster.yaml": settings.dump(config)}
    digest = hashlib.sha256("".join(data.values()).encode()).hexdigest()[:8]
    metadata = {"name": f"{config.name}-files-{digest}", "namespace": config.namespace}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "immutable": True, "data": data}


def _cluster_spec(config: ClusterConfig, files: str | None) -> Tree:
    from importlib.metadata import version

    store = {"object-store-memory": str(int(config.object_store_gib * 2**30))}
    head_ports = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "serve": config.endpoint.port}
    roles: tuple[RoleName, ...] = ("data", "train", "serve")
    groups = [(role, config.roles.of(role).machines) for role in roles]
    return {
        "rayVersion": version("ray"),
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"idleTimeoutSeconds": int(config.idle_timeout_min * 60), "version": "v2"},
        "headGroupSpec": {
            "rayStartParams": {"dashboard-host": "0.0.0.0", **store},  # noqa: S104 - inside its pod, behind the token
            "template": _pod(config, config.head, "ray-head", files, head_ports),
        },
        "workerGroupSpecs": [
            {
                "groupName": role,
                "replicas": machines.min_count,
                "minReplicas": machines.min_count,
                "maxReplicas": machines.max_count,
                "rayStartParams": store,
                "template": _pod(config, machines, "ray-worker", files, {}),
            }
            for role, machines in groups
            if machines is not None
        ],
    }


def _pod(config: ClusterConfig, machines: Machines, name: str, files: str | None, ports: dict[str, int]) -> Tree:
    size: Tree = {"cpu": machines.cpus, "memory": f"{int(machines.memory_gib * 1024)}Mi"}
    size |= {"ephemeral-storage": f"{machines.disk_gib}Gi"}
    size |= {"nvidia.com/gpu": machines.gpus} if machines.gpus else {}
    # Ray's objects live in /dev/shm, of which a pod has 64 MiB unless it is given more.
    shared = {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": f"{_shared_mib(config)}Mi"}}
    storage = {"name": "storage", "persistentVolumeClaim": {"claimName": config.volume_claim}}
    volumes: list[Tree] = [shared, storage]
    mounts = [{"name": "shared-memory", "mountPath": "/dev/shm"}, {"name": "storage", "mountPath": config.storage}]  # noqa: S108
    if files is not None:
        volumes.append({"name": "files", "configMap": {"name": files}})
        mounts.append({"name": "files", "mountPath": _FILES})
    container: Tree = {
        "name": name,
        "image": config.image,
        "resources": {"requests": size, "limits": size},
        "volumeMounts": mounts,
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    if ports:
        container["ports"] = [{"name": each, "containerPort": number} for each, number in ports.items()]
    spec: Tree = {
        "securityContext": {"runAsNonRoot": True, "runAsUser": _USER, "fsGroup": _USER},
        "containers": [container],
        "volumes": volumes,
    }
    if machines.spot:
        # The taints of spot pools on GKE and AKS; EKS sets none. A pool without them takes the pod as well.
        spot_taints = ("cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority")
        spec["tolerations"] = [{"key": key, "operator": "Exists", "effect": "NoSchedule"} for key in spot_taints]
    return {"spec": spec}


def _shared_mib(config: ClusterConfig) -> int:
    return int(config.object_store_gib * 1024) + 64
