"""The points of a sweep: index to parameters and back, without writing the grid out."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import compress, product
from math import prod
from typing import Annotated, Self

from pydantic import BeforeValidator, Field, model_validator

from nexa_infra.spec.fields import (
    KeyPath,
    Lines,
    Misfit,
    ParameterName,
    Spec,
    TrialValue,
    Variables,
    Word,
    Words,
    as_list,
    flow_list,
    kind_of,
    suggestion,
)
from nexa_infra.spec.points import Axis, Point, Points, Value, count, parameters_of, spans_of, trial_hash

__all__ = [
    "MOST_TRIALS",
    "MOST_WITH_EXCLUSIONS",
    "Axis",
    "AxisValues",
    "Point",
    "PointValues",
    "SweepDefinition",
    "spans_of",
    "trial_hash",
]

# An exclusion is resolved by listing what it leaves: 4 bytes a trial.
MOST_WITH_EXCLUSIONS = 20_000_000
# Slurm's job ids and array indices are 32-bit, and a run's trials are counted by them.
MOST_TRIALS = 2**31


def _axis(value: object) -> object:
    if isinstance(value, Mapping):
        raise ValueError(f"a list of values is meant here, not a mapping: {_instead(value)}")
    if isinstance(value, str):
        raise ValueError(f"a list of values is meant here, not one value: write {flow_list([value])}")
    if not isinstance(value, (list, tuple, range)):
        raise ValueError(f"a list of values is meant here, not {kind_of(value)}: write [first, second]")
    if not value:
        raise ValueError("the axis is empty, which leaves no trial: give it a value, or remove it")
    return tuple(value)


def _instead(mapping: Mapping[str, object]) -> str:
    """Say how another tool's description of an axis is written here."""
    values = mapping.get("values")
    if isinstance(values, (list, tuple)) and values and all(isinstance(value, str) for value in values):
        return f"write {flow_list(str(value) for value in values[:8])[:-1]}{', …' * (len(values) > 8)}]"
    if isinstance(mapping.get("value"), str):
        return f"write {flow_list([str(mapping['value'])])}"
    if mapping.keys() & {"min", "max", "distribution", "low", "high"}:
        return "a range is not sampled here; list the values, or list whole points in sweep.trials"
    return "a nested name is written with a dot, as a.b: [1, 2]"


AxisValues = Annotated[tuple[TrialValue, ...], BeforeValidator(_axis)]
PointValues = dict[ParameterName, TrialValue]


class SweepDefinition(Spec):
    """A set of trials: a grid, lists walked in step, or points listed one by one.

    `parameters` and `zip` may stand together: the lists of `zip` are then one more axis, the last.
    The last axis varies fastest. `trials` stands alone.
    """

    parameters: dict[ParameterName, AxisValues] = Field(default={}, description="a grid: name: [values]")
    zip: dict[ParameterName, AxisValues] = Field(default={}, description="lists of one length, walked in step")
    trials: Annotated[tuple[PointValues, ...], BeforeValidator(as_list)] = Field(
        default=(), description="the points themselves"
    )
    exclude: Annotated[tuple[PointValues, ...], BeforeValidator(as_list)] = Field(
        default=(), description="points that match are dropped"
    )
    finished: Word = Field(default="", description="points that an earlier run has finished, as `extend` writes them")
    base_args: Words = Field(default=(), description="arguments that every trial gets, before its own")
    overrides: dict[ParameterName, TrialValue] = Field(
        default={}, description="parameters held at one value in every trial"
    )
    env: Variables = Field(default={}, description="environment variables that every trial gets")
    tags: Lines = Field(default=(), description="labels of the run")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        wrong: list[tuple[KeyPath, str]] = []
        if self.trials and (self.parameters or self.zip):
            beside = "parameters" if self.parameters else "zip"
            wrong.append((("trials",), f"lists whole points, but {beside} stands beside it: keep one of the two"))
        lengths = {name: len(values) for name, values in self.zip.items()}
        if len(set(lengths.values())) > 1:
            told = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            wrong.append((("zip",), f"walks its lists in step, so they need one length: {told}"))
        both = [name for name in self.zip if name in self.parameters]
        wrong.extend((("zip", name), "stands in parameters too: keep one of the two") for name in both)
        if not wrong and self.grid_size > MOST_TRIALS:
            wrong.append(((), f"has {self.grid_size:,} points, more than {MOST_TRIALS:,}: shorten an axis"))
        if not wrong and self.finished:
            wrong.extend(self._wrong_finished())
        if not wrong and self.exclude:
            wrong.extend(self._wrong_exclusions())
        if wrong:
            raise Misfit(*wrong)
        return self

    def _wrong_finished(self) -> Iterator[tuple[KeyPath, str]]:
        size = self.grid_size
        try:
            spans = list(spans_of(self.finished))
        except ValueError:
            yield ("finished",), "is no list of points such as 0-41,57: `nexa-infra extend` writes it; remove it"
            return
        if size > MOST_WITH_EXCLUSIONS:
            yield ("finished",), f"works on up to {MOST_WITH_EXCLUSIONS:,} points, but the sweep has {size:,}"
        elif any(not first <= last < size for first, last in spans):
            yield ("finished",), f"names points that are not among the sweep's {size:,}: remove it"
        elif not self.exclude and not self.survivors:
            yield ("finished",), f"leaves none of the {size:,} points"

    def _wrong_exclusions(self) -> Iterator[tuple[KeyPath, str]]:
        if self.grid_size > MOST_WITH_EXCLUSIONS:
            many = f"but the sweep has {self.grid_size:,}: shorten an axis"
            yield ("exclude",), f"works on up to {MOST_WITH_EXCLUSIONS:,} points, {many}"
            return
        fine = True
        for number, rule in enumerate(self.exclude):
            for path, message in self._wrong_rule(rule):
                fine = False
                yield ("exclude", number, *path), message
        if fine and not self.survivors:
            yield ("exclude",), f"leaves none of the {self.grid_size:,} points: drop a rule, or narrow one"

    def _wrong_rule(self, rule: Mapping[str, Value]) -> Iterator[tuple[KeyPath, str]]:
        if not rule:
            yield (), "is empty, which would match every point: name a parameter, or remove it"
        elif unknown := [name for name in rule if name not in self.names]:
            for name in unknown:
                hint = suggestion(name, self.names) or f": the axes are {', '.join(self.names)}"
                yield (name,), f"no axis has this name{hint}"
        elif next(self._matching(rule), None) is None:
            for name, value in rule.items():
                given = self._values_of(name)
                if value not in given:
                    shown = ", ".join(_text(one) for one in given[:8]) + ", …" * (len(given) > 8)
                    yield (name,), f"no trial has {_text(value)}, as it is written here: {name} has {shown}"
                    return
            yield (), "matches no point: no trial has these values together; change it, or remove it"

    def _values_of(self, name: str) -> list[Value]:
        """Every value that a parameter takes, in order."""
        if name in self.overrides:
            return [self.overrides[name]]
        return list(dict.fromkeys(value for axis in self.axes for point in axis for n, value in point if n == name))

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """The axes, slowest first; each is its points, each point the values that it sets."""
        held = self.overrides
        axes: list[Axis] = [
            tuple(((name, value),) for value in values) for name, values in self.parameters.items() if name not in held
        ]
        if names := [name for name in self.zip if name not in held]:
            length = len(next(iter(self.zip.values())))
            axes.append(tuple(tuple((name, self.zip[name][step]) for name in names) for step in range(length)))
        if self.trials:
            axes.append(tuple(tuple((n, v) for n, v in point.items() if n not in held) for point in self.trials))
        return tuple(axes)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Every parameter that some trial has, in order."""
        found = dict.fromkeys(name for axis in self.axes for point in axis for name, _ in point)
        return (*found, *(name for name in self.overrides if name not in found))

    @property
    def grid_size(self) -> int:
        """Points before exclusions."""
        return prod(len(axis) for axis in self.axes)

    @cached_property
    def survivors(self) -> Sequence[int] | None:
        """The points that exclusions and an earlier run leave, ascending; `None` where those are all."""
        if not self.exclude and not self.finished:
            return None
        left = bytearray(b"\1") * self.grid_size
        for rule in self.exclude:
            for index in self._matching(rule):
                left[index] = 0
        for first, last in spans_of(self.finished):
            left[first : last + 1] = bytes(last + 1 - first)
        return array("I", compress(range(self.grid_size), left))

    def _matching(self, rule: Mapping[str, Value]) -> Iterator[int]:
        """Yield the points that an exclusion matches, without walking the others."""
        wanted = [(name, value) for name, value in rule.items() if name not in self.overrides]
        if any(self.overrides[name] != value for name, value in rule.items() if name in self.overrides):
            return
        steps = []
        found: set[str] = set()
        stride = 1
        for axis in reversed(self.axes):
            own = {name for point in axis for name, _ in point}
            asked = [(name, value) for name, value in wanted if name in own]
            found.update(name for name, _ in asked)
            steps.append([n * stride for n, point in enumerate(axis) if all(pair in point for pair in asked)])
            stride *= len(axis)
        if len(found) == len(wanted):
            for combination in product(*steps):
                yield sum(combination)

    def __len__(self) -> int:
        """Trials in the sweep."""
        return count(self.axes, self.survivors)

    def parameters_of(self, trial: int) -> dict[str, Value]:
        """Decode a trial's index into its parameters, in O(axes).

        Raises:
            IndexError: the sweep has no such trial.
        """
        return parameters_of(self.axes, self.survivors, self.overrides, trial)

    @property
    def points(self) -> Points:
        """Its points alone, for whoever has no config."""
        return Points(self.axes, self.survivors, self.overrides)


def _text(value: Value) -> str:
    return value if isinstance(value, str) else "null" if value is None else str(value).lower()
