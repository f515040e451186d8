"""Tuned recipes by size: what `train.preset` fills in where the job says nothing. DECISIONS.md has the tuning runs."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {"tiny": {}, "small": {}, "124m": {}, "1b": {}}


def fill(values: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """`values` with the recipe's settings where it has none, group by group."""
    filled = dict(values)
    for key, setting in recipe.items():
        if isinstance(setting, dict) and isinstance(filled.get(key, {}), dict):
            filled[key] = fill(filled.get(key, {}), setting)
        else:
            filled.setdefault(key, setting)
    return filled
