"""Every file in stages/ has the one shape of contract.py."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest

from raymill.artifact import Kind
from raymill.cluster.config import RoleName
from raymill.config import Config
from raymill.stages.contract import STAGE_NAMES

ROOT = Path(__file__).resolve().parents[2]
FILES = {path.stem for path in (ROOT / "platform" / "raymill" / "stages").glob("*.py")} - {"__init__", "contract"}
SIGNATURES = {"demand": ["config"], "source_state": ["config"], "run": ["config", "inputs", "cluster"]}


def test_the_folder_holds_the_stages_and_nothing_else() -> None:
    assert set(STAGE_NAMES) >= FILES


@pytest.fixture(params=sorted(FILES))
def stage(request: pytest.FixtureRequest) -> ModuleType:
    return importlib.import_module(f"raymill.stages.{request.param}")


def test_constants(stage: ModuleType) -> None:
    kinds = set(get_args(Kind))
    for name in ("TAKES", "MAY_TAKE"):
        assert isinstance(getattr(stage, name), tuple), name
        assert set(getattr(stage, name)) <= kinds, name
    assert stage.GIVES in kinds
    assert stage.ROLE in get_args(RoleName)
    assert isinstance(stage.LIVE, bool)


def test_settings(stage: ModuleType) -> None:
    assert issubclass(stage.Config, Config)
    assert stage.Config.__module__ == stage.__name__, "a stage's Config is its own class"


@pytest.mark.parametrize("name", SIGNATURES)
def test_functions(stage: ModuleType, name: str) -> None:
    function = getattr(stage, name)
    assert function.__module__ == stage.__name__
    assert list(inspect.signature(function).parameters) == SIGNATURES[name]


def test_every_kind_a_stage_takes_is_given_by_one() -> None:
    modules = [importlib.import_module(f"raymill.stages.{name}") for name in FILES]
    if set(STAGE_NAMES) - FILES:
        pytest.skip("not all stages are there yet")
    given = {module.GIVES for module in modules}
    assert {kind for module in modules for kind in module.TAKES} <= given


def test_types_match_the_contract(tmp_path: Path) -> None:
    lines = ["from raymill.stages.contract import Stage"]
    for name in sorted(FILES):
        lines += [f"import raymill.stages.{name}", f"as_{name}: Stage = raymill.stages.{name}"]
    (tmp_path / "stage_types.py").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180, check=False)
    ours = [line for line in done.stdout.splitlines() if "stage_types.py" in line]
    assert ours == [], done.stdout
    assert done.stdout.strip().endswith("1 source file") or "checked 1 source file" in done.stdout, done.stderr
