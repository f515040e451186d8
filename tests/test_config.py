"""Settings files: what is wrong is said once, all of it, with file, line and fix."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, model_validator

from raymill.config import Config, digest, dump, load, override
from raymill.errors import ConfigError, UsageError


class Optimizer(Config):
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-3
    """Peak rate."""
    name: Literal["adamw", "sgd"] = "adamw"
    """Which one."""


class Train(Config):
    """A small settings file."""

    steps: Annotated[int, Field(ge=1, le=1000)] = 10
    """Updates."""
    optimizer: Optimizer = Optimizer()
    """Its optimizer."""
    resume: bool = True
    """Go on from a checkpoint."""
    max_loss: float | None = None
    """Stop above this, nats."""
    inputs: tuple[str, ...] = ()
    """Files."""
    title: str = "x"
    """A word."""
    needed: str
    """Has no default."""

    @model_validator(mode="after")
    def _even(self) -> Train:
        if self.steps == 13:
            raise ValueError("13 steps bring bad luck; fix: use 14")
        return self


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "job.yaml"


def problems(file: Path, text: str, *overrides: str) -> list[str]:
    """Every problem as `line what | fix`, the path taken off."""
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(Train, file, overrides)
    assert caught.value.exit_code == 2
    return [f"{p.where.removeprefix(f'{file}:')} {p.what} | {p.fix}" for p in caught.value.problems]


def test_a_right_file(file: Path) -> None:
    file.write_text("needed: a\noptimizer:\n  learning_rate: 3e-4\ninputs: [a, b]\nmax_loss: 4\n")
    config = load(Train, file)
    assert (config.optimizer.learning_rate, config.inputs, config.max_loss, config.steps) == (3e-4, ("a", "b"), 4.0, 10)


@pytest.mark.parametrize("text", ["3e-4", "3E-4", "0.3e-3", ".3e-3", "3.e-4", "+3e-4"])
def test_every_way_to_write_a_float(file: Path, text: str) -> None:
    file.write_text(f"needed: a\noptimizer: {{learning_rate: {text}}}")
    assert load(Train, file).optimizer.learning_rate == pytest.approx(3e-4)


def test_text_that_looks_a_little_like_a_float_stays_text(file: Path) -> None:
    file.write_text("needed: 3e-4b")
    assert load(Train, file).needed == "3e-4b"


def test_frozen(file: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load(Train, None, ["needed=a"]).steps = 3  # type: ignore[misc]


def test_unknown_key_says_line_and_neighbour(file: Path) -> None:
    found = problems(file, "needed: a\noptimizer:\n  learnin_rate: 1\n")
    assert found == ["3 optimizer.learnin_rate is not a setting | did you mean learning_rate?"]


def test_unknown_key_far_from_all_lists_them(file: Path) -> None:
    found = problems(file, "needed: a\noptimizer: {zzz: 1}\n")
    assert found == ["2 optimizer.zzz is not a setting | settings here: learning_rate, name"]


def test_wrong_type(file: Path) -> None:
    (found,) = problems(file, "needed: a\nsteps: many\n")
    assert found.startswith('2 steps = "many": input should be a valid integer')
    assert found.endswith("| steps: Updates.")


@pytest.mark.parametrize("key", ["steps", "max_loss"])
def test_a_switch_is_no_number(file: Path, key: str) -> None:
    (found,) = problems(file, f"needed: a\n{key}: yes\n")
    assert found.startswith(f"2 {key}: true is not a number")


def test_a_switch_may_be_a_switch(file: Path) -> None:
    file.write_text("needed: a\nresume: no\n")
    assert load(Train, file).resume is False


@pytest.mark.parametrize(
    ("text", "said"), [("0", "greater than or equal to 1"), ("1001", "less than or equal to 1000")]
)
def test_out_of_bounds(file: Path, text: str, said: str) -> None:
    (found,) = problems(file, f"steps: {text}\nneeded: a\n")
    assert found.startswith(f"1 steps = {text}: ")
    assert said in found


@pytest.mark.parametrize("text", [".nan", ".inf", "-.inf"])
def test_no_number_is_infinite(file: Path, text: str) -> None:
    (found,) = problems(file, f"needed: a\nmax_loss: {text}\n")
    assert "finite" in found


def test_wrong_choice(file: Path) -> None:
    (found,) = problems(file, "needed: a\noptimizer: {name: adam}\n")
    assert found.endswith("| did you mean adamw?")


def test_a_value_where_a_section_belongs(file: Path) -> None:
    found = problems(file, "needed: a\noptimizer: fast\n")
    assert found == ['2 optimizer = "fast": it must be a section of settings | settings here: learning_rate, name']


def test_missing(file: Path) -> None:
    (found,) = problems(file, "steps: 3\n")
    assert found.endswith("needed is missing | add needed: Has no default.")


def test_set_twice(file: Path) -> None:
    assert problems(file, "steps: 3\nneeded: a\nsteps: 4\n") == ["3 steps is set twice | keep one of the two lines"]


def test_a_key_that_yaml_does_not_read_as_text(file: Path) -> None:
    (found,) = problems(file, "needed: a\non: 1\n")
    assert found.startswith("2 on cannot be a key")


def test_a_rule_over_several_settings(file: Path) -> None:
    (found,) = problems(file, "needed: a\nsteps: 13\n")
    assert found.endswith("13 steps bring bad luck | use 14")


def test_every_problem_at_once_in_the_order_of_the_lines(file: Path) -> None:
    text = "stps: 3\nneeded: [1]\noptimizer:\n  name: x\n  learning_rate: -1\n"
    found = problems(file, text, "steps=99:99", "nothing")  # YAML reads 99:99 in base 60
    assert [line.split()[0] for line in found] == ["1", "2", "4", "5", "--set", "--set"]
    with pytest.raises(ConfigError) as caught:
        load(Train, file)
    assert str(caught.value).count(f"{file}:") == 4


def test_a_long_value_is_cut(file: Path) -> None:
    (found,) = problems(file, f"needed: [{'x' * 5000}]\n")
    assert len(found) < 200


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("needed: [\n", "2"),
        ("- a\n", "1"),
        ("plain\n", "1"),
        ("needed: a\n---\nneeded: b\n", "2"),
        ("needed: a\nx: !!python/object:os.system y\n", "2"),
        ("x: &x [*x]\n", "1"),
        ("x: " + "[" * 3000, "1"),
        ("needed: \x07\n", "1"),
        ("steps: 3\nneeded: 2024-13-45\n", "2"),
        ("needed: a\nsteps: !!int ''\n", "2"),
        ("needed: !!timestamp soon\n", "1"),
        ("needed: !!bool maybe\n", "1"),
    ],
)
def test_not_a_settings_file(file: Path, text: str, line: str) -> None:
    (found,) = problems(file, text)
    assert found.startswith(f"{line} ")


def test_no_file_but_a_near_one(file: Path) -> None:
    file.write_text("needed: a\n")
    with pytest.raises(UsageError, match=r"no file .*jobb\.yaml(.|\n)*did you mean .*job\.yaml\?"):
        load(Train, file.with_name("jobb.yaml"))


def test_unreadable_files(file: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        load(Train, file.parent)
    file.write_bytes(b"needed: \xff\xfe\n")
    with pytest.raises(UsageError, match="cannot be read"):
        load(Train, file)


def test_an_empty_file_is_all_defaults(file: Path) -> None:
    file.write_text("# nothing yet\n")
    assert load(Optimizer, file) == Optimizer()


def test_overrides_win_over_the_file(file: Path) -> None:
    file.write_text("needed: a\noptimizer: {name: sgd}\n")
    config = load(Train, file, ["optimizer.learning_rate=3e-4", "steps=7", "inputs=[u, v]", "needed=b=c"])
    assert (config.optimizer.learning_rate, config.optimizer.name) == (3e-4, "sgd")
    assert (config.steps, config.inputs, config.needed) == (7, ("u", "v"), "b=c")


def test_the_last_override_of_a_key_wins() -> None:
    assert load(Train, None, ["needed=a", "steps=1", "steps=2"]).steps == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("steps", "written key=value"),
        ("=3", "written key=value"),
        ("stps=3", "stps is not a setting | did you mean steps?"),
        ("optimizer.learnin_rate=3", "did you mean learning_rate?"),
        ("steps.x=3", "steps is a single value"),
        ("steps={", "is not a YAML value"),
        ("title=2024-13-45", "is not a YAML value"),
        ("steps=many", 'steps = "many"'),
        ("title.x=3", 'title = {"x": 3}'),
        ("optimizer={nam: sgd}", "did you mean name?"),
    ],
)
def test_wrong_overrides_name_themselves(file: Path, text: str, said: str) -> None:
    (found,) = problems(file, "needed: a\nsteps: 5\noptimizer:\n  name: sgd\n", text)
    assert found.startswith(f"--set {text} ")
    assert said in found


def test_override_of_a_loaded_config() -> None:
    config = load(Train, None, ["needed=a"])
    changed = override(config, {"optimizer.learning_rate": 0.5, "steps": 3})
    assert (changed.optimizer.learning_rate, changed.steps, config.steps) == (0.5, 3, 10)


@pytest.mark.parametrize(("key", "value"), [("steps", 0), ("stps", 1), ("steps.x", 1), ("optimizer.x.y", 1)])
def test_wrong_override_of_a_loaded_config(key: str, value: int) -> None:
    with pytest.raises(ConfigError):
        override(load(Train, None, ["needed=a"]), {key: value})


def test_dump_loads_again(file: Path) -> None:
    config = load(Train, None, ["needed=a", "optimizer.learning_rate=3e-4"])
    file.write_text(dump(config))
    assert load(Train, file) == config


def test_digest_sees_values_not_order() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1})
    assert digest({"a": 1}) != digest({"a": 2})
