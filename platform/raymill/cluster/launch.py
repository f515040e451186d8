"""What another launcher needs to make a cluster of a cluster file: file names and their YAML.

    aws, gcp, azure, on_premise    launcher.yaml for `ray up`
    kubernetes                     raycluster.yaml; with a job rayjob.yaml, and rayservice.yaml if it serves; for `kubectl apply`

Nothing is sent anywhere and no secret is written into a file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from raymill.cluster import kubernetes, vms
from raymill.cluster.config import ClusterConfig
from raymill.errors import UsageError


def render(config: ClusterConfig, job_path: str | None) -> dict[str, str]:
    """File name to YAML text; UsageError for a place that needs no launcher or a job that cannot be read."""
    if config.provider == "local":
        raise UsageError(
            f"cluster {config.name} is this machine and needs no launcher",
            fix="use --on cluster/aws.yaml, gcp, azure, on_premise or kubernetes",
        )
    if config.provider != "kubernetes":
        return {"launcher.yaml": _text(vms.STORY, [vms.launcher(config)])}
    files = {"raycluster.yaml": _text(kubernetes.CLUSTER_STORY, [kubernetes.ray_cluster(config)])}
    if job_path is not None:
        job = _read(Path(job_path))
        files["rayjob.yaml"] = _text(kubernetes.JOB_STORY, kubernetes.ray_job(config, job))
        if "serve" in yaml.safe_load(job):
            files["rayservice.yaml"] = _text(kubernetes.SERVICE_STORY, [kubernetes.ray_service(config, job)])
    return files


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read", why=str(error), fix="name a job file") from None


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
