"""The points of a sweep without its config: as a client writes them down, and a steward reads them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from nexa_infra.spec.points import Points, ranges, spans_of, trial_hash
from nexa_infra.spec.sweep import SweepDefinition

names = st.text("abcdefgh_.", min_size=1, max_size=6)
values = st.text("01e-.é\n", max_size=5) | st.booleans() | st.none()
axes = st.dictionaries(names, st.lists(values, min_size=1, max_size=4), max_size=4)


@st.composite
def sweeps(draw: st.DrawFn) -> SweepDefinition:
    """Draw a sweep of any kind: a grid, lists in step, listed points; with overrides, exclusions, finished points."""
    asked: dict[str, Any] = {"overrides": draw(st.dictionaries(names, values, max_size=2))}
    if draw(st.booleans()):
        asked["trials"] = draw(st.lists(st.dictionaries(names, values, max_size=3), min_size=1, max_size=5))
    else:
        asked["parameters"] = draw(axes)
        steps = draw(st.integers(1, 3))
        some = draw(st.dictionaries(names, st.lists(values, min_size=steps, max_size=steps), max_size=2))
        asked["zip"] = {name: given for name, given in some.items() if name not in asked["parameters"]}
    whole = SweepDefinition.model_validate(asked)
    finished = sorted(draw(st.sets(st.integers(0, whole.grid_size - 1), max_size=6)))
    excluded = draw(st.none() | st.integers(0, whole.grid_size - 1))
    if finished and len(finished) < whole.grid_size:
        asked["finished"] = ranges(finished)
    if whole.names and excluded is not None:
        asked["exclude"] = [whole.parameters_of(excluded)]
    try:
        return SweepDefinition.model_validate(asked)
    except ValidationError:
        return whole  # nothing was left


@given(sweeps())
def test_points_that_are_written_down_are_those_of_the_sweep_with_the_same_hashes(sweep: SweepDefinition) -> None:
    text = sweep.points.to_json()
    again = Points.from_json(text)
    assert len(again) == len(sweep)
    for trial in range(len(sweep)):
        mine, other = sweep.parameters_of(trial), again.parameters_of(trial)
        assert list(other.items()) == list(mine.items())
        assert trial_hash(other) == trial_hash(mine)
    assert again.to_json() == text
    for outside in (-1, len(sweep)):
        with pytest.raises(IndexError, match=f"trial {outside} is not in this sweep of {len(sweep)} trials"):
            again.parameters_of(outside)


def test_points_are_written_as_axes_of_points_of_names_and_values() -> None:
    sweep = SweepDefinition.model_validate(
        {
            "parameters": {"a": ["1", True]},
            "zip": {"b": ["x", None], "c": ["y", "z"]},
            "overrides": {"d": "4"},
            "exclude": [{"a": True, "b": "x"}],
        }
    )
    assert json.loads(sweep.points.to_json()) == {
        "axes": [[[["a", "1"]], [["a", True]]], [[["b", "x"], ["c", "y"]], [["b", None], ["c", "z"]]]],
        "survivors": "0-1,3",
        "overrides": {"d": "4"},
    }


@given(st.sets(st.integers(0, 60)))
def test_ranges_are_read_back_as_the_numbers_they_were_written_of(numbers: set[int]) -> None:
    spans = spans_of(ranges(sorted(numbers)))
    assert [n for first, last in spans for n in range(first, last + 1)] == sorted(numbers)
