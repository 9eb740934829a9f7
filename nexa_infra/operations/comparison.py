"""Two runs side by side: in sum, and trial by trial, as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from nexa_infra.monitoring.report_text import assignments, counted, measured, money, quantity, shorten, text_table
from nexa_infra.operations import steps
from nexa_infra.runs.endings import ending
from nexa_infra.runs.record import Run
from nexa_infra.runs.results import Trial
from nexa_infra.spec.fields import Value
from nexa_infra.spec.policy import Objective


@dataclass(frozen=True)
class Compared:
    """One point of the parameter space in two runs; None where a run does not have it."""

    hash: str
    parameters: Mapping[str, Value]
    left: Trial | None
    right: Trial | None


def compare(left: Run, right: Run) -> list[Compared]:
    """Set two runs side by side, trial by trial, matched by the hash of their parameters; nothing is written.

    Where a run has a point several times, the first is matched with the other run's first, and so on.
    """
    mine, other = (_by_point(steps.look(run)) for run in (left, right))
    found = []
    for key in dict.fromkeys([*mine, *other]):
        a, b = mine.get(key), other.get(key)
        known = a or b
        if known is not None:
            found.append(Compared(key[0], known.parameters, a, b))
    return found


def _by_point(trials: Sequence[Trial]) -> dict[tuple[str, int], Trial]:
    seen: Counter[str] = Counter()
    found = {}
    for trial in trials:
        found[trial.hash, seen[trial.hash]] = trial
        seen[trial.hash] += 1
    return found


def comparison_text(left: Run, right: Run) -> str:
    """Show two runs side by side, in at most 80 columns: sums, then each trial's metric and what it cost.

    The metric is the objective's, of the left run or else of the right one; without any, it is the seconds.
    """
    found = compare(left, right)
    objective = left.config.objective or right.config.objective
    mine = [pair.left for pair in found if pair.left]
    other = [pair.right for pair in found if pair.right]
    both = sum(1 for pair in found if pair.left and pair.right)
    sides = f"{counted(both, 'trial')} in both, {len(mine) - both:,} only left, {len(other) - both:,} only right"
    title = f"{objective.metric} ({objective.goal})" if objective else "seconds"
    return "\n".join(
        [
            f"Left   {left.id}",
            f"Right  {right.id}",
            "",
            *text_table(("Left", "Right", "Difference", ""), _sums(left, right, mine, other, objective)),
            "",
            sides,
            "",
            shorten(f"Trial by trial, by {title}", 80),
            *text_table(
                ("Left", "Right", "Difference", "Left USD", "Right USD", "Parameters"),
                (_line(pair, objective) for pair in found),
            ),
        ]
    )


def _sums(
    left: Run, right: Run, mine: Sequence[Trial], other: Sequence[Trial], objective: Objective | None
) -> Iterator[tuple[str, str, str, str]]:
    yield ending(left, mine)[0], ending(right, other)[0], "", "end"
    done = [[trial for trial in trials if trial.state == "completed"] for trials in (mine, other)]
    yield _row(len(mine), len(other), "trials", lambda n: f"{n:,.0f}")
    yield _row(len(done[0]), len(done[1]), "completed", lambda n: f"{n:,.0f}")
    hours = [Decimal(sum(trial.seconds for trial in trials)) / 3600 for trials in (mine, other)]
    yield _row(hours[0], hours[1], "hours of all attempts", quantity)
    yield _row(_usd(mine), _usd(other), "USD", money)
    if objective:
        best = [_best(trials, objective) for trials in done]
        yield _row(best[0], best[1], f"best {objective.metric}", _number)


def _usd(trials: Sequence[Trial]) -> Decimal | None:
    """Return what trials cost in all; None where nobody saw what one of them cost."""
    known = [trial.usd for trial in trials if trial.usd is not None]
    return sum(known, Decimal(0)) if len(known) == len(trials) else None


def _best(trials: Sequence[Trial], objective: Objective) -> Decimal | None:
    values = [value for trial in trials if (value := _measure(trial, objective)) is not None]
    return (min(values) if objective.goal == "min" else max(values)) if values else None


def _measure(trial: Trial | None, objective: Objective | None) -> Decimal | None:
    """Return the objective's metric of a trial, or its seconds; None where it is no finite number."""
    value = None if trial is None else trial.metrics.get(objective.metric) if objective else trial.seconds
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    number = Decimal(value)
    # A metric that no float can hold cannot be set beside another.
    return number if number.is_finite() and abs(number.adjusted()) < 300 else None


def _line(pair: Compared, objective: Objective | None) -> tuple[str, ...]:
    left, right = _measure(pair.left, objective), _measure(pair.right, objective)
    cells = _shown(pair.left, left), _shown(pair.right, right), _difference(left, right, _number)
    costs = ["-" if trial is None else money(trial.usd) for trial in (pair.left, pair.right)]
    return (*cells, *costs, assignments(pair.parameters))


def _shown(trial: Trial | None, value: Decimal | None) -> str:
    if trial is None:
        return "-"
    return trial.state.replace("_", " ") if value is None else _number(value)


def _number(value: Decimal) -> str:
    return measured(float(value))


def _row(
    left: Decimal | int | None, right: Decimal | int | None, name: str, show: Callable[[Decimal], str]
) -> tuple[str, str, str, str]:
    mine, other = (None if value is None else Decimal(value) for value in (left, right))
    told = ["unknown" if value is None else show(value) for value in (mine, other)]
    return told[0], told[1], _difference(mine, other, show), name


def _difference(left: Decimal | None, right: Decimal | None, show: Callable[[Decimal], str]) -> str:
    if left is None or right is None:
        return ""
    difference = right - left
    return f"{'-' if difference < 0 else '+' if difference > 0 else ''}{show(abs(difference))}"
