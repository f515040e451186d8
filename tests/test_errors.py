"""Every error says what, where, why and the fix, and crosses process borders whole."""

from __future__ import annotations

import pickle

import pytest

from raymill import errors
from raymill.errors import ConfigError, Problem, RaymillError, RequestError


def everything() -> list[type[RaymillError]]:
    found = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, RaymillError)]
    assert len(found) == 9
    return found


def example(cls: type[RaymillError]) -> RaymillError:
    if cls is ConfigError:
        return ConfigError([Problem("a.yaml:3", "x is wrong", "mend x"), Problem("a.yaml:7", "y is wrong")])
    if cls is RequestError:
        return RequestError("too long", field="prompt", status=413)
    return cls("it broke", where="here", why="it is old", fix="buy a new one")


@pytest.mark.parametrize("cls", everything())
def test_pickle_round_trip(cls: type[RaymillError]) -> None:
    error = example(cls)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is cls
    assert str(again) == str(error)
    assert again.args == error.args
    assert vars(again) == vars(error)


def test_the_message() -> None:
    assert str(example(RaymillError)) == "here: it broke\n  why: it is old\n  hint: buy a new one"
    assert str(RaymillError("it broke", fix="mend it")) == "it broke\n  hint: mend it"


def test_a_config_error_tells_every_problem() -> None:
    assert str(example(ConfigError)) == "a.yaml:3: x is wrong\n  hint: mend x\na.yaml:7: y is wrong"


@pytest.mark.parametrize("cls", everything())
def test_exit_codes(cls: type[RaymillError]) -> None:
    assert cls.exit_code == (2 if issubclass(cls, errors.UsageError) else 1)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    story = errors.__doc__ or ""
    missing = [cls.__name__ for cls in everything() if cls.__name__ not in story]
    assert missing == []
