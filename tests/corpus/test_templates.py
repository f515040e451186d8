"""Columns to tasks: what is given, and what is learned."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from raymill.corpus.document import Part
from raymill.corpus.limits import RecordError
from raymill.corpus.templates import Template, make_parts


def test_turns_of_a_conversation() -> None:
    template = Template(system="Be {tone}.", prompt="{q}", completion="{a}", chat=True)
    assert make_parts(template, {"tone": "kind", "q": "1+1?", "a": 2, "other": None}) == (
        Part("Be kind.", "system", False),
        Part("1+1?", "user", False),
        Part("2", "assistant", True),
    )


def test_values_that_look_like_placeholders_stay_as_they_are() -> None:
    template = Template(prompt="{{literal}} {a b}", completion="{c}")
    assert make_parts(template, {"a b": "{c} {0.__class__}", "c": "x"})[0].text == "{literal} {c} {0.__class__}"


@pytest.mark.parametrize(("value", "text"), [(True, "true"), (1.5, "1.5"), (["a"], '["a"]'), ({"b": 1}, '{"b":1}')])
def test_values_that_are_no_text_are_written_as_json(value: Any, text: str) -> None:
    assert make_parts(Template(prompt="p", completion="{c}"), {"c": value})[1].text == text


def test_labels_match_numbers_truth_values_and_text() -> None:
    template = Template.model_validate(
        {"prompt": "p", "completion": "{c}", "labels": {"c": {0: "zero", True: "yes", "x": "ex"}}}
    )
    assert [make_parts(template, {"c": value})[1].text for value in (0, "0", True, "x")] == [
        "zero",
        "zero",
        "yes",
        "ex",
    ]
    with pytest.raises(RecordError) as caught:
        make_parts(template, {"c": 7})
    assert caught.value.reason == "unknown_label"


@pytest.mark.parametrize(
    ("record", "reason"), [({}, "missing_column"), ({"c": None}, "missing_column"), ({"c": " "}, "empty_completion")]
)
def test_records_that_do_not_fit(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecordError) as caught:
        make_parts(Template(prompt="p", completion="{c}"), record)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": "{a.__class__}"}, "is no column name"),
        ({"prompt": "{a[0]}"}, "is no column name"),
        ({"prompt": "{a!r}"}, "is no column name"),
        ({"prompt": "{a:>99999999999}"}, "is no column name"),
        ({"prompt": "{}"}, "is no column name"),
        ({"prompt": "{a"}, "fix: write"),
        ({"completion": "yes"}, "names no column"),
        ({"labels": {"z": {"0": "no"}}}, "stands nowhere"),
        ({"prompt": ""}, "at least 1"),
    ],
)
def test_templates_that_are_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Template.model_validate({"prompt": "{a}", "completion": "{b}", **changed})
