"""The verbs that take a run to its end: sweep, extend, train, resume, retry."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from nexa_infra.verbs.common import Budget, File, Name, Overrides, Preview, Where, app, cluster_named, find, note, say

if TYPE_CHECKING:
    from nexa_infra.runs.record import Run


@app.command(sort_key=1)
def sweep(
    file: File,
    /,
    *,
    cluster: Where = None,
    preview: Preview = False,
    overrides: Overrides = None,
    budget: Budget = None,
) -> None:
    """Run every trial of a sweep, here or on a cluster, to its cost report."""
    from nexa_infra.operations.launch import plan_sweep

    _take(plan_sweep(file, cluster=cluster_named(cluster), overrides=overrides or (), budget_usd=budget), preview)


@app.command(sort_key=2)
def extend(
    run: Name,
    file: File,
    /,
    *,
    cluster: Where = None,
    preview: Preview = False,
    overrides: Overrides = None,
    budget: Budget = None,
) -> None:
    """Run what of a sweep another run has not finished, as a new run."""
    from nexa_infra.hosts.connections import kept_open
    from nexa_infra.operations.extend import plan_extension

    found, where = find(run), cluster_named(cluster)
    with kept_open(where):
        planned = plan_extension(found, file, cluster=where, overrides=overrides or (), budget_usd=budget)
        _take(planned, preview)


@app.command(sort_key=3)
def train(
    file: File,
    /,
    *,
    cluster: Where = None,
    distributed: Annotated[
        bool | None, Parameter(help="start it by torchrun, or plainly; unset, as the config says", show_default=False)
    ] = None,
    preview: Preview = False,
    overrides: Overrides = None,
    budget: Budget = None,
    fetch_to: Annotated[Path | None, Parameter(help="copy what it has written into this folder, at its end")] = None,
) -> None:
    """Run one training, here or on a cluster, to its cost report."""
    from nexa_infra.hosts.connections import kept_open
    from nexa_infra.operations.fetch import fetch as bring
    from nexa_infra.operations.launch import plan_training

    where = cluster_named(cluster)
    with kept_open(where):
        run = plan_training(file, distributed, cluster=where, overrides=overrides or (), budget_usd=budget)
        _take(run, preview)
        if fetch_to is not None and not preview:
            say(str(bring(run, to=fetch_to)))


@app.command(sort_key=8)
def resume(run: Name, /) -> None:
    """Run what is unfinished: interrupted, cancelled, or never started."""
    from nexa_infra.operations import manage

    find(run)
    _follow(manage.prepare_resume(run))


@app.command(sort_key=9)
def retry(run: Name, /) -> None:
    """Run the failed trials of a run again, and only those."""
    from nexa_infra.operations import manage

    find(run)
    _follow(manage.prepare_retry(run))


def _take(run: Run, preview: bool) -> None:
    """Take a planned run to its end, or only show it."""
    from nexa_infra.monitoring import report_words as words
    from nexa_infra.monitoring.report import extended
    from nexa_infra.monitoring.report_text import counted, money
    from nexa_infra.operations.launch import preview as show
    from nexa_infra.operations.steps import estimate_cost
    from nexa_infra.scheduling.slurm import preview_markdown
    from nexa_infra.scheduling.torchrun import placement_of

    estimate = estimate_cost(run)
    if preview:
        sys.stdout.write(preview_markdown(show(run)))
        return
    cost = "no ceiling" if estimate.ceiling_usd is None else f"at most {money(estimate.ceiling_usd)}"
    where = f", by {placement_of(run)}" if run.kind == "training" else ""
    note(f"run {run.id}: {counted(run.trials, 'trial')}, {cost}{where}")
    if found := extended(run):
        note(f"extends {words.extended(found)}")
    _follow(run)


def _follow(run: Run) -> None:
    """Follow a run to its end, whatever that is, and show its report."""
    from nexa_infra.operations.launch import follow_run
    from nexa_infra.operations.progress import terminal_line

    before = _written(run)
    try:
        with terminal_line() as tell:
            follow_run(run, tell=tell)
    except BaseException as error:
        if _written(run) != before:  # else it is an earlier end's
            _show_report(run)
        if isinstance(error, KeyboardInterrupt):
            note(f"cancelled: nothing of it is left running here; {_go_on(run)}")
            raise SystemExit(130) from None
        if isinstance(error, SystemExit):
            left = "" if run.cluster is None else ": its jobs go on"
            note(f"ended by SIGTERM{left}; {_go_on(run)}")
        raise
    _show_report(run)


def _written(run: Run) -> int | None:
    """Return when a run's report was written; None where it has none."""
    try:
        return run.files.report_json.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _go_on(run: Run) -> str:
    if run.files.record.exists():
        return f"`nexa-infra resume {run.id}` goes on with run {run.id}"
    return "nothing had been started"


def _show_report(run: Run) -> None:
    """Show a run's report, where it has one; a reader that has gone does not hide how the run ended."""
    from nexa_infra.monitoring.report import read_report, to_terminal

    found = read_report(run.files.report_json.read_bytes())
    with suppress(BrokenPipeError):
        sys.stdout.write(to_terminal(found))
        sys.stdout.flush()
