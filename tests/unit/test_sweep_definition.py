"""The points of a sweep: which there are, in which order, under which index and hash."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from nexa_infra.spec.fields import Boolean, Value
from nexa_infra.spec.sweep import MOST_TRIALS, SweepDefinition, trial_hash


def sweep(**keys: Any) -> SweepDefinition:
    return SweepDefinition.model_validate(keys)


def points(definition: SweepDefinition) -> list[dict[str, Any]]:
    return [definition.parameters_of(trial) for trial in range(len(definition))]


names = st.text("abcdefgh_.", min_size=1, max_size=6)
values = st.lists(st.text("01e-.", min_size=1, max_size=5), min_size=1, max_size=4)
grids = st.dictionaries(names, values, min_size=1, max_size=5)


def test_the_last_axis_of_a_grid_varies_fastest() -> None:
    assert points(sweep(parameters={"a": ["1", "2"], "b": ["x", "y", "z"]})) == [
        {"a": "1", "b": "x"}, {"a": "1", "b": "y"}, {"a": "1", "b": "z"},
        {"a": "2", "b": "x"}, {"a": "2", "b": "y"}, {"a": "2", "b": "z"},
    ]  # fmt: skip


@given(grids)
def test_an_index_means_the_point_that_a_product_has_there(grid: dict[str, list[str]]) -> None:
    expected = [dict(zip(grid, combination, strict=True)) for combination in itertools.product(*grid.values())]
    assert points(sweep(parameters=grid)) == expected


@given(grids, st.data())
def test_exclusions_drop_the_points_that_match_and_keep_the_order(
    grid: dict[str, list[str]], data: st.DataObject
) -> None:
    every = [dict(zip(grid, combination, strict=True)) for combination in itertools.product(*grid.values())]
    rules = []
    for _ in range(data.draw(st.integers(1, 3))):
        point = data.draw(st.sampled_from(every))
        kept = data.draw(st.lists(st.sampled_from(list(point)), min_size=1, unique=True))
        rules.append({name: point[name] for name in kept})
    left = [point for point in every if not any(rule.items() <= point.items() for rule in rules)]
    if left:
        assert points(sweep(parameters=grid, exclude=rules)) == left
    else:
        with pytest.raises(ValidationError, match="leaves none of the"):
            sweep(parameters=grid, exclude=rules)


def test_zip_walks_its_lists_in_step() -> None:
    assert points(sweep(zip={"lr": ["1e-3", "1e-4"], "wd": ["0", "0.1"]})) == [
        {"lr": "1e-3", "wd": "0"}, {"lr": "1e-4", "wd": "0.1"},
    ]  # fmt: skip


def test_zip_beside_parameters_is_one_more_axis_the_fastest() -> None:
    assert points(sweep(parameters={"seed": ["1", "2"]}, zip={"lr": ["a", "b"], "wd": ["c", "d"]})) == [
        {"seed": "1", "lr": "a", "wd": "c"}, {"seed": "1", "lr": "b", "wd": "d"},
        {"seed": "2", "lr": "a", "wd": "c"}, {"seed": "2", "lr": "b", "wd": "d"},
    ]  # fmt: skip


def test_trials_are_the_points_as_they_are_listed() -> None:
    listed = [{"lr": "1e-3"}, {"lr": "1e-4", "fast": True}, {}]
    definition = sweep(trials=listed)
    assert points(definition) == listed
    assert definition.names == ("lr", "fast")


def test_overrides_hold_a_parameter_in_every_trial() -> None:
    definition = sweep(parameters={"lr": ["1", "2"], "bs": ["8", "16"]}, overrides={"bs": "32", "seed": "7"})
    assert points(definition) == [{"lr": "1", "bs": "32", "seed": "7"}, {"lr": "2", "bs": "32", "seed": "7"}]
    assert definition.names == ("lr", "bs", "seed")


def test_overrides_that_hold_all_of_a_zip_leave_no_doubled_trials() -> None:
    assert points(sweep(parameters={"a": ["1"]}, zip={"x": ["1", "2"]}, overrides={"x": "3"})) == [{"a": "1", "x": "3"}]


def test_overrides_reach_listed_trials() -> None:
    assert points(sweep(trials=[{"a": "1"}, {"b": "2"}], overrides={"a": "9"})) == [{"a": "9"}, {"b": "2", "a": "9"}]


def test_exclusions_see_zip_trials_and_overrides() -> None:
    zipped = sweep(zip={"a": ["1", "2", "3"], "b": ["x", "y", "x"]}, exclude=[{"b": "x", "a": "3"}])
    assert points(zipped) == [{"a": "1", "b": "x"}, {"a": "2", "b": "y"}]
    listed = sweep(trials=[{"a": "1"}, {"a": "2", "c": True}], exclude=[{"c": True}])
    assert points(listed) == [{"a": "1"}]
    held = sweep(parameters={"a": ["1", "2"]}, overrides={"b": "3"}, exclude=[{"a": "1", "b": "3"}])
    assert points(held) == [{"a": "2", "b": "3"}]


def test_an_exclusion_matches_a_boolean_or_null_as_such() -> None:
    flags = sweep(parameters={"fast": [Boolean("true"), "true", None]}, exclude=[{"fast": Boolean("True")}])
    assert points(flags) == [{"fast": "true"}, {"fast": None}]


def test_a_million_trials_are_indexed_without_being_written_out() -> None:
    definition = sweep(parameters={f"axis{number}": [str(digit) for digit in range(10)] for number in range(6)})
    assert len(definition) == 1_000_000
    assert definition.survivors is None
    assert "".join(str(value) for value in definition.parameters_of(271_828).values()) == "271828"


def test_a_large_grid_with_exclusions_is_indexed_in_its_order() -> None:
    grid = {f"axis{number}": [str(digit) for digit in range(10)] for number in range(6)}
    definition = sweep(parameters=grid, exclude=[{"axis0": "0"}, {"axis5": "9", "axis4": "9"}])
    expected = [number for number in range(100_000, 1_000_000) if number % 100 != 99]
    assert len(definition) == len(expected)
    for trial in (0, 98, 99, 100, 500_000, len(expected) - 1):
        assert "".join(str(value) for value in definition.parameters_of(trial).values()) == str(expected[trial])


def test_a_trial_past_the_end_is_an_error() -> None:
    definition = sweep(parameters={"a": ["1", "2"]})
    for trial in (-1, 2):
        with pytest.raises(IndexError, match=f"trial {trial} is not in this sweep of 2 trials"):
            definition.parameters_of(trial)


def test_a_hash_is_that_of_the_parameters_whatever_their_order() -> None:
    assert trial_hash({"a": "1", "b": "2"}) == trial_hash({"b": "2", "a": "1"})
    assert len(trial_hash({})) == 12


def test_hashes_stay_what_they_were() -> None:
    # A hash is kept in results.csv and compared between runs: it must never change. These two are sha256sum's,
    # of [] and of [["fast",true],["lr","1e-3"],["name","é"],["tag",null]].
    assert trial_hash({}) == "4f53cda18c2b"
    assert trial_hash({"lr": "1e-3", "fast": True, "tag": None, "name": "é"}) == "0689dcc433e5"


def test_hashes_tell_a_word_from_a_boolean_and_one_spelling_from_another() -> None:
    values: list[Value] = [True, "true", "True", None, "null", "", "1e-4", "0.0001"]
    assert len({trial_hash({"x": value}) for value in values}) == len(values)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"parameters": {"optimizer": "adam"}}, r"a list of values is meant here, not one value: write \[adam\]"),
        ({"parameters": {"optimizer": []}}, "the axis is empty"),
        ({"parameters": {"a": {"b": ["1"]}}}, r"a nested name is written with a dot, as a.b: \[1, 2\]"),
        ({"parameters": {"a": {"values": ["1", "b c"]}}}, r'write \[1, "b c"\]'),
        ({"parameters": {"a": {"value": "1"}}}, r"write \[1\]"),
        (
            {"zip": {"a": ["1"], "b": ["1", "2"]}},
            "zip: walks its lists in step, so they need one length: a has 1, b has 2",
        ),
        ({"parameters": {"a": ["1"]}, "zip": {"a": ["1"]}}, "zip.a: stands in parameters too"),
        ({"parameters": {"a": ["1"]}, "trials": [{"b": "1"}]}, "trials: lists whole points, but parameters"),
        ({"zip": {"a": ["1"]}, "trials": [{"b": "1"}]}, "trials: lists whole points, but zip"),
        (
            {"parameters": {"a": ["1"]}, "exclude": [{"b": "1"}]},
            r"exclude\[0\].b: no axis has this name: the axes are a",
        ),
        ({"parameters": {"a": ["1", "2"]}, "exclude": [{"a": "3"}]}, r"exclude\[0\].a: no trial has 3, .*: a has 1, 2"),
        (
            {"zip": {"a": ["1", "2"], "b": ["1", "2"]}, "exclude": [{"a": "1", "b": "2"}]},
            r"exclude\[0\]: matches no point",
        ),
        ({"parameters": {"a": ["1"]}, "exclude": [{}]}, r"exclude\[0\]: is empty"),
        ({"parameters": {"a": ["1"]}, "exclude": [{"a": "1"}]}, "exclude: leaves none of the 1 points"),
        ({"parameters": {"a b": ["1"]}}, "'a b' is no name for a parameter"),
        ({"parameters": {"--lr": ["1"]}}, "write lr without the dashes"),
        ({"parameters": {"a": ["\0"]}}, "NUL"),
        ({"env": {"1A": "x"}}, "'1A' is no name for an environment variable"),
        ({"env": {"SLURM_JOB_ID": "x"}}, "is set by the run itself"),
        ({"base_args": "--epochs 2"}, r"write \[--epochs, 2\]"),
    ],
)
def test_a_contradiction_is_told_with_its_place(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        sweep(**keys)


def test_every_wrong_exclusion_is_told_at_once() -> None:
    with pytest.raises(ValidationError, match=r"exclude\[0\].a: .*exclude\[2\]: is empty"):
        sweep(parameters={"a": ["1", "2"]}, exclude=[{"a": "3"}, {"a": "1"}, {}])


def test_more_points_than_slurm_can_number_are_refused() -> None:
    axis = [str(number) for number in range(1000)]
    with pytest.raises(ValidationError, match=f"more than {MOST_TRIALS:,}: shorten an axis"):
        sweep(parameters=dict.fromkeys("abcd", axis))


def test_exclusions_of_a_grid_too_large_to_list_are_refused() -> None:
    axis = [str(number) for number in range(300)]
    with pytest.raises(
        ValidationError, match=r"exclude: works on up to 20,000,000 points, but the sweep has 27,000,000"
    ):
        sweep(parameters=dict.fromkeys("abc", axis), exclude=[{"a": "1"}])


def test_numbers_from_python_become_the_text_that_python_writes() -> None:
    assert points(SweepDefinition(parameters={"lr": (1e-4, 2, True)})) == [
        {"lr": "0.0001"}, {"lr": "2"}, {"lr": True},
    ]  # fmt: skip
