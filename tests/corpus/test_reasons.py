"""No record leaves without a reason that is explained, and no explanation is left over."""

from __future__ import annotations

import ast
from pathlib import Path

import raymill.corpus
from raymill.corpus.reasons import QUARANTINED, STEPS

ROOM = Path(raymill.corpus.__file__).parent


def strings_in(*files: Path) -> set[str]:
    """Every string constant of these files."""
    trees = [ast.walk(ast.parse(file.read_text())) for file in files]
    return {
        node.value for tree in trees for node in tree if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def reasons_of(*files: Path) -> set[str]:
    """The first word given to each error that makes a record unreadable."""
    found = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            name = getattr(getattr(node, "func", None), "id", "")
            if name.endswith("Error") and isinstance(node, ast.Call) and node.args:
                first = node.args[0]
                if isinstance(first, ast.Constant) and isinstance(first.value, str) and first.value.isidentifier():
                    found.add(first.value)
    return found


READERS = [*ROOM.glob("formats/*.py"), ROOM / "readers.py", ROOM / "templates.py", ROOM / "storage.py"]


def test_every_reason_of_quarantine_is_explained() -> None:
    found = reasons_of(*READERS)
    assert len(found) > 10
    assert found <= set(QUARANTINED)


def test_no_explanation_is_left_over() -> None:
    assert set(QUARANTINED) <= strings_in(*READERS)
    assert set(STEPS) <= strings_in(*(ROOM / f"{name}.py" for name in ("cleaning", "clean_pass", "decision")))
