"""Which files a corpus is read from, in a fixed order, cut and grouped into input shards.

A source is `builtin:python`; a file, folder or glob, here or in an object store (s3://, gs://, abfs://); or a dataset of
the Hugging Face hub. `builtin:python` is real text that every machine has: the standard library of the Python that runs
(kind code) and its language documentation (kind prose), about 12 MB. Costs one stat per file, or one listing per store.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from raymill.config import Config
from raymill.corpus import hub, storage
from raymill.corpus.document import Kind
from raymill.corpus.table import COLUMNS
from raymill.corpus.templates import Template
from raymill.errors import DataError, UsageError

Format = Literal["txt", "md", "code", "html", "jsonl", "json", "csv", "tsv", "parquet", "warc", "topics"]
Packing = Literal["plain", "gz", "zst"]

BUILTIN_PYTHON = "builtin:python"
_CODE = "py pyi js mjs ts jsx tsx java c h cc cpp cxx hh hpp cs go rs rb sh bash sql r scala kt swift php lua jl pl hs ml ex clj"
_FORMATS: dict[str, Format] = {
    **dict.fromkeys((f".{ending}" for ending in _CODE.split()), "code"),
    ".txt": "txt", ".md": "md", ".markdown": "md", ".html": "html", ".htm": "html", ".xhtml": "html",
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv",
    ".parquet": "parquet", ".warc": "warc", ".wet": "warc",
}  # fmt: skip
_PACKINGS: dict[str, Packing] = {".gz": "gz", ".zst": "zst"}
ENDINGS = "py, txt, md, jsonl, json, csv, tsv, html, parquet, warc or source code, each text also with .gz or .zst"
_CUT: set[tuple[Format, Packing]] = {(each, "plain") for each in ("txt", "md", "jsonl", "parquet", "warc")}
_CUT.add(("warc", "gz"))
"""What can be read from its middle; everything else is one task's, streamed."""
# Tests hold broken code and data on purpose; site-packages is not the standard library.
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
_TOPICS = "pydoc_data/topics.py"


class Source(Config):
    """Where text comes from. In YAML a plain string is short for {path: string}."""

    path: Annotated[str, Field(min_length=1)]
    """`builtin:python`; a file, folder or glob, local or s3:// gs:// abfs://; or hf://datasets/ORG/NAME[@REVISION][/GLOB]."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = None
    """What its documents are counted under; default: the last part of the path that says something."""
    kind: Literal["prose", "code"] | None = None
    """Which rules its plain documents are judged by; default: by each file's ending."""
    text_field: Annotated[str, Field(min_length=1)] = "text"
    """The field or column of a record that holds its text."""
    format: Format | None = None
    """How every file of it is read; default: by its ending."""
    template: Template | None = None
    """Makes a task of each record's columns instead of reading its text."""
    keep: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Further columns that stay beside a document, as text."""

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("path")
    @classmethod
    def _check_path(cls, path: str) -> str:
        hub.check(path) if path.startswith(hub.SCHEME) else storage.check(path)
        return path

    @field_validator("keep")
    @classmethod
    def _check_keep(cls, keep: tuple[str, ...]) -> tuple[str, ...]:
        taken = next((name for name in keep if name in COLUMNS), None)
        if taken is not None:
            raise ValueError(f"{taken} is a column of every corpus; fix: leave it out; taken: {', '.join(COLUMNS)}")
        twice = next((name for name in keep if keep.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice} is named twice; fix: name each column once")
        return keep

    @property
    def shown(self) -> str:
        """Its path as it may stand in a message: without user, password or options."""
        return storage.show(self.path)


@dataclass(frozen=True)
class SourceFile:
    """One input file as it was when the run began, or a range of its bytes."""

    name: str
    """Path below its source, with forward slashes; the beginning of its documents' ids. Unique in a corpus."""
    path: str
    """Where to open it: a local path, or one within its store."""
    format: Format
    packing: Packing
    kind: Kind
    """What its plain documents are."""
    size_bytes: int
    """Size of the whole file as it is stored."""
    mtime_ns: int
    """Time of the last change."""
    source: str
    """Name of the source that reached it first."""
    settings: Source
    """How its records become documents; one object for all files of a source."""
    store: str | None = None
    """URI of the object store that holds it; None: this machine."""
    start: int = 0
    """First byte of the range; the records that begin in it are read."""
    stop: int | None = None
    """First byte behind the range; None: to the end of the file."""

    @property
    def range_bytes(self) -> int:
        """Bytes of the range."""
        return (self.size_bytes if self.stop is None else self.stop) - self.start

    @property
    def shown(self) -> str:
        """Its path as it may stand in a message."""
        return self.path if self.store is None else f"{self.store.partition(':')[0]}://{self.path}"


@dataclass(frozen=True)
class InputShard:
    """The files and ranges one task reads."""

    index: int
    files: tuple[SourceFile, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.range_bytes for file in self.files)


def list_files(sources: Sequence[Source]) -> list[SourceFile]:
    """Every file of the sources, by source and then by name; a file that two sources reach counts once.

    Raises UsageError for a path that does not exist and DataError for a source that holds no file we can read, that may
    not be listed, or that has a file whose name is not UTF-8.
    """
    files: list[SourceFile] = []
    seen: set[str] = set()
    for source, name in zip(sources, name_sources(sources), strict=True):
        try:
            listed = _list_source(source, name, f"{name}/" if len(sources) > 1 else "")
        except OSError as error:
            fix = "make it readable (chmod -R u+rX), or name sources beside it"
            what = f"{error.filename} cannot be read"
            raise DataError(what, where="prepare.sources", why=error.strerror, fix=fix) from None
        found = [file for file in listed if _place(file) not in seen]
        seen.update(_place(file) for file in found)
        files += sorted(found, key=lambda file: file.name)
    return files


def name_sources(sources: Sequence[Source]) -> tuple[str, ...]:
    """One name per source, in order: the one given, or a short one from its path with -2, -3 where it is taken.

    Raises UsageError when two sources were given the same name.
    """
    given = [source.name for source in sources if source.name is not None]
    twice = next((name for name in given if given.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two sources are named {twice}", where="prepare.sources", fix="give each a name of its own")
    taken = set(given)
    names = []
    for source in sources:
        name = source.name or _name_from_path(source)
        if source.name is None:
            number = 2
            first = name
            while name in taken:
                name, number = f"{first}-{number}", number + 1
            taken.add(name)
        names.append(name)
    return tuple(names)


def group(files: Iterable[SourceFile], shard_bytes: int) -> list[InputShard]:
    """Neighbouring files together until they reach `shard_bytes`; a larger file is cut, or stands alone where it cannot."""
    shards: list[InputShard] = []
    current: list[SourceFile] = []
    held = 0
    for file in (piece for whole in files for piece in _cut(whole, shard_bytes)):
        if current and held + file.range_bytes > shard_bytes:
            shards.append(InputShard(len(shards), tuple(current)))
            current, held = [], 0
        current.append(file)
        held += file.range_bytes
    if current:
        shards.append(InputShard(len(shards), tuple(current)))
    return shards


def fingerprint(files: Iterable[SourceFile]) -> str:
    """Hex digest of every name, size and time of change: it differs when the input does."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file.size_bytes}\0{file.mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _cut(file: SourceFile, shard_bytes: int) -> list[SourceFile]:
    """Ranges of equal size, none over `shard_bytes`."""
    if file.size_bytes <= shard_bytes or (file.format, file.packing) not in _CUT:
        return [file]
    pieces = -(-file.size_bytes // shard_bytes)
    edges = [file.size_bytes * number // pieces for number in range(pieces + 1)]
    return [replace(file, start=edges[number], stop=edges[number + 1]) for number in range(pieces)]


def _place(file: SourceFile) -> str:
    return os.path.realpath(file.path) if file.store is None else f"{file.store}\0{file.path}"


def _name_from_path(source: Source) -> str:
    """`python` for builtin:python, `wiki` for s3://bucket/wiki/*.jsonl, `books` for data/books.jsonl.gz."""
    parts = [part for part in re.split(r"[/\\:]+", source.shown.rstrip("/")) if part and not glob.has_magic(part)]
    last = parts[-1] if parts else ""
    for ending in (*_PACKINGS, *_FORMATS):
        if last.lower().endswith(ending):
            last = last[: -len(ending)]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.")[:48] or "source"


def _list_source(source: Source, name: str, prefix: str) -> list[SourceFile]:
    if source.path == BUILTIN_PYTHON:
        return _list_builtin(source, name, prefix)
    if storage.is_remote(source.path):
        found = storage.list_files(source.path)
        pairs: list[tuple[str, Any]] = [(each.name, each) for each in found]
        describe: Callable[..., SourceFile | None] = _describe_remote
    else:
        pairs = list(_find(source))
        describe = _describe
    files = [file for below, each in pairs if (file := describe(prefix + below, each, source, name)) is not None]
    if not files:
        what = f"{source.shown} holds no text that can be read"
        why = f"none of its {len(pairs)} files has a known ending" if pairs else "it matches no file"
        raise DataError(what, where="prepare.sources", why=why, fix=f"name files that end in {ENDINGS}")
    return files


def _find(source: Source) -> Iterator[tuple[str, Path]]:
    """(name below the source, path) of every local file."""
    if source.path.startswith(hub.SCHEME):
        folder, pattern = hub.fetch(source.path)
        yield from _expand(folder / pattern, folder) if pattern else _walk(folder, folder)
        return
    path = Path(source.path).expanduser()
    if path.is_file():
        yield path.name, path
    elif path.is_dir():
        yield from _walk(path, path)
    elif glob.has_magic(source.path):
        fixed = next(index for index, part in enumerate(path.parts) if glob.has_magic(part))
        yield from _expand(path, Path(*path.parts[:fixed]))
    else:
        raise UsageError(f"there is no file or folder {source.path}", where="prepare.sources", fix=_nearest(path))


def _list_builtin(source: Source, name: str, prefix: str) -> list[SourceFile]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for below, path in _walk(root, root):
        if path.suffix == ".py" and not _NOT_STDLIB.intersection(path.relative_to(root).parts):
            form: Format = "topics" if below == _TOPICS else "code"
            kind: Kind = source.kind or ("prose" if below == _TOPICS else "code")
            files.append(SourceFile(prefix + below, str(path), form, "plain", kind, *_state(path), name, source))
    if not files:
        why = f"{root} has no .py files; this Python was installed without its sources"
        raise DataError(f"{BUILTIN_PYTHON} is empty here", why=why, fix="give your own text with --data PATH")
    return files


def _expand(pattern: Path, root: Path) -> list[tuple[str, Path]]:
    """Names are relative to the part of the pattern before its first wildcard."""
    pairs: dict[str, Path] = {}
    # Unlike Path.glob this leaves out hidden files, as a shell does.
    names = glob.glob(str(pattern.relative_to(root)), root_dir=root, recursive=True)  # noqa: PTH207
    for match in (root / name for name in names):
        if match.is_dir():
            pairs.update((f"{match.relative_to(root).as_posix()}/{name}", path) for name, path in _walk(match, match))
        elif match.is_file():
            pairs[match.relative_to(root).as_posix()] = match
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


def _describe(name: str, path: Path, source: Source, source_name: str) -> SourceFile | None:
    """None when the ending is none of ours."""
    form = _form(name, source)
    if form is None:
        return None
    if not _is_utf8(str(path.absolute())):  # it could stand in no id, table or message
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        why = "documents are named after their file"
        raise DataError(f"the name {shown} is not UTF-8", where="prepare.sources", why=why, fix="rename it")
    return SourceFile(name, str(path.absolute()), *form, *_state(path), source_name, source)


def _describe_remote(name: str, found: storage.Found, source: Source, source_name: str) -> SourceFile | None:
    form = _form(name, source)
    if form is None:
        return None
    return SourceFile(name, found.path, *form, found.size_bytes, found.mtime_ns, source_name, source, found.store)


def _form(name: str, source: Source) -> tuple[Format, Packing, Kind] | None:
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes]
    packing: Packing = "plain"
    if suffixes and suffixes[-1] in _PACKINGS:
        packing = _PACKINGS[suffixes.pop()]
    form = source.format or (_FORMATS.get(suffixes[-1]) if suffixes else None)
    if form is None or (form == "parquet" and packing != "plain"):
        return None
    return form, packing, source.kind or ("code" if form == "code" else "prose")


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
    return f"check the path; a source is {BUILTIN_PYTHON} or a file, folder, glob or URI"
