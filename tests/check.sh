#!/usr/bin/env bash
# Every check of the house, in the order of their price; stops at the first that fails.
# Needs `pip install -e ".[dev]"` in the active environment. Arguments go to pytest.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

began=$SECONDS

check() {
    local name=$1 since=$SECONDS
    shift
    printf '\n== %s\n' "$name"
    if ! "$@"; then
        printf '\n== %s: FAILED after %d s\n' "$name" $((SECONDS - since)) >&2
        exit 1
    fi
    printf '== %s: passed in %d s\n' "$name" $((SECONDS - since))
}

check format python -m ruff format --check .
check lint python -m ruff check .
check types python -m mypy
check floors python -c 'from importlinter.cli import lint_imports_command; lint_imports_command()'
check tests python -m pytest "$@"

printf '\n== all checks passed in %d s\n' $((SECONDS - began))
