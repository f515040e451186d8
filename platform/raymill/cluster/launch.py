"""What another launcher needs to make a cluster of a cluster file: file names and their YAML.

    aws, gcp, azure, on_premise    launcher.yaml for `ray up`
    kubernetes                     raycluster.yaml; with a job rayjob.yaml, and rayservice.yaml if it serves; for `kubectl apply`

Nothing is sent anywhere and no secret is written into a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from raymill.cluster import kubernetes, vms
from raymill.cluster.config import ClusterConfig
from raymill.errors import UsageError


def render(config: ClusterConfig, job: str | None) -> dict[str, str]:
    """File name to YAML text; `job` is a job file's text. UsageError for a place that needs no launcher."""
    if config.provider == "local":
        raise UsageError(
            f"cluster {config.name} is this machine and needs no launcher",
            fix="use --on cluster/aws.yaml, gcp, azure, on_premise or kubernetes",
        )
    if config.provider != "kubernetes":
        return {"launcher.yaml": _text(vms.STORY, [vms.launcher(config)])}
    files = {"raycluster.yaml": _text(kubernetes.CLUSTER_STORY, [kubernetes.ray_cluster(config)])}
    if job is not None:
        files["rayjob.yaml"] = _text(kubernetes.JOB_STORY, kubernetes.ray_job(config, job))
        if yaml.safe_load(job).get("serve") is not None:
            files["rayservice.yaml"] = _text(kubernetes.SERVICE_STORY, [kubernetes.ray_service(config, job)])
    return files


class _Dumper(yaml.SafeDumper):
    """Long text stands as a block, as a person would write it; shared pieces are written out, not as anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _block(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _block)


def _text(story: str, documents: Sequence[dict[str, Any]]) -> str:
    comment = "".join(f"# {line}".rstrip() + "\n" for line in story.strip().splitlines())
    return comment + yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=120)
