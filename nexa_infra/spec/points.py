"""A sweep's points: index to parameters, and how values are written; the standard library alone."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol, Union

# A trial's value: the text as it was written, a boolean (a flag), or None (leave the argument out).
Value = Union[str, bool, None]
Point = tuple[tuple[str, Value], ...]
Axis = tuple[Point, ...]


class Decoder(Protocol):
    """What knows each trial's parameters: a config's sweep, or the points that a client wrote down for a steward."""

    def __len__(self) -> int:
        """Trials in the sweep."""

    def parameters_of(self, trial: int) -> dict[str, Value]:
        """Decode a trial's index into its parameters."""


@dataclass(frozen=True)
class Points:
    """A sweep's points without its config, as a client leaves them to a steward."""

    axes: Sequence[Axis]  # slowest first
    survivors: Sequence[int] | None  # the points that are left, ascending; None is all
    overrides: Mapping[str, Value]

    def __len__(self) -> int:
        """Trials in the sweep."""
        return count(self.axes, self.survivors)

    def parameters_of(self, trial: int) -> dict[str, Value]:
        """Decode a trial's index into its parameters; see `parameters_of`."""
        return parameters_of(self.axes, self.survivors, self.overrides, trial)

    def to_json(self) -> str:
        """Write them as a line of JSON."""
        left = None if self.survivors is None else ranges(self.survivors)
        return json.dumps({"axes": self.axes, "survivors": left, "overrides": dict(self.overrides)}) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Points:
        """Read what `to_json` has written."""
        data = json.loads(text)
        axes = tuple(tuple(tuple((name, value) for name, value in point) for point in axis) for axis in data["axes"])
        survivors = None
        if data["survivors"] is not None:
            survivors = array("I", (n for first, last in spans_of(data["survivors"]) for n in range(first, last + 1)))
        return cls(axes, survivors, data["overrides"])


def count(axes: Sequence[Axis], survivors: Sequence[int] | None) -> int:
    """Return how many trials a sweep has."""
    return prod(len(axis) for axis in axes) if survivors is None else len(survivors)


def parameters_of(
    axes: Sequence[Axis], survivors: Sequence[int] | None, overrides: Mapping[str, Value], trial: int
) -> dict[str, Value]:
    """Decode a trial's index into its parameters, in O(axes): the last axis varies fastest.

    Raises:
        IndexError: the sweep has no such trial.
    """
    most = count(axes, survivors)
    if not 0 <= trial < most:
        raise IndexError(f"trial {trial} is not in this sweep of {most} trials")
    rest = trial if survivors is None else survivors[trial]
    chosen: list[Point] = []
    for axis in reversed(axes):
        rest, digit = divmod(rest, len(axis))
        chosen.append(axis[digit])
    found = {name: value for point in reversed(chosen) for name, value in point}
    return {**found, **overrides}


def trial_hash(parameters: Mapping[str, Value]) -> str:
    """Return a trial's hash: 12 hex digits of the SHA-256 of its parameters, whatever their order."""
    text = json.dumps(sorted(parameters.items()), ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def written(value: Value) -> str:
    """Return a value as the text that a placeholder or `name=value` shows."""
    return value if isinstance(value, str) else "null" if value is None else str(value).lower()


def spans_of(text: str) -> Iterator[tuple[int, int]]:
    """Yield the first and the last of each span of numbers in a text such as `0-41,57`."""
    for span in text.split(",") if text else ():
        first, _, last = span.partition("-")
        yield int(first), int(last or first)


def ranges(numbers: Iterable[int]) -> str:
    """Write ascending numbers as Slurm does: `3,7-9`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)
