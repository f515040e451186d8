"""The `raymill` command: parses, calls, prints. It decides nothing, and imports what it calls only when it is called,
so that `raymill --help` answers at once.

Result lines go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 failed, 2 the command or a file is wrong,
130 interrupted.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import typer

from raymill.cli import exporting, files, running, runs, tokenizers

if TYPE_CHECKING:
    from raymill.errors import RaymillError

_INTERRUPTED = 130

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="From raw text to a monitored, quantized language-model endpoint on one Ray cluster.",
)
app.add_typer(running.app)
app.command()(files.doctor)
app.command()(exporting.export)
app.add_typer(runs.app, name="runs")
app.add_typer(files.app, name="config")
app.add_typer(tokenizers.app, name="tokenizer")


def main() -> None:
    """The console script: errors of ours and of the machine as one message, anything else with its traceback."""
    from raymill.errors import RaymillError

    try:
        app()
    except RaymillError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except OSError as error:
        if error.errno is None:  # a library's own, so not what the machine said
            raise
        print(f"error: {_explain(error)}", file=sys.stderr)
        sys.exit(1)
    except (KeyboardInterrupt, SystemExit) as end:
        # typer turns Ctrl-C into a silent exit with 130
        if isinstance(end, SystemExit) and end.code != _INTERRUPTED:
            raise
        print("interrupted; the same command continues", file=sys.stderr)
        sys.exit(_INTERRUPTED)


def _explain(error: OSError) -> RaymillError:
    """What the machine refused, as one of our errors."""
    import errno

    from raymill.errors import MachineError

    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    fix = f"{'free space' if full else 'check the path and its rights'}, then run the same command again"
    what = "a file or folder cannot be used" if error.filename is None else f"{error.filename} cannot be used"
    return MachineError(what, why=error.strerror, fix=fix)
