"""An artifact: a directory with a manifest, built aside as a draft and published by one rename.

    <storage>/<run>/<stage>-<hash8>.partial/   the draft: may be killed at any time and taken up again
    <storage>/<run>/<stage>-<hash8>/           the artifact: complete, never written again
        manifest.json                          kind, settings, inputs, figures, size and sha256 of every file

Costs: publishing and opening read every byte once for sha256 (about 1.5 GB/s on one core).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import ValidationError

from raymill import __version__
from raymill.config import Config
from raymill.errors import ArtifactError

Kind = Literal["corpus", "tokens", "checkpoint", "trials", "scores", "endpoint", "monitor"]
MANIFEST = "manifest.json"
WORK = ".work"
_CLOCK = f"{WORK}/clock"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class FileEntry(Config):
    """One file of an artifact."""

    path: str
    """Path below the artifact's folder, with forward slashes."""
    size_bytes: int
    """Its size in bytes."""
    sha256: str
    """Hex digest of its content."""


class Manifest(Config):
    """What an artifact is, what made it, and what it must still look like."""

    format: Literal[1] = 1
    """Version of this file's layout."""
    kind: Kind
    """What the artifact holds; a stage names the kind it takes."""
    stage: str
    """The stage that made it."""
    version: str = __version__
    """The raymill version that made it."""
    created_at: str
    """UTC time of publication, ISO 8601."""
    duration_s: float
    """Seconds of work, summed over every attempt that a kill cut short."""
    config: dict[str, Any]
    """The stage's settings."""
    inputs: dict[str, str]
    """Kind to `<stage>-<hash8>` of every artifact it was made from."""
    summary: str
    """The stage's result line."""
    figures: dict[str, Any]
    """The stage's measured figures, by name with unit."""
    files: tuple[FileEntry, ...]
    """Every file but this one, sorted by path."""


@dataclass(frozen=True)
class Artifact:
    """A published, complete directory."""

    path: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        """`<stage>-<hash8>`."""
        return self.path.name

    @property
    def figures(self) -> dict[str, Any]:
        return self.manifest.figures

    def file(self, name: str) -> Path:
        """The path of one of its files; ArtifactError when the manifest does not list it."""
        if not any(entry.path == name for entry in self.manifest.files):
            raise ArtifactError(
                f"{self.path} holds no {name}", fix=f"rerun its stage: raymill runs rm {self.path.parent.name}"
            )
        return self.path / name

    def json(self, name: str) -> Any:
        """One of its files, parsed as JSON."""
        return json.loads(self.file(name).read_text(encoding="utf-8"))


def open_artifact(path: Path, kind: Kind | None = None, *, verify: bool = True) -> Artifact:
    """Opens a published artifact and, unless told otherwise, checks every file's size and sha256.

    What a kill within `publish` left of the work goes then, too. Raises ArtifactError naming the first file that is
    missing, cut or altered.
    """
    manifest, fix = read_manifest(path), _anew(path)
    if kind is not None and manifest.kind != kind:
        raise ArtifactError(f"{path} holds {manifest.kind}, not {kind}", fix=f"name a folder whose stage gives {kind}")
    for entry in manifest.files:
        check_file(path / entry.path, entry, hashed=verify, fix=fix)
    if verify:
        shutil.rmtree(path / WORK, ignore_errors=True)
    return Artifact(path, manifest)


def read_manifest(path: Path) -> Manifest:
    """What an artifact's folder says it is; files are not looked at. ArtifactError where it says nothing."""
    fix = _anew(path)
    try:
        return Manifest.model_validate_json((path / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise ArtifactError(f"{path} is not an artifact", why=f"it has no {MANIFEST}", fix=fix) from None
    except OSError as error:
        fix = "name an artifact's folder, and make it readable"
        raise ArtifactError(f"{path} cannot be opened", why=str(error), fix=fix) from None
    except ValidationError as error:
        why = "; ".join(str(detail["msg"]) for detail in error.errors()[:3])
        raise ArtifactError(f"{path / MANIFEST} is damaged", why=why, fix=fix) from None


def _anew(path: Path) -> str:
    return f"delete {path} and run the job again; it is made anew"


def check_file(file: Path, entry: FileEntry, *, hashed: bool, fix: str) -> None:
    """ArtifactError unless `file` is there with the size and, if asked, the content its entry promises."""
    if not file.is_file():
        raise ArtifactError(f"{file} is missing", why="its manifest lists it", fix=fix)
    size_bytes = file.stat().st_size
    if size_bytes != entry.size_bytes:
        why = f"it has {size_bytes:,} bytes; its manifest says {entry.size_bytes:,}"
        raise ArtifactError(f"{file} is damaged", why=why, fix=fix)
    if hashed and sha256_file(file) != entry.sha256:
        raise ArtifactError(f"{file} is damaged", why="its sha256 differs from its manifest's", fix=fix)


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(folder: Path) -> tuple[FileEntry, ...]:
    """An entry for every file below `folder` but its manifest and unfinished work, sorted by path."""
    left_out = (folder / MANIFEST, folder / WORK)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not any(map(path.is_relative_to, left_out)))
    return tuple(
        FileEntry(path=file.relative_to(folder).as_posix(), size_bytes=file.stat().st_size, sha256=sha256_file(file))
        for file in files
    )


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a small file so that a reader sees the old content or the new, never half of it."""
    with open_aside(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def open_aside(path: Path, folder: Path | None = None) -> Iterator[IO[bytes]]:
    """A binary file to write, in `folder` or beside its goal, that gets its name when the block ends well.

    A kill leaves at most `.<name>.<pid>.tmp`; `sweep_asides` removes those.
    """
    # Containers on one disk share process ids, so chance tells their writers apart.
    aside = (folder or path.parent) / f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
    try:
        with aside.open("wb") as file:
            yield file
            with _naming(path):
                file.flush()
                os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        if error.filename is None and error.errno in _FULL:  # from a write; anything else may be from a read
            error.filename = str(path)
        raise
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """What the machine refuses to an open file says which file: the system knows only its number."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def discard(folder: Path) -> None:
    """Removes a folder. Renamed first: a kill in between leaves all of it or nothing under its name."""
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    folder.rename(aside)
    shutil.rmtree(aside)


def sweep_asides(folder: Path) -> None:
    """Removes what killed writers left below a folder."""
    for aside in list(folder.rglob(".*.tmp")):
        if aside.is_dir():
            shutil.rmtree(aside)
        else:
            aside.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Makes every file below `folder` durable before the rename that publishes it."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Makes one file's content, or one folder's list of names, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with _naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Draft:
    """An artifact in the making: `path` holds what will be published, `path/.work` what is needed until then.

    Both survive a kill. Nothing in the work folder may be given up before `publish` has renamed the draft: a stage
    copies its results out, so that one killed at its last moment finds everything again.
    """

    def __init__(self, final: Path) -> None:
        self.final = final
        self.path = final.with_name(final.name + ".partial")
        self.work = self.path / WORK
        self.work.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.path.chmod(0o700)
        self._earlier_s = self._read_clock()
        self._started = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Seconds of work so far, over every attempt."""
        return self._earlier_s + time.monotonic() - self._started

    def checkpoint_clock(self) -> None:
        """Keeps the seconds worked so far, so that a killed attempt still counts in `duration_s`.

        On a disk that takes nothing more they are lost: it may be called while that is being told.
        """
        with suppress(OSError):
            write_atomic(self.path / _CLOCK, json.dumps(self.elapsed_s))

    def publish(
        self, kind: Kind, stage: str, *, config: Config, inputs: dict[str, str], summary: str, figures: dict[str, Any]
    ) -> Artifact:
        """Hashes every file, writes the manifest last, renames the folder into place and removes the work folder."""
        for torn in self.path.rglob(".*.tmp"):  # what a kill left of write_atomic
            torn.unlink(missing_ok=True)
        manifest = Manifest(
            kind=kind,
            stage=stage,
            created_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            duration_s=round(self.elapsed_s, 2),
            config=config.model_dump(mode="json"),
            inputs=inputs,
            summary=summary,
            figures=figures,
            files=list_files(self.path),
        )
        write_atomic(self.path / MANIFEST, manifest.model_dump_json(indent=1))
        sync_folder(self.path)
        if self.final.exists():  # only an endpoint is published twice: it is live, not cached
            shutil.rmtree(self.final)
        self.path.rename(self.final)
        sync(self.final.parent)
        shutil.rmtree(self.final / WORK, ignore_errors=True)  # what stays goes when the artifact is opened
        return Artifact(self.final, manifest)

    def _read_clock(self) -> float:
        try:
            return float((self.path / _CLOCK).read_text())
        except (FileNotFoundError, ValueError):
            return 0.0
