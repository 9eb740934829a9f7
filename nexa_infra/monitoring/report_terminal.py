"""The cost report on a terminal: plain text, no line wider than 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

from nexa_infra.monitoring import report_words as words
from nexa_infra.monitoring.report_model import CostReport, RankedTrial
from nexa_infra.monitoring.report_text import (
    COLUMNS,
    assignments,
    clean,
    fits,
    money,
    rate,
    shorten,
    text_table,
    width,
    wrap,
)

_INDENT = 2
_LABELS = 14
# A terminal is short: the report's files tell the others.
_MOST_FAILED = 3
_MOST_METRICS = 12
_LAST_LINES = 4


def to_terminal(report: CostReport) -> str:
    """Write a report's short form, in plain text of at most 80 columns.

    Long values are shortened, but for commands: these are broken as a shell reads them.
    """
    parts = (_summary(report), _metrics(report), _cost(report), _rankings(report), _failures(report), _next(report))
    return "\n".join(chain.from_iterable(parts)) + "\n"


def _field(label: str, text: str) -> Iterator[str]:
    for number, line in enumerate(wrap(text, COLUMNS - _LABELS)):
        yield f"{' ' * _INDENT}{'' if number else label:<{_LABELS - _INDENT}}{line}"


def _place(label: str, text: str) -> Iterator[str]:
    """Yield a path or an address, on a line of its own where it is long, so that it can be copied whole."""
    if width(clean(text)) <= COLUMNS - _LABELS:
        yield f"{' ' * _INDENT}{label:<{_LABELS - _INDENT}}{clean(text)}"
    else:
        yield f"{' ' * _INDENT}{label}"
        yield f"{' ' * 2 * _INDENT}{shorten(text, COLUMNS - 2 * _INDENT, keep_end=True)}"


def _summary(report: CostReport) -> Iterator[str]:
    yield f"{report.kind.capitalize()} {shorten(report.name, 50)}: {report.end}"
    for line in wrap(f"{words.headline(report)}{words.told(report.reason)}", COLUMNS - _INDENT):
        yield f"{' ' * _INDENT}{line}"
    yield ""
    yield from _place("Run", report.run_id)
    if told := words.jobs(report):
        yield from _field("Cluster", told)
    if told := words.extended(report.extends):
        yield from _field("Extends", told)
    yield from _place("Directory", report.directory)
    if report.flow_run_url:
        yield from _place("Prefect", report.flow_run_url)
    if told := words.code_version(report):
        yield from _field("Code", told)
    if (image := report.image) is not None:
        # The digest is copied whole, which no other line leaves room for.
        yield from _field("Image", f"{image.asked.partition('@')[0]}, by {image.runtime}")
        yield f"{' ' * 2 * _INDENT}{image.digest}"
    yield from _field("Trials", words.states(report))
    if told := words.ends(report):
        yield from _field("Ended badly", told)
    if told := words.steward(report.steward):
        yield from _field("Steward", told)
    if told := words.polls(report.polls):
        yield from _field("Polls", told)


def _metrics(report: CostReport) -> Iterator[str]:
    if (found := report.measured) is None:
        return
    if told := words.place(found):
        yield from ("", f"Metrics at {told}")
        header, rows = words.courses(found)
        shown = [[*row, each.name] for row, each in zip(rows, found.metrics)]
        yield from text_table([*header, "Metric"], shown[:_MOST_METRICS])
        if len(shown) > _MOST_METRICS:
            yield "  The others are in the report's files."
    for told in found.warnings:
        yield from ("", *wrap(f"Warning: {told}", COLUMNS))


def _cost(report: CostReport) -> Iterator[str]:
    unit = f"{words.unit(report.projected.price)}s"
    a_trial = words.per_trial(report)
    usd, hours = words.actuals(report)
    most_usd, most_hours = words.ceilings(report)
    expected = report.projected.expectation_usd
    yield ""
    yield from _field("Cost", f"{usd} for {hours} {unit}")
    if told := words.counted_how(report):
        yield from _field("", told)
    if a_trial:
        yield from _field("A trial", f"mean {a_trial[0]}, median {a_trial[1]}")
    if report.wasted_usd:
        yield from _field("Wasted", f"{words.waste(report)} on attempts that did not complete")
    most = most_usd if most_usd == most_hours else f"{most_usd} for {most_hours} {unit}"
    yield from _field("At most", f"{most}: {words.how_projected(report)}")
    if expected is not None:
        yield from _field("Expected", f"{money(expected)}, by past trials")
    for price in report.prices:
        yield from _field("Price", f"{price.item} {rate(price.usd_per_hour)} a {words.unit(price)}, {price.provider}")
        yield from _field("", f"{price.source}, read on {price.date}")
    if told := words.cost_unknown(report):
        yield from _field("Unknown", told)


def _rankings(report: CostReport) -> Iterator[str]:
    if report.objective is None:
        yield from ("", *wrap(words.HOW_TO_RANK, COLUMNS))
    elif report.states.get("completed"):
        yield from ("", shorten(f"Best by {report.objective.metric} ({report.objective.goal})", COLUMNS))
        if report.best:
            yield from _trials(report, report.best)
        else:
            yield f"{' ' * _INDENT}No completed trial has this metric."
        if told := words.left_out(report):
            yield from (f"{' ' * _INDENT}{line}" for line in wrap(told, COLUMNS - _INDENT))
    if report.dearest:
        yield from ("", "Dearest")
        yield from _trials(report, report.dearest)


def _trials(report: CostReport, trials: Sequence[RankedTrial]) -> Iterator[str]:
    header, rows = words.ranking(report, trials)
    names, cells = words.parameter_columns(trials)
    whole = [[*row, *more] for row, more in zip(rows, cells)]
    if fits([*header, *names], *whole):
        yield from text_table([*header, *names], whole)
    else:
        lines = ([*row, assignments(trial.parameters)] for row, trial in zip(rows, trials))
        yield from text_table([*header, "Parameters"], lines)


def _failures(report: CostReport) -> Iterator[str]:
    if not report.failed:
        return
    yield from ("", shorten(f"Failed: trials {report.failed_trials}", COLUMNS))
    for trial in report.failed[:_MOST_FAILED]:
        yield shorten(f"  {trial.index}: {words.ending(trial)}: {assignments(trial.parameters)}", COLUMNS)
        for line in trial.stderr[-_LAST_LINES:]:
            yield shorten(f"     | {line.expandtabs(4)}", COLUMNS)
    if len(report.failed) > _MOST_FAILED:
        yield "  The others' last words are in the report's files."


def _next(report: CostReport) -> Iterator[str]:
    for purpose, command in words.commands(report):
        yield from ("", f"{purpose}:")
        rest = f"  {clean(command)}"
        while width(rest) > COLUMNS:
            # A shell joins a line that ends in a backslash to the next, as long as that is not indented.
            yield f"{rest[: COLUMNS - 1]}\\"
            rest = rest[COLUMNS - 1 :]
        yield rest
