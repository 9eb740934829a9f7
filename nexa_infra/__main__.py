"""The verbs of a working day: python -m nexa_infra VERB."""

from __future__ import annotations

import io
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import cyclopts
from cyclopts import Parameter

from nexa_infra.errors import ConfigError, NexaError, Problem

if TYPE_CHECKING:
    from nexa_infra.runs.record import Run
    from nexa_infra.spec.cluster import Cluster


def _version() -> str:
    from importlib.metadata import version

    return version("nexa-infra")


app = cyclopts.App(
    name="nexa-infra",
    help=(
        "Sweeps and trainings, here or on Slurm: started, followed, and priced.\n\n"
        "A RUN is a run's id, a part of it that only one has, `latest`, or its directory."
    ),
    version=_version,
    version_flags=["--version"],
)

File = Annotated[Path, Parameter(help="the YAML file that says what to run")]
Name = Annotated[str, Parameter(help="an id, a part of one, `latest`, or a directory")]
Overrides = Annotated[
    list[str] | None, Parameter(name=["--set", "-s"], help="KEY.PATH=VALUE, in place of the file's", negative="")
]
Budget = Annotated[float | None, Parameter(name="--budget", help="refuse a run that may cost more than this, USD")]


Where = Annotated[
    str | None, Parameter(name=["--cluster", "-c"], help="a saved cluster's name, or a cluster file (.yaml)")
]


def _flag(text: str, *names: str) -> Parameter:
    return Parameter(name=list(names) or None, help=text, negative="", show_default=False)


Preview = Annotated[bool, _flag("show the trials, the cost and the script; start nothing")]


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

    _take(plan_sweep(file, cluster=_cluster(cluster), overrides=overrides or (), budget_usd=budget), preview)


@app.command(sort_key=2)
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

    where = _cluster(cluster)
    with kept_open(where):
        run = plan_training(file, distributed, cluster=where, overrides=overrides or (), budget_usd=budget)
        _take(run, preview)
        if fetch_to is not None and not preview:
            _say(str(bring(run, to=fetch_to)))


@app.command(sort_key=3)
def status(run: Name | None = None, /) -> None:
    """Show how the newest runs stand, or one of them."""
    from nexa_infra.operations import manage
    from nexa_infra.operations.status_text import status_page, status_table

    if run is not None:
        _say(status_page(manage.status(_find(run))))
        return
    found = list(manage.recent())
    if not found:
        _say(f"There are no runs under {manage.home()} yet: start one with `nexa-infra sweep FILE`.")
        return
    _say(status_table(found))
    for each in found:
        if isinstance(each, tuple):
            _complain(each[1])
    if (all_of_them := manage.count()) > len(found):
        _note(f"These are the newest {len(found)} of {all_of_them:,} runs.")


@app.command(sort_key=4)
def logs(
    run: Name,
    trial: Annotated[int | None, Parameter(help="the trial's index; unset, the array script's own log")] = None,
    /,
    *,
    follow: Annotated[bool, _flag("go on until the trial, or the run, ends", "--follow", "-f")] = False,
    stderr: Annotated[bool, _flag("what the trial wrote to standard error")] = False,
    attempt: Annotated[int | None, Parameter(help="which attempt; unset, the last")] = None,
) -> None:
    """Show what a trial printed, or what the array script did."""
    from nexa_infra.operations.logs import Log, silence, tail

    if trial is None and (stderr or attempt is not None):
        raise ConfigError(Problem("", "--stderr and --attempt are of a trial: name one, such as 0", file="logs"))
    found, log = _find(run), Log(trial, attempt, stderr)
    silent = True
    for piece in tail(found, log, follow=follow):
        silent = False
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
    if silent:
        _note(silence(found, log))


@app.command(sort_key=5)
def cancel(run: Name, /) -> None:
    """End a run: its trials get TERM, then KILL; their files stay."""
    from nexa_infra.operations import manage

    _find(run)
    found = manage.cancel(run)
    _say(f"Run {found.id} is cancelled. `nexa-infra resume {found.id}` would go on with it.")


@app.command(sort_key=6)
def resume(run: Name, /) -> None:
    """Run what is unfinished: interrupted, cancelled, or never started."""
    from nexa_infra.operations import manage

    _find(run)
    _follow(manage.prepare_resume(run))


@app.command(sort_key=7)
def retry(run: Name, /) -> None:
    """Run the failed trials of a run again, and only those."""
    from nexa_infra.operations import manage

    _find(run)
    _follow(manage.prepare_retry(run))


@app.command(sort_key=8)
def report(run: Name = "latest", /, *, json: Annotated[bool, _flag("as JSON, for programs")] = False) -> None:
    """Show what a run was to cost, did cost, and what the money bought."""
    from nexa_infra.monitoring.report import to_json, to_terminal
    from nexa_infra.operations import manage

    found = manage.report_of(_find(run), tell=_note)
    sys.stdout.write(to_json(found) if json else to_terminal(found))


@app.command(sort_key=9)
def fetch(
    run: Name,
    trials: Annotated[list[int] | None, Parameter(help="only these trials, by index", negative="")] = None,
    /,
    *,
    to: Annotated[Path | None, Parameter(help="another folder for it than this machine's copy of the run")] = None,
) -> None:
    """Copy what a run on a cluster has written to this machine."""
    from nexa_infra.operations.fetch import fetch as bring

    _say(str(bring(_find(run), to=to, trials=trials or ())))


@app.command(sort_key=10)
def compare(left: Name, right: Name, /) -> None:
    """Set two runs side by side, trials matched by their parameters."""
    from nexa_infra.operations.comparison import comparison_text

    _say(comparison_text(_find(left), _find(right)))


@app.command(sort_key=11)
def clean(
    *,
    older: Annotated[str, Parameter(help="how long ago a run was last used, at least: 30d, 12h, 45m")] = "30d",
    cluster: Annotated[
        str | None, Parameter(name=["--cluster", "-c"], help="what lies on this cluster, instead of on this machine")
    ] = None,
    dry_run: Annotated[bool, _flag("say what would be removed; remove nothing")] = False,
) -> None:
    """Remove old run directories, and the snapshots that only they used."""
    from nexa_infra.errors import HostError
    from nexa_infra.hosts.connections import host_of, kept_open
    from nexa_infra.operations import clean_text
    from nexa_infra.operations.clean import NotRemovedError, leftovers, remove
    from nexa_infra.operations.clean_cluster import leftovers_on, remove_on

    where = _cluster(cluster)
    removed, failed = [], False
    with kept_open(where):
        host = host_of(where)
        gone, kept = leftovers(_seconds(older)) if where is None else leftovers_on(where, host, _seconds(older))
        for each in gone:
            try:
                if not dry_run:
                    remove(each) if where is None else remove_on(host, where, each)
            except (NexaError, OSError) as error:
                if where is not None and isinstance(error, HostError):
                    raise  # the others would fail as slowly, one by one
                failed = failed or isinstance(error, (OSError, NotRemovedError))
                _complain(error)
            else:
                removed.append(each)
                _say(clean_text.line(each))
    for one in kept:
        _note(clean_text.stays(one))
    _say(clean_text.total(removed, dry_run=dry_run, place=where.name if where else ""))
    if failed:
        raise SystemExit(1)


@app.command(sort_key=12)
def doctor(
    cluster: Annotated[str | None, Parameter(help="a saved cluster, or a cluster file; unset, this machine")] = None, /
) -> None:
    """Look at this machine, or at a cluster: what is there, what is wrong, what to do."""
    from nexa_infra.operations import manage
    from nexa_infra.provisioning.doctor import check_cluster, check_here

    where = _cluster(cluster)
    if where is None:
        checks = list(check_here(manage.home()))
    else:
        from nexa_infra.hosts.connections import host_of

        checks = list(check_cluster(where, host_of(where)))
    wide = max(len(check.name) for check in checks)
    for check in checks:
        _say(f"{'ok' if check.fine else 'NO':<3} {check.name:<{wide}} {check.found}")
        if check.remedy:
            _say(f"    {'':<{wide}} -> {check.remedy}")
    if not all(check.fine for check in checks):
        raise SystemExit(1)


def main(argv: list[str] | None = None) -> NoReturn:
    """Run a verb; an error is one message on standard error, and its kind's exit code.

    0 is done, 1 failed, 2 not understood, 3 refused for its budget, 130 Ctrl-C, 143 SIGTERM.
    """
    _mend_streams()
    code = 0
    try:
        try:
            app(argv, exit_on_error=False, print_error=False)
        finally:
            sys.stdout.flush()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    except cyclopts.CycloptsError as error:
        _note(f"{error}\nSee `nexa-infra {' '.join((*(error.command_chain or ()), '--help'))}`.")
        code = 2
    except BrokenPipeError:
        # The reader has gone, as `head` does. What is left goes nowhere, at the interpreter's end too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 141
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        told = _complain(error)
        if told is None:
            raise
        code = told
    raise SystemExit(code)


def _cluster(name: str | None) -> Cluster | None:
    """Find a cluster: in a file, or among Prefect's saved blocks."""
    if name is None:
        return None
    if name.endswith((".yaml", ".yml")) or ("/" in name and not name.startswith("slurm-cluster/")):
        from nexa_infra.spec.load import load_cluster

        return load_cluster(name)
    from nexa_infra.blocks.saved import saved_cluster

    return saved_cluster(name)


def _take(run: Run, preview: bool) -> None:
    """Take a planned run to its end, or only show it."""
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
    _note(f"run {run.id}: {counted(run.trials, 'trial')}, {cost}{where}")
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
            _note(f"cancelled: nothing of it is left running here; {_go_on(run)}")
            raise SystemExit(130) from None
        if isinstance(error, SystemExit):
            left = "" if run.cluster is None else ": its jobs go on"
            _note(f"ended by SIGTERM{left}; {_go_on(run)}")
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
    from nexa_infra.monitoring.report import CostReport, to_terminal

    found = CostReport.model_validate_json(run.files.report_json.read_bytes())
    with suppress(BrokenPipeError):
        sys.stdout.write(to_terminal(found))
        sys.stdout.flush()


def _find(name: str) -> Run:
    """Find a run; where the key to its cluster is locked, its saved block may hold what opens it."""
    from nexa_infra.operations import manage

    run = manage.find(name)
    if run.cluster is not None and run.cluster.host is not None and run.cluster.key_file is not None:
        from nexa_infra.hosts.login import is_locked

        if is_locked(run.cluster.key_file):
            from nexa_infra.blocks.saved import saved_cluster

            with suppress(NexaError):  # an agent may have the key all the same
                saved_cluster(run.cluster.name)
    return run


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _note(text: str) -> None:
    with suppress(OSError):  # nobody is there to be told
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


def _complain(error: Exception) -> int | None:
    """Tell of an error that a person can cause, and return its exit code; None for any other, a fault of ours."""
    from nexa_infra.operations.failures import failure

    told = failure(error)
    if told is None:
        return None
    _note(told[0])
    return told[1]


def _mend_streams() -> None:
    """Make sure that what is said can be written: streams may be closed, and an encoding may lack characters."""
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    if not found:
        raise ConfigError(Problem("--older", f"{text!r} is no span of time: write 30d, 12h or 45m", file="clean"))
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[found[2]]


if __name__ == "__main__":
    main()
