"""Which files a corpus is read from, in a fixed order, grouped into input shards.

A source is `builtin:python`, or a file, folder or glob of py, txt, md and jsonl files, plain or .gz or .zst.
`builtin:python` is real text that every machine has: the standard library of the Python that runs (kind code) and its
language documentation (kind prose), about 12 MB. Costs one stat per file.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from raymill.corpus.document import Kind
from raymill.errors import DataError, UsageError

Format = Literal["py", "txt", "md", "jsonl", "topics"]
Packing = Literal["plain", "gz", "zst"]

BUILTIN_PYTHON = "builtin:python"
_FORMATS: dict[str, Format] = {".py": "py", ".txt": "txt", ".md": "md", ".jsonl": "jsonl"}
_PACKINGS: dict[str, Packing] = {".gz": "gz", ".zst": "zst"}
ENDINGS = "py, txt, md, jsonl, each also with .gz or .zst"
# Tests hold broken code and data on purpose; site-packages is not the standard library.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_TOPICS = "pydoc_data/topics.py"


@dataclass(frozen=True)
class SourceFile:
    """One input file as it was when the run began."""

    name: str
    """Path below its source, with forward slashes; the beginning of its documents' ids. Unique in a corpus."""
    path: str
    """Where to open it."""
    format: Format
    packing: Packing
    size_bytes: int
    """Size on disk."""
    mtime_ns: int
    """Time of the last change."""
    source: str
    """Name of the source that reached it first."""

    @property
    def kind(self) -> Kind:
        return "code" if self.format == "py" else "prose"


@dataclass(frozen=True)
class InputShard:
    """The files one task reads."""

    index: int
    files: tuple[SourceFile, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def list_files(sources: Sequence[str]) -> list[SourceFile]:
    """Every file of the sources, by source and then by name; a file that two sources reach counts once.

    Raises UsageError for a path that does not exist and DataError for a source that holds no file we can read, that may
    not be listed, or that has a file whose name is not UTF-8.
    """
    files: list[SourceFile] = []
    seen: set[str] = set()
    for number, source in enumerate(sources):
        prefix = f"{number}/" if len(sources) > 1 else ""
        try:
            listed = _list_source(source, prefix)
        except OSError as error:
            fix = "make it readable (chmod -R u+rX), or name sources beside it"
            where = "prepare.sources"
            raise DataError(f"{error.filename} cannot be read", where=where, why=error.strerror, fix=fix) from None
        found = [file for file in listed if os.path.realpath(file.path) not in seen]
        seen.update(os.path.realpath(file.path) for file in found)
        files += sorted(found, key=lambda file: file.name)
    return files


def group(files: Iterable[SourceFile], shard_bytes: int) -> list[InputShard]:
    """Neighbouring files together until they reach `shard_bytes`; a larger file stands alone."""
    shards: list[InputShard] = []
    current: list[SourceFile] = []
    held = 0
    for file in files:
        if current and held + file.size_bytes > shard_bytes:
            shards.append(InputShard(len(shards), tuple(current)))
            current, held = [], 0
        current.append(file)
        held += file.size_bytes
    if current:
        shards.append(InputShard(len(shards), tuple(current)))
    return shards


def fingerprint(files: Iterable[SourceFile]) -> str:
    """Hex digest of every name, size and time of change: it differs when the input does."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.size_bytes}\0{file.mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _list_source(source: str, prefix: str) -> list[SourceFile]:
    if source == BUILTIN_PYTHON:
        return _list_builtin(prefix)
    path = Path(source).expanduser()
    if path.is_file():
        pairs = [(path.name, path)]
    elif path.is_dir():
        pairs = list(_walk(path, path))
    elif glob.has_magic(source):
        pairs = _expand(path)
    else:
        raise UsageError(f"there is no file or folder {source}", where="prepare.sources", fix=_nearest(path))
    files = [file for name, each in pairs if (file := _describe(prefix + name, each, source)) is not None]
    if not files:
        what = f"{source} holds no text that can be read"
        why = f"none of its {len(pairs)} files has a known ending" if pairs else "it matches no file"
        raise DataError(what, where="prepare.sources", why=why, fix=f"name files that end in {ENDINGS}")
    return files


def _list_builtin(prefix: str) -> list[SourceFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        SourceFile(prefix + name, str(path), "topics" if name == _TOPICS else "py", "plain", *_state(path), "python")
        for name, path in _walk(root, root)
        if path.suffix == ".py" and not _NOT_STDLIB.intersection(path.relative_to(root).parts)
    ]
    if not files:
        why = f"{root} has no .py files; this Python was installed without its sources"
        raise DataError(f"{BUILTIN_PYTHON} is empty here", why=why, fix="give your own text with --data PATH")
    return files


def _expand(pattern: Path) -> list[tuple[str, Path]]:
    """Names are relative to the part of the pattern before its first wildcard."""
    parts = pattern.parts
    fixed = next(index for index, part in enumerate(parts) if glob.has_magic(part))
    root = Path(*parts[:fixed])
    pairs: dict[str, Path] = {}
    # Unlike Path.glob this leaves out hidden files, as a shell does.
    names = glob.glob(str(Path(*parts[fixed:])), root_dir=root, recursive=True)  # noqa: PTH207
    for match in (root / name for name in names):
        for name, path in _walk(match, root) if match.is_dir() else [(match.relative_to(root).as_posix(), match)]:
            pairs[name] = path
    return list(pairs.items())


def _walk(folder: Path, root: Path) -> Iterator[tuple[str, Path]]:
    """Visible files below a folder, without following links to folders; __pycache__ and the like hold no text."""
    for current, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in sorted(names):
            path = Path(current, name)
            if not name.startswith(".") and path.is_file():
                yield path.relative_to(root).as_posix(), path


def _refuse(error: OSError) -> None:
    raise error  # os.walk would leave the folder out without a word


def _describe(name: str, path: Path, source: str) -> SourceFile | None:
    """None when the ending is none of ours."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packing: Packing = "plain"
    if suffixes and suffixes[-1] in _PACKINGS:
        packing = _PACKINGS[suffixes.pop()]
    if not suffixes or suffixes[-1] not in _FORMATS:
        return None
    if not _is_utf8(str(path.absolute())):  # it could stand in no id, table or message
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        why = "documents are named after their file"
        raise DataError(f"the name {shown} is not UTF-8", where="prepare.sources", why=why, fix="rename it")
    return SourceFile(name, str(path.absolute()), _FORMATS[suffixes[-1]], packing, *_state(path), source)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _state(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def _nearest(path: Path) -> str:
    parent = path.parent
    names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names, 3, 0.6)
    if near:
        return "did you mean " + " or ".join(str(parent / name) for name in near) + "?"
    return f"check the path; a source is {BUILTIN_PYTHON} or a file, folder or glob"
