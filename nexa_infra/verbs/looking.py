"""The verbs that look at runs: status, logs, report, fetch, compare."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from nexa_infra.errors import ConfigError, Problem
from nexa_infra.verbs.common import Name, app, complain, find, flag, note, say


@app.command(sort_key=4)
def status(run: Name | None = None, /) -> None:
    """Show how the newest runs stand, or one of them."""
    from nexa_infra.operations import manage
    from nexa_infra.operations.status_text import status_page, status_table

    if run is not None:
        say(status_page(manage.status(find(run))))
        return
    found = list(manage.recent())
    if not found:
        say(f"There are no runs under {manage.home()} yet: start one with `nexa-infra sweep FILE`.")
        return
    say(status_table(found))
    for each in found:
        if isinstance(each, tuple):
            complain(each[1])
    if (all_of_them := manage.count()) > len(found):
        note(f"These are the newest {len(found)} of {all_of_them:,} runs.")


@app.command(sort_key=5)
def logs(
    run: Name,
    trial: Annotated[int | None, Parameter(help="the trial's index; unset, the array script's own log")] = None,
    /,
    *,
    follow: Annotated[bool, flag("go on until the trial, or the run, ends", "--follow", "-f")] = False,
    stderr: Annotated[bool, flag("what the trial wrote to standard error")] = False,
    attempt: Annotated[int | None, Parameter(help="which attempt; unset, the last")] = None,
    pack: Annotated[
        Path | None, Parameter(name=["--pack", "-o"], help="write every trial's logs into this .tar.gz instead")
    ] = None,
    failed: Annotated[bool, flag("with --pack: only of trials that ended badly")] = False,
    force: Annotated[bool, flag("with --pack: in place of a file that is there")] = False,
) -> None:
    """Show what a trial printed, or what the array script did; or pack all of it."""
    from nexa_infra.operations.logs import Log, pack_logs, silence, tail

    if pack is not None:
        if trial is not None or follow or stderr or attempt is not None:
            raise ConfigError(Problem("", "--pack takes all: leave out TRIAL, -f, --stderr, --attempt", file="logs"))
        say(str(pack_logs(find(run), pack, failed=failed, force=force)))
        return
    if failed or force:
        raise ConfigError(Problem("", "--failed and --force are of --pack: name a file with it", file="logs"))
    if trial is None and (stderr or attempt is not None):
        raise ConfigError(Problem("", "--stderr and --attempt are of a trial: name one, such as 0", file="logs"))
    found, log = find(run), Log(trial, attempt, stderr)
    silent = True
    for piece in tail(found, log, follow=follow):
        silent = False
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
    if silent:
        note(silence(found, log))


@app.command(sort_key=10)
def report(run: Name = "latest", /, *, json: Annotated[bool, flag("as JSON, for programs")] = False) -> None:
    """Show what a run was to cost, did cost, and what the money bought."""
    from nexa_infra.monitoring.report import to_json, to_terminal
    from nexa_infra.operations import manage

    found = manage.report_of(find(run), tell=note)
    sys.stdout.write(to_json(found) if json else to_terminal(found))


@app.command(sort_key=11)
def fetch(
    run: Name,
    trials: Annotated[list[int] | None, Parameter(help="only these trials, by index", negative="")] = None,
    /,
    *,
    to: Annotated[Path | None, Parameter(help="another folder for it than this machine's copy of the run")] = None,
) -> None:
    """Copy what a run on a cluster has written to this machine."""
    from nexa_infra.operations.fetch import fetch as bring

    say(str(bring(find(run), to=to, trials=trials or ())))


@app.command(sort_key=12)
def compare(left: Name, right: Name, /) -> None:
    """Set two runs side by side, trials matched by their parameters."""
    from nexa_infra.operations.comparison import comparison_text

    say(comparison_text(find(left), find(right)))
