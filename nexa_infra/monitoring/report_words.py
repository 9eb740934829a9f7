"""The sentences and columns of a report that its forms for people share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import timedelta

from nexa_infra.monitoring.report_model import (
    CostReport,
    Extended,
    FailedTrial,
    Measured,
    MeasuredMetric,
    Polling,
    RankedTrial,
    StewardCost,
)
from nexa_infra.monitoring.report_text import UNKNOWN, clean, counted, measured, money, quantity, rate, shown
from nexa_infra.runs.attempts import ENDED_BADLY
from nexa_infra.runs.prices import Price
from nexa_infra.runs.series import number
from nexa_infra.spec.walltime import format_walltime

# How attempts end badly: one of them, several.
_ENDS = {
    "failed": ("error of the program itself", "errors of the program itself"),
    "out_of_memory": ("out of memory", "out of memory"),
    "timeout": ("timeout", "timeouts"),
    "deadline": ("missed deadline", "missed deadlines"),
    "preempted": ("preemption", "preemptions"),
    "node_fail": ("node crash", "node crashes"),
    "interrupted": ("interruption", "interruptions"),
}

HOW_TO_RANK = "To see the best trials, name a metric: objective: {metric: accuracy, goal: max}"


def headline(report: CostReport) -> str:
    """Say how the run ended, in trials."""
    if report.end == "refused":
        return "Nothing was submitted"
    done = f"{report.states.get('completed', 0):,} of {counted(report.trials, 'trial')} completed"
    bad = sum(report.states.get(state, 0) for state in ENDED_BADLY)
    return f"{done}, {bad:,} failed" if bad else done


def states(report: CostReport) -> str:
    """Say how many trials are in which state: `12: 10 completed, 2 failed`."""
    told = ", ".join(f"{count:,} {state.replace('_', ' ')}" for state, count in report.states.items())
    return f"{report.trials:,}: {told}" if told else "0"


def ends(report: CostReport) -> str:
    """Say how often attempts ended badly, and in what ways: `1 timeout, 2 node crashes`; empty where none did."""
    return ", ".join(f"{number:,} {_ENDS.get(kind, (kind, kind))[number != 1]}" for kind, number in report.ends.items())


def steward(found: StewardCost | None) -> str | None:
    """Say what a run's steward has cost."""
    if found is None:
        return None
    lives = "1 life" if found.lives == 1 else f"{found.lives:,} lives"
    return f"{money(found.usd)}, {lives}, besides the trials"


def polls(found: Polling | None) -> str | None:
    """Say how often the scheduler was asked about the run."""
    if found is None:
        return None
    calls = dict(found.calls)
    told = [counted(calls.pop("polls", 0), "poll")]
    shared, squeue = calls.pop("shared", 0), calls.pop("squeue", 0)
    with_others = f" ({counted(shared, 'answer')} shared with other runs)" if shared else ""
    told.append(f"{counted(squeue, 'squeue call')}{with_others}")
    told.extend(f"{number:,} {clean(name)}" for name, number in calls.items() if number)
    return f"every {found.period:g} s at the least: {', '.join(told)}"


def created(report: CostReport) -> str:
    """Say when the run was created."""
    return f"{report.created_at:%Y-%m-%d %H:%M:%S %Z}".rstrip()


def code_version(report: CostReport) -> str | None:
    """Say which commit ran, where the code was under git."""
    if report.commit is None:
        return None
    place = f"{report.branch} at " if report.branch else ""
    return f"{place}{report.commit[:12]}{', with changes that no commit holds' if report.dirty else ''}"


def image(report: CostReport) -> str | None:
    """Say in which image the trials ran, by its digest, and what it was asked for as."""
    if (found := report.image) is None:
        return None
    digest = "" if found.digest in found.image else f" ({found.digest})"
    asked = "" if found.asked == found.image else f", asked for as {found.asked}"
    return f"{found.image}{digest}{asked}, by {found.runtime}"


def extended(found: Extended | None) -> str | None:
    """Say which run is extended, and how much of the sweep had finished there."""
    return None if found is None else f"{found.run_id}: {found.finished:,} of {found.trials:,} trials finished there"


def unit(price: Price) -> str:
    """Return what a price is for: a `GPU-hour` or a `core-hour`."""
    return price.unit.replace("gpu", "GPU")


def told(text: str | None) -> str:
    """Return a reason as it follows the headline, on the same line."""
    return f": {' '.join(text.split())}" if text and not text.isspace() else ""


def per_trial(report: CostReport) -> tuple[str, str] | None:
    """Return the mean and the median cost of a trial; None where no trial ran."""
    if report.usd_per_trial_mean is None and not report.uncounted:
        return None
    return money(report.usd_per_trial_mean), money(report.usd_per_trial_median)


def ceilings(report: CostReport) -> tuple[str, str]:
    """Return the most that the run may cost, and the most hours that it may use."""
    asked = report.projected
    if asked.ceiling_usd is None:
        return "no ceiling", "no ceiling"
    return money(asked.ceiling_usd), quantity(asked.unit_hours)


def actuals(report: CostReport) -> tuple[str, str]:
    """Return what the run did cost, and the hours that it used."""
    amounts = money(report.actual_usd), quantity(report.actual_unit_hours)
    return _at_least(report, amounts[0]), _at_least(report, amounts[1])


def waste(report: CostReport) -> str:
    """Return what attempts cost that did not complete, and their share."""
    share = "" if report.wasted_share is None else f" ({100 * report.wasted_share:.1f} %)"
    return f"{_at_least(report, money(report.wasted_usd))}{share}"


def _at_least(report: CostReport, amount: str) -> str:
    return f"at least {amount}" if report.uncounted and amount != UNKNOWN else amount


def how_projected(report: CostReport) -> str:
    """Say what the ceiling is the product of."""
    asked, price = report.projected, report.projected.price
    hours = asked.duration_hours
    sizes = (
        counted(asked.job_count, "trial"),
        counted(asked.attempts_per_trial, "attempt"),
        counted(asked.nodes, "node"),
        counted(asked.units_per_node, {"gpu-hour": "GPU", "core-hour": "core"}.get(price.unit, "billing unit")),
        "no walltime" if hours is None else format_walltime(timedelta(hours=float(hours))),
    )
    return f"{' × '.join(sizes)} at {rate(price.usd_per_hour)} a {unit(price)}"


def left_out(report: CostReport) -> str | None:
    """Say how many completed trials the ranking lacks, and why."""
    if not report.unranked or report.objective is None:
        return None
    told = f"{counted(report.unranked, 'completed trial')} left out"
    return f"{told}: {clean(report.objective.metric)} is missing, or no finite number"


def tree(report: CostReport) -> str | None:
    """Name the code's files by their content, and what of them no commit holds."""
    if report.tree is None:
        return None
    return report.tree + (f", with the patch {report.patch[:12]}" if report.patch else "")


def jobs(report: CostReport) -> str | None:
    """Name the cluster and the run's arrays on it."""
    if report.cluster is None:
        return None
    ids = f", {'job' if len(report.job_ids) == 1 else 'jobs'} {', '.join(report.job_ids)}" if report.job_ids else ""
    return f"{clean(report.cluster)}{ids}"


def counted_how(report: CostReport) -> str | None:
    """Say who counted the actual cost, where it is not this package alone."""
    if report.cluster is None or report.actual_usd is None:
        return None
    if report.accounted:
        return "counted by the cluster's accounting (sacct), every attempt"
    return "counted by the trials' own clocks, at what the job asked for: the cluster's accounting said nothing"


def cost_unknown(report: CostReport) -> str | None:
    """Say how many trials the actual amounts lack."""
    if not report.uncounted:
        return None
    return f"The cost of {counted(report.uncounted, 'trial')} is unknown, and not in these sums: no end was seen"


def ending(trial: FailedTrial) -> str:
    """Say how a trial failed: in the scheduler's words where it ended it."""
    if trial.reason:
        return f"{trial.reason}, attempt {trial.attempt}" if trial.attempt > 1 else trial.reason
    told = trial.state.replace("_", " ")
    told += f", exit code {trial.exit_code}" if trial.exit_code is not None else ", no exit code"
    told += f" ({trial.signal})" if trial.signal else ""
    return f"{told}, attempt {trial.attempt}" if trial.attempt > 1 else told


def first_failures(report: CostReport) -> str:
    """Say that not every failure is told, where that is so."""
    bad = sum(report.states.get(state, 0) for state in ENDED_BADLY)
    return f" (the first {len(report.failed)} are told here)" if bad > len(report.failed) else ""


def parameter_columns(trials: Sequence[RankedTrial]) -> tuple[list[str], list[list[str]]]:
    """Return the names of the trials' parameters, and their values in a row a trial."""
    names = list(dict.fromkeys(name for trial in trials for name in trial.parameters))
    return names, [
        [shown(trial.parameters[name]) if name in trial.parameters else "" for name in names] for trial in trials
    ]


def place(found: Measured) -> str:
    """Say where a training stood at last: `step 40 of 100, by 41 lines`; empty where it said nothing."""
    if found.axis is None or found.step is None:
        return ""
    total = "" if found.total is None else f" of {number(found.total)}"
    return f"{found.axis} {number(found.step)}{total}, by {counted(found.lines, 'line')}"


def courses(found: Measured) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of a table of a training's metrics, but for their names."""
    rows = [
        [
            measured(each.first),
            _last(each),
            measured(each.min),
            _step(each.min_step, each.best_step),
            measured(each.max),
            _step(each.max_step, each.best_step),
        ]
        for each in found.metrics
    ]
    return ["First", "Last", "Lowest", "at", "Highest", "at"], rows


def _last(metric: MeasuredMetric) -> str:
    return "not finite" if metric.last is None else measured(metric.last)


def _step(step: float | None, best: float | None) -> str:
    return "" if step is None else f"{number(step)} (best)" if step == best else number(step)


def commands(report: CostReport) -> Iterator[tuple[str, str]]:
    """Yield what can be done next, and the command that does it."""
    if report.retry_command:
        yield "Run the failed trials again", report.retry_command
    if report.resume_command:
        yield "Run the unfinished trials", report.resume_command


def ranking(report: CostReport, trials: Sequence[RankedTrial]) -> tuple[list[str], list[list[str]]]:
    """Return a ranking's header and rows, but for the parameters: trial, metric, cost, and metric per dollar.

    Of these, only the metric's name is not ours.
    """
    columns = [("Trial", [str(trial.index) for trial in trials])]
    if report.objective:
        columns.append((report.objective.metric, [measured(trial.metric) for trial in trials]))
    columns.append(("USD", [money(trial.usd) for trial in trials]))
    columns.append(("Seconds", [quantity(trial.seconds) for trial in trials]))
    if any(trial.metric_per_usd is not None for trial in trials):
        per_usd = ["" if trial.metric_per_usd is None else quantity(trial.metric_per_usd) for trial in trials]
        columns.append(("Per USD", per_usd))
    return [title for title, _ in columns], [list(row) for row in zip(*(cells for _, cells in columns))]
