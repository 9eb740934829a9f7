"""The cost report as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain

from nexa_infra.monitoring import report_words as words
from nexa_infra.monitoring.report_model import CostReport, RankedTrial
from nexa_infra.monitoring.report_text import (
    assignments,
    code,
    escape,
    fence,
    link,
    markdown_table,
    measured,
    money,
    rate,
)
from nexa_infra.runs.series import Progress

# More parameters than this share one column.
_MOST_COLUMNS = 6


def to_markdown(report: CostReport, pictures: Mapping[str, str] | None = None) -> str:
    """Write a report as Markdown with GitHub's tables, for Prefect's UI and for a file.

    `pictures` gives plots an address each, and leaves out the others; unset, plots are named by their files.
    """
    parts = (_summary(report), _metrics(report, pictures), _cost(report), _rankings(report), _failures(report))
    return "\n".join((*chain.from_iterable(parts), *_next(report))) + "\n"


def metrics_markdown(progress: Progress, warnings: Sequence[str] = ()) -> str:
    """Write how a training is while it runs, as Markdown."""
    share = "" if progress.share is None else f" ({progress.share:.0%})"
    lines = [f"{escape(progress.place)}{share}", ""]
    for told in warnings:
        lines += [f"**Warning:** {escape(told, 400)}", ""]
    rows = ((escape(name), measured(value)) for name, value in progress.latest.items())
    return "\n".join((*lines, *markdown_table(("Metric", "Latest"), rows, right=(1,)))) + "\n"


def _summary(report: CostReport) -> Iterator[str]:
    yield f"# {report.kind.capitalize()} {escape(report.name)}: {report.end}"
    yield ""
    yield f"**{words.headline(report)}**{escape(words.told(report.reason), 2000)}"
    yield ""
    facts = (
        ("Trials", words.states(report)),
        ("Ended badly", escape(words.ends(report), 400)),
        ("Extends", escape(words.extended(report.extends) or "")),
        ("Created", words.created(report)),
        ("Code", escape(words.code_version(report) or "", 200)),
        ("Snapshot", escape(words.tree(report) or "", 200)),
        ("Image", escape(words.image(report) or "", 400)),
        ("Cluster", escape(words.jobs(report) or "", 400)),
        ("Steward", escape(words.steward(report.steward) or "", 400)),
        ("Polls", escape(words.polls(report.polls) or "", 400)),
        ("Directory", code(report.directory)),
        ("Prefect", link(report.flow_run_url or "")),
    )
    yield from markdown_table(("Run", code(report.run_id)), [fact for fact in facts if fact[1]])


def _metrics(report: CostReport, pictures: Mapping[str, str] | None) -> Iterator[str]:
    if (found := report.measured) is None:
        return
    yield from ("", "## Metrics", "")
    for told in found.warnings:
        yield from (f"**Warning:** {escape(told, 400)}", "")
    if not found.metrics:
        return
    yield from (f"At {words.place(found)}.", "")
    header, rows = words.courses(found)
    names = [escape(each.name) for each in found.metrics]
    table = ([name, *row] for name, row in zip(names, rows))
    yield from markdown_table(["Metric", *header], table, right=range(1, len(header) + 1))
    for each, name in zip(found.metrics, names):
        if each.plot is not None and (at := each.plot if pictures is None else pictures.get(each.plot)):
            yield from ("", f"![{name} by {each.axis}]({at})")


def _cost(report: CostReport) -> Iterator[str]:
    expected = report.projected.expectation_usd
    actual, hours = words.actuals(report)
    a_trial = words.per_trial(report)
    rows = [
        ("Projected, at most", *words.ceilings(report)),
        *([("Expected, by past trials", money(expected), "")] if expected is not None else []),
        ("**Actual**", f"**{actual}**", f"**{hours}**"),
        *([("A trial, mean", a_trial[0], ""), ("A trial, median", a_trial[1], "")] if a_trial else []),
        ("Wasted on attempts that did not complete", words.waste(report), ""),
    ]
    unit = words.unit(report.projected.price)
    yield from ("", "## Cost", "")
    yield from markdown_table(("", "USD", f"{unit[0].upper()}{unit[1:]}s"), rows, right=(1, 2))
    yield from ("", f"At most: {words.how_projected(report)}.")
    if told := words.counted_how(report):
        yield from ("", f"Actual: {told}.")
    if told := words.cost_unknown(report):
        yield from ("", f"{told}.")
    yield from ("", "## Prices used", "")
    prices = (
        (
            escape(price.item),
            words.unit(price),
            rate(price.usd_per_hour),
            escape(price.provider),
            escape(price.source, 120),
            escape(price.date),
        )
        for price in report.prices
    )
    yield from markdown_table(("Item", "Unit", "USD", "Provider", "Source", "Read on"), prices, right=(2,))


def _rankings(report: CostReport) -> Iterator[str]:
    if report.objective is None:
        yield from ("", f"{escape(words.HOW_TO_RANK, 200)}.")
    elif report.states.get("completed"):
        yield from ("", f"## Best by {escape(report.objective.metric)} ({report.objective.goal})", "")
        if report.best:
            yield from _trials(report, report.best)
        else:
            yield "No completed trial has this metric."
        if told := words.left_out(report):
            yield from ("", f"{escape(told, 200)}.")
    if report.dearest:
        yield from ("", "## Dearest", "")
        yield from _trials(report, report.dearest)


def _trials(report: CostReport, trials: Sequence[RankedTrial]) -> Iterator[str]:
    header, rows = words.ranking(report, trials)
    names, cells = words.parameter_columns(trials)
    limit = 64
    if len(names) > _MOST_COLUMNS:
        names, cells = ["Parameters"], [[assignments(trial.parameters)] for trial in trials]
        limit = 200
    lines = ([*row, *(escape(cell, limit) for cell in more)] for row, more in zip(rows, cells))
    yield from markdown_table([escape(title) for title in (*header, *names)], lines, right=range(len(header)))


def _failures(report: CostReport) -> Iterator[str]:
    if not report.failed:
        return
    yield from ("", "## Failed", "", f"Trials: {escape(report.failed_trials, 400)}{words.first_failures(report)}")
    for trial in report.failed:
        yield from ("", f"### Trial {trial.index}: {words.ending(trial)}", "")
        yield f"Cost {money(trial.usd)}: {escape(assignments(trial.parameters) or 'no parameters', 400)}"
        if trial.stderr:
            yield from ("", *fence(trial.stderr))
        if trial.stderr_file:
            yield from ("", f"The whole of it: {code(trial.stderr_file)}")


def _next(report: CostReport) -> Iterator[str]:
    for purpose, command in words.commands(report):
        yield from ("", f"## {purpose}", "", *fence([command]))
