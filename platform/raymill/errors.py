"""Every error a user can meet. Each says what is wrong, where, why, and the fix.

    RaymillError            exit 1
    |-- UsageError          exit 2: the command, a job file or a cluster file is wrong; nothing was started
    |   |-- ConfigError     settings are wrong; carries every problem of the file at once
    |   `-- CapacityError   the job asks for more than the cluster has
    |-- DataError           the user's text cannot make what the stage needs (empty, unreadable, too small)
    |-- ArtifactError       a folder under storage is missing, damaged or of another kind
    |-- MachineError        the machine refused: port taken, disk full, no permission, a process is in the way
    |-- RequestError        a request to the endpoint is wrong; the API answers it with a 4xx
    `-- QualityError        a gate refused a result, with the figures

Anything else that reaches the user is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG}


class RaymillError(Exception):
    """One message: `where: what`, then why, then how to mend it."""

    exit_code = 1

    def __init__(self, what: str, *, fix: str, where: str | None = None, why: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        why = f"\n  why: {self.why}" if self.why else ""
        return f"{head}{why}\n  hint: {self.fix}"

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross processes inside Ray; keyword-only arguments need help to be rebuilt there.
        return _rebuild, (type(self), self.__dict__, self.args)


class UsageError(RaymillError):
    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One wrong setting: where it stands, what is wrong with it, and the fix where one is known."""

    where: str
    what: str
    fix: str | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f"\n  hint: {self.fix}" if self.fix else "")


class ConfigError(UsageError):
    """Every wrong setting of one file or command line, in the order of its lines."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        assert problems
        super().__init__(problems[0].what, where=problems[0].where, fix=problems[0].fix or "correct the setting")
        self.problems = tuple(problems)

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class CapacityError(UsageError):
    pass


class DataError(RaymillError):
    pass


class ArtifactError(RaymillError):
    pass


class MachineError(RaymillError):
    pass


class RequestError(RaymillError):
    """A request outside the limits. `field` names the parameter; `status` is the HTTP status it deserves."""

    def __init__(
        self, what: str, *, field: str | None = None, status: int = 400, fix: str = "see the API's limits"
    ) -> None:
        super().__init__(what, fix=fix)
        self.field = field
        self.status = status


class QualityError(RaymillError):
    pass


def refused_write(stage: str, error: OSError, folder: Path) -> MachineError | None:
    """What the machine refused a stage that writes below `folder`; None where that is no matter of the machine."""
    if error.errno not in _REFUSALS:
        return None
    return MachineError(
        f"{stage} could not write",
        where=str(error.filename or folder),
        why=error.strerror,
        fix="free space or mend the folder's rights, then run the same command again: it continues",
    )


def error_to_json(error: RaymillError) -> str:
    """An error as text, for a process that outlives the one that met it."""
    values = {"what": error.what, "fix": error.fix, "where": error.where, "why": error.why}
    return json.dumps({"type": type(error).__name__, **values})


def error_from_json(text: str) -> RaymillError:
    """The inverse; an error with more fields than the four comes back as its parent."""
    values = json.loads(text)
    kinds = (UsageError, CapacityError, DataError, ArtifactError, MachineError, QualityError)
    kind = {each.__name__: each for each in kinds}.get(values.pop("type"), RaymillError)
    return kind(**values)


def _rebuild(cls: type[RaymillError], state: dict[str, Any], args: tuple[Any, ...]) -> RaymillError:
    error = cls.__new__(cls)
    Exception.__init__(error, *args)
    error.__dict__.update(state)
    return error
