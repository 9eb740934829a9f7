"""What a budget leaves room for, counted so that nothing can go over it: the standard library alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from nexa_infra.monitoring.charges import Charge
from nexa_infra.runs.submissions import Recorded

# Lives of a steward that the run may need until its end: the one that counts, one that waits for the last trials, and
# one in case that is killed.
LIVES_AHEAD = 3


@dataclass(frozen=True)
class Limit:
    """A budget, and what things cost at the most, USD."""

    usd: Decimal
    unit: str  # what the price is for: gpu-hour, core-hour, billing-hour
    usd_per_hour: Decimal
    attempt_usd: Decimal  # one attempt that takes all it may: walltime, KillWait, over-time limit, requeues
    life_usd: Decimal  # one life of a steward that does
    second_usd: Decimal  # one second of it


def affordable(
    limit: Limit,
    asked: Iterable[Sequence[Sequence[tuple[int, int]]]],
    charges: Mapping[tuple[int, int], Charge],
    over: Mapping[tuple[int, int], bool],
    lives: Sequence[float | None],
) -> int:
    """Return how many more attempts may begin.

    `asked` is what was submitted: the trials of each array task, and their attempts. Whose end accounting knows
    (`over`) has cost what it was charged; all else costs what it may at the most. `lives` are the seconds of the
    steward's lives; None is the one that lives.
    """
    wanted = {each for tasks in asked for task in tasks for each in task}
    spent = Decimal(0)
    for attempt in wanted | set(charges):
        charge = charges.get(attempt)
        held = charge.unit_seconds(limit.unit) if charge is not None and over.get(attempt) else None
        spent += limit.attempt_usd if held is None else held * limit.usd_per_hour / 3600
    for seconds in lives:
        # The one that has not ended is among those that are ahead.
        spent += Decimal(str(seconds or 0)) * limit.second_usd
    left = limit.usd - spent - LIVES_AHEAD * limit.life_usd
    return max(0, int(left // limit.attempt_usd)) if limit.attempt_usd else 10**9


def read_limit(place: Path) -> Limit | None:
    """Read the budget from what a client left for the steward."""
    try:
        told: dict[str, Any] | None = json.loads((place / "brief.json").read_bytes())["budget"]
    except FileNotFoundError:
        return None
    if told is None:
        return None
    names = ("usd", "usd_per_hour", "attempt_usd", "life_usd", "second_usd")
    return Limit(unit=told["unit"], **{name: Decimal(told[name]) for name in names})


@dataclass(frozen=True)
class Stewarded:
    """What a run's steward has cost."""

    lives: int
    usd: Decimal


def stewarded(run: Recorded) -> Stewarded | None:
    """Return what a run's steward has cost, by its own clock; None where it has none."""
    place = run.files.path / "steward"
    try:
        brief: dict[str, Any] = json.loads((place / "brief.json").read_bytes())
    except FileNotFoundError:
        return None
    spans = lives_of(place)
    seconds = sum((Decimal(str(span)) for span in spans if span is not None), Decimal(0))
    unseen = sum(span is None for span in spans)
    return Stewarded(len(spans), seconds * Decimal(brief["second_usd"]) + unseen * Decimal(brief["life_usd"]))


def lives_of(place: Path) -> list[float | None]:
    """Return how long each life of a run's steward took, seconds; None where its end was not seen."""
    begun: dict[tuple[str, str], float] = {}
    spans: list[float | None] = []
    try:
        lines = (place / "lives").read_text().splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        words = line.split("\t")
        if len(words) != 4:
            continue
        key = (words[1], words[2])
        if words[0] == "begin":
            # Lives exclude each other: one whose end nobody saw was over before the next could begin.
            spans += [round(float(words[3]) - since, 3) for since in begun.values()]
            begun = {key: float(words[3])}
        elif key in begun:
            spans.append(round(float(words[3]) - begun.pop(key), 3))
    return [*spans, *([None] * len(begun))]
