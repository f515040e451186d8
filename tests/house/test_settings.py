"""Every shipped file loads against its schema, and every setting explains itself."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import annotated_types
import pytest
from pydantic.fields import FieldInfo

import raymill
from raymill.cluster.config import ClusterConfig
from raymill.config import Config, load

ROOT = Path(__file__).resolve().parents[2]
STAGES = ROOT / "platform" / "raymill" / "stages"


@pytest.mark.parametrize("path", sorted((ROOT / "jobs").glob("*.yaml")), ids=lambda path: path.name)
def test_job_file_loads(path: Path) -> None:
    from raymill.pipeline import load_job

    load_job(path)


@pytest.mark.parametrize("path", sorted((ROOT / "cluster").glob("*.yaml")), ids=lambda path: path.name)
def test_cluster_file_loads(path: Path) -> None:
    assert load(ClusterConfig, path).name


def test_there_are_files_to_load() -> None:
    names = {path.name for path in (ROOT / "cluster").glob("*.yaml")}
    assert {"laptop.yaml", "aws.yaml", "gcp.yaml", "azure.yaml", "on_premise.yaml", "kubernetes.yaml"} <= names


def test_laptop_file_is_the_defaults() -> None:
    assert load(ClusterConfig, ROOT / "cluster" / "laptop.yaml") == ClusterConfig()


def settings_classes() -> list[type[Config]]:
    """Every Config class the package defines."""
    for module in pkgutil.walk_packages(raymill.__path__, "raymill."):
        importlib.import_module(module.name)
    found: set[type[Config]] = set()
    fresh = [Config]
    while fresh:
        children = [child for child in fresh.pop().__subclasses__() if child.__module__.startswith("raymill.")]
        fresh += children
        found.update(children)
    return sorted(found, key=lambda cls: (cls.__module__, cls.__name__))


def test_every_setting_says_what_it_is() -> None:
    classes = settings_classes()
    assert len(classes) > 8
    silent = [
        f"{cls.__module__}.{cls.__qualname__}.{name}"
        for cls in classes
        for name, field in cls.model_fields.items()
        if not (field.description or "").rstrip().endswith(".")
    ]
    assert silent == []


def user_settings() -> set[type[Config]]:
    """What a user writes in a job or cluster file: not manifests or indexes, which we write ourselves."""
    roots: list[Any] = [ClusterConfig]
    for path in STAGES.glob("*.py"):
        module = importlib.import_module(f"raymill.stages.{path.stem}")
        roots += [module.Config] if hasattr(module, "GIVES") else []
    found: set[type[Config]] = set()
    while roots:
        cls = roots.pop()
        if isinstance(cls, type) and issubclass(cls, Config) and cls not in found:
            found.add(cls)
            roots += [inner for field in cls.model_fields.values() for inner in leaves(field.annotation)]
    return found


def leaves(annotation: Any) -> Iterator[Any]:
    inner = get_args(annotation)
    if not inner:
        yield annotation
    for each in inner:
        yield from leaves(each)


def test_every_number_a_user_may_set_is_bounded() -> None:
    boundless = [
        f"{cls.__module__}.{cls.__qualname__}.{name}"
        for cls in user_settings()
        for name, field in cls.model_fields.items()
        if holds_number(field) and not has_bound(field)
    ]
    assert sorted(boundless) == []


def holds_number(field: FieldInfo) -> bool:
    """A plain number, or one that may be None."""
    annotation = field.annotation
    if get_origin(annotation) in (Union, UnionType):
        return any(inner in (int, float) for inner in get_args(annotation))
    return annotation in (int, float)


def has_bound(field: FieldInfo) -> bool:
    bounds = (annotated_types.Ge, annotated_types.Gt, annotated_types.Le, annotated_types.Lt, annotated_types.Interval)
    return "maximum" in str(field.metadata) or any(isinstance(item, bounds) for item in field.metadata)
