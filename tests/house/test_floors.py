"""Ray stays upstairs, and even there it is imported only when work starts.

import-linter checks who imports whom; here every module is really imported where Ray cannot be.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "platform" / "raymill"

IMPORT_EACH = """
import importlib, pkgutil, sys, traceback
sys.modules["ray"] = None
import raymill
failed = 0
for module in pkgutil.walk_packages(raymill.__path__, "raymill."):
    try:
        importlib.import_module(module.name)
    except Exception:
        failed += 1
        print("FAILED", module.name)
        traceback.print_exc(limit=-1, file=sys.stdout)
print("failed:", failed)
"""


def test_every_module_imports_without_ray() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORT_EACH], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.endswith("failed: 0\n"), done.stdout


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_ray_is_imported_only_upstairs_and_only_inside_functions(path: Path) -> None:
    upstairs = path.relative_to(PACKAGE).parts[0] in ("stages", "cluster")
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if not imports_of(node) & {"ray"}:
            continue
        assert upstairs, f"{path}:{node.lineno} imports ray; only stages/ and cluster/ may"
        assert inside_function_or_type_checking(tree, node), f"{path}:{node.lineno} imports ray on import of the module"


def imports_of(node: ast.AST) -> set[str]:
    """Top-level names of the packages an import statement reads."""
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
        return {node.module.split(".")[0]}
    return set()


def inside_function_or_type_checking(tree: ast.Module, wanted: ast.AST) -> bool:
    for node in ast.walk(tree):
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        )
        if lazy and any(inner is wanted for inner in ast.walk(node)):
            return True
    return False


def test_stages_do_not_import_stages() -> None:
    # One written exception: a tune trial is a training run.
    allowed = {("tune", "train")}
    names = {path.stem for path in (PACKAGE / "stages").glob("*.py")} - {"__init__", "contract"}
    found = set()
    for name in names:
        for node in ast.walk(ast.parse((PACKAGE / "stages" / f"{name}.py").read_text("utf-8"))):
            found |= {(name, other) for other in stages_imported(node, names) if other != name}
    assert found <= allowed


def stages_imported(node: ast.AST, names: set[str]) -> set[str]:
    if isinstance(node, ast.ImportFrom) and node.module == "raymill.stages":
        return {alias.name for alias in node.names} & names
    if isinstance(node, ast.ImportFrom) and node.module:
        dotted = [node.module]
    elif isinstance(node, ast.Import):
        dotted = [alias.name for alias in node.names]
    else:
        return set()
    return {name.split(".")[2] for name in dotted if name.startswith("raymill.stages.")} & names
