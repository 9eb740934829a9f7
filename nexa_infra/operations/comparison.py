"""Two runs side by side, as text."""

from __future__ import annotations

from decimal import Decimal

from nexa_infra.operations.manage import Compared, compare
from nexa_infra.runs.record import Run
from nexa_infra.runs.results import Trial
from nexa_infra.spec.launcher import written


def comparison_text(left: Run, right: Run) -> str:
    """Show two runs' trials side by side: states, the objective's metric, USD."""
    found = compare(left, right)
    objective = left.config.objective or right.config.objective
    metric = objective.metric if objective else None
    both = [pair for pair in found if pair.left and pair.right]
    mine = [pair.left for pair in found if pair.left]
    other = [pair.right for pair in found if pair.right]
    lines = [
        f"left   {left.id}  {_total(mine)}",
        f"right  {right.id}  {_total(other)}",
        f"{len(both)} trials in both, {len(mine) - len(both)} only left, {len(other) - len(both)} only right",
        "",
        f"{'hash':<12}  {'left':>24}  {'right':>24}  parameters",
    ]
    lines.extend(_line(pair, metric) for pair in found)
    return "\n".join(lines)


def _line(pair: Compared, metric: str | None) -> str:
    parameters = " ".join(f"{name}={written(value)}" for name, value in pair.parameters.items())
    return f"{pair.hash:<12}  {_side(pair.left, metric):>24}  {_side(pair.right, metric):>24}  {parameters[:200]}"


def _side(trial: Trial | None, metric: str | None) -> str:
    if trial is None:
        return "-"
    value = trial.metrics.get(metric) if metric else None
    cost = "unknown" if trial.usd is None else f"${trial.usd:.6f}"
    said = f"{value:.6g}" if isinstance(value, (int, float)) else trial.state
    return f"{said} {cost}"


def _total(trials: list[Trial]) -> str:
    costs = [trial.usd for trial in trials]
    known = [cost for cost in costs if cost is not None]
    return f"${sum(known, Decimal(0)):.6f}" + (
        f" and {len(costs) - len(known)} unknown" if len(known) < len(costs) else ""
    )
