"""The cluster file: one schema for a laptop, VMs in a cloud or on premise, and Kubernetes.

A job says WHAT (two train workers); this says WHERE and how large one worker is. The defaults are `cluster/laptop.yaml`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from raymill.config import Config

RoleName = Literal["data", "train", "serve"]
Provider = Literal["local", "aws", "gcp", "azure", "on_premise", "kubernetes"]


class Machines(Config):
    """A group of equal machines that a launcher starts for a role."""

    machine_type: str | None = None
    """The provider's name for the machine (m7i.4xlarge, n2-standard-16); not used on premise or on Kubernetes."""
    cpus: Annotated[int, Field(ge=1, le=1024)] = 4
    """CPU cores of one machine."""
    gpus: Annotated[int, Field(ge=0, le=64)] = 0
    """GPUs of one machine."""
    memory_gib: Annotated[float, Field(gt=0, le=65536)] = 16
    """Memory of one machine, GiB."""
    disk_gib: Annotated[int, Field(ge=10, le=65536)] = 100
    """Disk of one machine, GiB."""
    min_count: Annotated[int, Field(ge=0, le=10000)] = 0
    """Machines kept running even when idle."""
    max_count: Annotated[int, Field(ge=0, le=10000)] = 1
    """Machines the autoscaler may start."""
    spot: bool = False
    """Use cheaper machines that the provider may take back at any time."""

    @model_validator(mode="after")
    def _order(self) -> Machines:
        if self.min_count > self.max_count:
            raise ValueError(f"min_count {self.min_count} is above max_count {self.max_count}; fix: raise max_count")
        return self


class Role(Config):
    """How large one worker of a role is, and which machines carry it."""

    cpus_per_worker: Annotated[float, Field(gt=0, le=1024)] = 1
    """CPU cores one worker or replica takes; also its thread count, rounded down, at least 1."""
    gpus_per_worker: Annotated[float, Field(ge=0, le=64)] = 0
    """GPUs one worker or replica takes."""
    memory_gib_per_worker: Annotated[float, Field(gt=0, le=65536)] = 2
    """Memory one worker or replica is expected to need, GiB; checked against the machine before the job starts."""
    machines: Machines | None = None
    """The machines of this role; none means it runs on the head machine."""

    @property
    def threads(self) -> int:
        return max(1, int(self.cpus_per_worker))


class Roles(Config):
    """The three kinds of work a job asks for."""

    data: Role = Role()
    """prepare, tokenize, evaluate."""
    train: Role = Role()
    """train and tune."""
    serve: Role = Role(cpus_per_worker=1)
    """serve."""

    def of(self, name: RoleName) -> Role:
        role: Role = getattr(self, name)
        return role


class EndpointAddress(Config):
    """Where the endpoint listens."""

    host: str = "127.0.0.1"
    """Address to bind; loopback unless you open it on purpose."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """TCP port of the HTTP API."""


class Ssh(Config):
    """How a launcher reaches machines it did not create."""

    user: str
    """Login name on every machine."""
    private_key: str
    """Path of the private key on the machine you launch from."""
    hosts: Annotated[tuple[str, ...], Field(min_length=1)]
    """Host names or addresses; the first is the head."""


class ClusterConfig(Config):
    """One place to run jobs."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,39}$")] = "laptop"
    """Name of the place; letters, digits and hyphens."""
    provider: Provider = "local"
    """Who runs the machines."""
    address: str | None = None
    """A running Ray cluster to use: `host:6379`, or `auto` for the one this process runs inside."""
    storage: str = "runs"
    """Folder for runs and their artifacts; every machine must see it under this path, so a shared file system; ~ is the home."""
    endpoint: EndpointAddress = EndpointAddress()
    """Where the HTTP API listens."""
    roles: Roles = Roles()
    """Worker sizes and machines by role."""
    head: Machines = Machines()
    """The machine that runs the head; ignored by provider local."""
    region: str | None = None
    """The cloud's region."""
    zone: str | None = None
    """The cloud's zone (gcp) or availability zone (aws)."""
    project: str | None = None
    """The cloud project (gcp) or resource group (azure)."""
    namespace: str = "default"
    """Kubernetes namespace."""
    volume_claim: str | None = None
    """Kubernetes claim of a shared volume, ReadWriteMany; every pod mounts it at `storage`."""
    image: str | None = None
    """Container image that holds raymill; required on Kubernetes."""
    ssh: Ssh | None = None
    """Login for provider on_premise."""
    setup: tuple[str, ...] = ()
    """Shell commands a launcher runs first on every new machine, for example to mount `storage`."""
    object_store_gib: Annotated[float, Field(ge=0.08, le=1024)] = 0.25
    """Shared memory for Ray's objects on each machine, GiB; text and weights go through files, so little is needed."""
    idle_timeout_min: Annotated[float, Field(gt=0, le=1440)] = 5
    """Minutes a machine may idle before the autoscaler gives it back."""

    @field_validator("storage")
    @classmethod
    def _a_folder(cls, value: str) -> str:
        if "://" in value:
            raise ValueError(
                f"{value} must be a folder that every machine sees, for now; fix: mount it and give the mounted path"
            )
        try:
            return str(Path(value).expanduser())
        except RuntimeError:
            raise ValueError(f"{value} begins with no user's home; fix: give the whole path") from None

    @model_validator(mode="after")
    def _needs_of_provider(self) -> ClusterConfig:
        needs = {"aws": ("region",), "gcp": ("region", "zone", "project"), "azure": ("region", "project")}
        needs |= {"kubernetes": ("image", "volume_claim"), "on_premise": ("ssh",)}
        missing = [name for name in needs.get(self.provider, ()) if getattr(self, name) is None]
        if missing:
            raise ValueError(f"provider {self.provider} needs {', '.join(missing)}; fix: add them to the cluster file")
        if self.provider != "local" and not self.storage.startswith("/"):
            raise ValueError(
                f"storage {self.storage} is relative; fix: give the path every machine sees, such as /mnt/raymill/runs"
            )
        return self
