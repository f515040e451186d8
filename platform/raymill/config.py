"""Settings: one YAML file in, one frozen pydantic model out, or every mistake at once with its file and line.

Every settings class in the house derives from `Config`. There is one override mechanism, dotted keys (`a.b=c`), which
serves `--set` and the tune space alike. No inheritance between files, no interpolation.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from raymill.errors import ConfigError, Problem, UsageError


class Config(BaseModel):
    """A frozen group of settings. An unknown key is an error; a field's docstring is its documentation."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _switch_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # YAML reads `yes` and `on` as true, and pydantic would take true for the number 1.
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and {int, float} & {field.annotation, *get_args(field.annotation)}:
            raise ValueError(f"{str(value).lower()} is not a number; fix: {field.description}")
        return value


C = TypeVar("C", bound=Config)
Key = tuple[str | int, ...]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `3e-4` as text; here it is the number everyone means."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """As YAML has it, but a value that only looks like a date or number is an error with its line."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError, OverflowError) as error:
            what = f"{str(node.value)[:60]!r} is no {node.tag.rpartition(':')[2]} ({str(error)[:100]})"
            raise yaml.constructor.ConstructorError(None, None, what, node.start_mark) from None


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)(?:[eE][-+]?[0-9]+)$"),
    list("-+0123456789."),
)


def load(model: type[C], path: Path | None, overrides: Sequence[str] = ()) -> C:
    """Reads `path` (or nothing but defaults), applies `key=value` overrides, validates.

    Raises UsageError when the file cannot be read and ConfigError, with every problem, when it is wrong.
    """
    tree: Any = {}
    lines: dict[Key, int] = {}
    if path is not None:
        tree, lines = _parse(path)
    sources: dict[Key, str] = {key: f"{path}:{line}" for key, line in lines.items()}
    problems: list[Problem] = []
    for text in overrides:
        problem = _apply_override(tree, text, sources)
        if problem is not None:
            problems.append(problem)
    try:
        config = model.model_validate(tree)
    except ValidationError as error:
        fallback = str(path) if path else "defaults"
        problems += [_explain(model, detail, sources, fallback) for detail in error.errors()]
    if problems:
        raise ConfigError(sorted(problems, key=_line_order))
    return config


def top_keys(path: Path) -> set[str]:
    """The keys of a settings file's first level, to tell what kind of file it is."""
    return {str(key) for key in _parse(path)[0]}


def override(config: C, values: Mapping[str, Any]) -> C:
    """A copy of `config` with dotted keys replaced, validated again. The tune space is applied with it."""
    tree = config.model_dump(mode="json")
    for key, value in values.items():
        blocker = _set(tree, key.split("."), value)
        if blocker is not None:
            raise ConfigError([Problem(key, f"{blocker} is a single value and holds no settings", _KEYS_FIX)])
    try:
        return type(config).model_validate(tree)
    except ValidationError as error:
        raise ConfigError([_explain(type(config), detail, {}, "override") for detail in error.errors()]) from None


def dump(config: Config) -> str:
    """The settings as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def digest(value: Any) -> str:
    """sha256 hex of a JSON-able value in canonical form: the same settings give the same digest everywhere."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _parse(path: Path) -> tuple[Any, dict[Key, int]]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], 1)
        fix = (
            f"did you mean {path.parent / near[0]}?"
            if near
            else "check the path; shipped files are in jobs/ and cluster/"
        )
        raise UsageError(f"there is no file {path}", fix=fix) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path} cannot be read", why=str(error), fix="it must be a readable UTF-8 YAML file"
        ) from None
    lines: dict[Key, int] = {}
    problems: list[Problem] = []
    try:
        node = yaml.compose(text, Loader=_Loader)
        tree = yaml.load(text, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
        _walk(node, (), lines, problems, path)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(
            [Problem(f"{path}:{line}", f"not valid YAML: {error.problem}", "check indentation and quotes")]
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(
            [Problem(f"{path}:1", f"not valid YAML: {error}", "save the file as plain UTF-8 text")]
        ) from None
    except RecursionError:
        raise ConfigError([Problem(f"{path}:1", "nested too deeply, or holds itself", "write it flat")]) from None
    if problems:
        raise ConfigError(problems)
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(
            [Problem(f"{path}:1", "the file must hold settings as `key: value` lines", "see jobs/tiny.yaml")]
        )
    return tree, lines


_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")


def _walk(node: Any, key: Key, lines: dict[Key, int], problems: list[Problem], path: Path) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for name, value in node.value:
            child = (*key, str(name.value))
            line = name.start_mark.line + 1
            if name.tag not in _KEY_TAGS:
                what = f"{name.value} cannot be a key: YAML reads it as {name.tag.rpartition(':')[2]}, not as text"
                problems.append(Problem(f"{path}:{line}", what, f'write "{name.value}":'))
            if name.value in seen:
                what = f"{'.'.join(map(str, child))} is set twice"
                problems.append(Problem(f"{path}:{line}", what, "keep one of the two lines"))
            seen.add(name.value)
            lines[child] = line
            _walk(value, child, lines, problems, path)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*key, index)] = value.start_mark.line + 1
            _walk(value, (*key, index), lines, problems, path)


_KEYS_FIX = "check the dotted key; `raymill config schema` lists every setting"


def _apply_override(tree: dict[str, Any], text: str, sources: dict[Key, str]) -> Problem | None:
    name, equals, raw = text.partition("=")
    where = f"--set {text}"
    if not equals or not name.strip():
        return Problem(where, "an override is written key=value", "for example --set train.steps=200")
    try:
        value = yaml.load(raw, Loader=_Loader)  # noqa: S506 - _Loader is a SafeLoader
    except (yaml.YAMLError, RecursionError):
        return Problem(where, f"{raw!r} is not a YAML value", "quote text that holds : or # or [")
    keys = tuple(name.strip().split("."))
    blocker = _set(tree, keys, value)
    if blocker is not None:
        return Problem(where, f"{blocker} is a single value and holds no settings", _KEYS_FIX)
    for stale in [key for key in sources if key[: len(keys)] == keys]:
        del sources[stale]  # what the file said there is gone
    for length in range(len(keys)):
        sources.setdefault(keys[: length + 1], where)
    return None


def _set(tree: dict[str, Any], keys: Sequence[str], value: Any) -> str | None:
    """Sets a nested key, making the sections on its way; the name that bars the way if one is no section."""
    node = tree
    for parent in keys[:-1]:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            return parent
    node[keys[-1]] = value
    return None


def _explain(model: type[Config], detail: Any, sources: dict[Key, str], fallback: str) -> Problem:
    """One pydantic error as one sentence with a place and, where we can, a fix."""
    loc: Key = tuple(detail["loc"])
    fields = _fields_beside(model, loc)
    shown = ".".join(str(part) for part in loc if not (isinstance(part, str) and part.startswith("function-")))
    where = next((sources[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in sources), fallback)
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        return Problem(where, f"{shown} is not a setting", _did_you_mean(str(loc[-1]), fields))
    if kind == "missing":
        return Problem(where, f"{shown} is missing", f"add {_described(fields, loc) or loc[-1]}")
    if kind == "value_error":
        what, _, fix = str(context.get("error", detail["msg"])).partition("; fix: ")
        return Problem(where, f"{shown}: {what}" if shown else what, fix or None)
    got = json.dumps(detail["input"], default=str)
    got = got if len(got) <= 60 else got[:57] + "..."
    if kind in ("model_type", "model_attributes_type"):
        return Problem(
            where,
            f"{shown} = {got}: it must be a section of settings",
            _did_you_mean("", _fields_beside(model, (*loc, ""))),
        )
    choices = re.findall(r"'([^']*)'", str(context.get("expected", "")))
    near = difflib.get_close_matches(str(detail["input"]), choices, 1, 0.6)
    fix = f"did you mean {near[0]}?" if near else _described(fields, loc)
    return Problem(where, f"{shown} = {got}: {_lower_first(detail['msg'])}", fix or None)


def _did_you_mean(name: str, known: Iterable[str]) -> str | None:
    near = difflib.get_close_matches(name, list(known), 1, 0.6)
    if near:
        return f"did you mean {near[0]}?"
    return f"settings here: {', '.join(sorted(known))}" if known else None


def _described(fields: Mapping[str, FieldInfo], loc: Key) -> str:
    """What the setting is, in its own words."""
    name = next((part for part in reversed(loc) if part in fields), None)
    return f"{name}: {fields[str(name)].description}" if name is not None and fields[str(name)].description else ""


def _fields_beside(model: type[Config], loc: Key) -> Mapping[str, FieldInfo]:
    """The fields that may stand where `loc` stands, for did-you-mean."""
    current: type[BaseModel] | None = model
    for part in loc[:-1]:
        if current is not None and isinstance(part, str):
            field = current.model_fields.get(part)
            current = next(iter(_models_in(field.annotation)), current) if field else None
    return current.model_fields if current is not None else {}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models_in(inner)]


def _line_order(problem: Problem) -> tuple[int, int]:
    """In the order of the file's lines, then the command line's."""
    line = "" if problem.where.startswith("--set") else problem.where.rpartition(":")[2]
    return (0, int(line)) if line.isdigit() else (1, 0)


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
