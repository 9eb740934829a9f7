"""How runs stand, as text: a line a run, or a page of one."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from nexa_infra.monitoring.report_text import COLUMNS, assignments, clean, money, ranges, shorten, wrap
from nexa_infra.operations import steps
from nexa_infra.operations.endings import last_words
from nexa_infra.operations.manage import Status
from nexa_infra.runs.attempts import ENDED_BADLY
from nexa_infra.runs.index import Entry
from nexa_infra.runs.submissions import read_submissions

_HEADER = ("Run", "End", "Done", "Failed", "USD", "Age")
_MOST_FAILED = 5
_MOST_SUBMISSIONS = 5
_INDENT = 14


def status_table(found: Sequence[Status | tuple[Entry, Exception]]) -> str:
    """Show runs, a line each: how it stands, trials that are done and that failed, what it cost, and its age."""
    rows = [_row(each) if isinstance(each, Status) else (each[0].id, "damaged", "-", "-", "-", "-") for each in found]
    sizes = [max(map(len, column)) for column in zip(_HEADER, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            # Names to the left, numbers to the right.
            cell.ljust(size) if number < 2 else cell.rjust(size)
            for number, (cell, size) in enumerate(zip(row, sizes, strict=True))
        ).rstrip()
        for row in (_HEADER, *rows)
    )


def status_page(found: Status) -> str:
    """Show one run: how it stands, where everything is, what was submitted, what failed, and what to do next."""
    return "\n".join(_page(found))


def age(seconds: float) -> str:
    """Write how long ago something was, in its largest unit: `12 s`, `3 min`, `5 h`, `40 d`."""
    for size, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{math.floor(seconds / size):,} {name}"
    return f"{max(0, math.floor(seconds))} s"


def _row(status: Status) -> tuple[str, ...]:
    run = status.run
    bad = sum(status.states.get(state, 0) for state in ENDED_BADLY)
    done = f"{status.states.get('completed', 0):,}/{run.trials:,}"
    return run.id, status.end, done, f"{bad:,}", _usd(status), age(_age(status))


def _page(status: Status) -> Iterator[str]:
    run = status.run
    told = f": {' '.join(status.reason.split())}" if status.reason else ""
    yield from wrap(f"{run.kind.capitalize()} {run.config.job.name}: {status.end}{told}", COLUMNS)
    yield ""
    yield from _field("Run", run.id)
    yield from _field("Directory", run.directory)
    if run.config_file:
        yield from _field("Config", run.config_file)
    if run.snapshot and run.snapshot.commit:
        branch = f"{run.snapshot.branch} at " if run.snapshot.branch else ""
        changes = ", with changes that no commit holds" if run.snapshot.dirty else ""
        yield from _field("Code", f"{branch}{run.snapshot.commit[:12]}{changes}")
    yield from _field("Created", f"{run.created_at:%Y-%m-%d %H:%M:%S} UTC, {age(_age(status))} ago")
    counts = ", ".join(f"{count:,} {state.replace('_', ' ')}" for state, count in status.states.items() if count)
    yield from _field("Trials", f"{run.trials:,}: {counts}")
    if run.config.unattended and status.end == "running":
        yield from _field("Steward", "follows the run: it goes on without this machine")
    yield from _metrics(status)
    ceiling = steps.estimate_cost(run).ceiling_usd
    yield from _field("Cost", f"{_usd(status)}, {'no ceiling' if ceiling is None else f'at most {money(ceiling)}'}")
    yield from _submissions(status)
    yield from _failed(status)
    yield from _next(status)


def _metrics(status: Status) -> Iterator[str]:
    if (found := status.progress) is None:
        return
    share = "" if found.share is None else f" ({found.share:.0%})"
    since = "" if found.moment is None else f", {age(time.time() - found.moment)} ago"
    yield from _field("Metrics", f"{found.place}{share}{since}")
    values = [f"{name} {value:.4g}" for name, value in found.latest.items()]
    for line in wrap(", ".join(values), COLUMNS - _INDENT, lines=4):
        yield f"  {'':<{_INDENT - 2}}{line}"


def _submissions(status: Status) -> Iterator[str]:
    found = read_submissions(status.run.files)
    if not found:
        return
    yield from ("", "Submissions")
    if len(found) > _MOST_SUBMISSIONS:
        yield f"  … {len(found) - _MOST_SUBMISSIONS:,} earlier ones"
    for each in found[-_MOST_SUBMISSIONS:]:
        job = f"array {each.job_id}" if each.job_id else _VOID.get(each.void or "", "not answered")
        trials = f"{each.trials:,} trial{'' if each.trials == 1 else 's'}"
        trials += f", {each.pack} a task" if each.pack > 1 else ""
        yield f"  {each.number:>3}  {each.created_at:%Y-%m-%d %H:%M:%S} UTC  {job}  {each.array}  {trials}"


_VOID = {"full": "the queue was full", "lost": "given up: nowhere to be found"}


def _failed(status: Status) -> Iterator[str]:
    if not status.failed:
        return
    run = status.run
    yield from (
        "",
        shorten(f"Failed: trial{'s' if len(status.failed) > 1 else ''} {ranges(t for t, _ in status.failed)}", COLUMNS),
    )
    for trial, state in status.failed[:_MOST_FAILED]:
        last = (status.attempts or {}).get(trial, [])[-1:]
        code = f", exit code {last[0].exit_code}" if last and last[0].exit_code is not None else ""
        point = assignments(run.config.trials.parameters_of(trial))
        yield shorten(f"  {trial}: {state.replace('_', ' ')}{code}: {point}", COLUMNS)
        words = last_words(run, trial, last[0].number, 1) if last else ""
        if words:
            yield shorten(f"     | {words}", COLUMNS)
    if len(status.failed) > _MOST_FAILED:
        yield f"  … and {len(status.failed) - _MOST_FAILED:,} more"


def _next(status: Status) -> Iterator[str]:
    run = status.run
    if status.end == "running":
        yield from ("", "End it:", f"  nexa-infra cancel {run.id}")
        return
    if status.failed:
        yield from ("", "See why, or run the failed trials again:")
        yield f"  nexa-infra logs {run.id} {status.failed[0][0]} --stderr"
        yield f"  nexa-infra retry {run.id}"
    if status.end in {"unfinished", "cancelled"} or (status.end == "failed" and not status.failed):
        yield from ("", "Run the unfinished trials:", f"  nexa-infra resume {run.id}")


def _field(label: str, text: str) -> Iterator[str]:
    """Yield a line with its label; it is broken only where it has spaces, so that a path can be copied whole."""
    if " " not in text or len(text) + _INDENT <= COLUMNS:
        yield f"  {label:<{_INDENT - 2}}{clean(text)}"
        return
    for number, line in enumerate(wrap(text, COLUMNS - _INDENT)):
        yield f"  {'' if number else label:<{_INDENT - 2}}{line}"


def _usd(status: Status) -> str:
    if status.usd is None:
        return "unknown"
    return f"at least {money(status.usd)}" if status.at_least else money(status.usd)


def _age(status: Status) -> float:
    return (datetime.now(UTC) - status.run.created_at).total_seconds()
