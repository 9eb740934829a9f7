"""The verbs of a working day: python -m nexa_infra VERB."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import cyclopts
from cyclopts import Parameter

from nexa_infra.errors import ConfigError, NexaError, Problem

if TYPE_CHECKING:
    from nexa_infra.runs.record import Run

app = cyclopts.App(
    name="nexa-infra",
    help="Sweeps and training runs, here or on Slurm: started, followed, and what they cost.",
    version_flags=["--version"],
)

Overrides = Annotated[
    list[str] | None, Parameter(name=["--set", "-s"], help="key.path=value, in place of the file's", negative="")
]
Budget = Annotated[float | None, Parameter(name="--budget", help="refuse a run that is projected to cost more, USD")]
Preview = Annotated[bool, Parameter(name="--preview", help="show script, trials and cost; start nothing", negative="")]


@app.command
def sweep(file: Path, *, preview: Preview = False, overrides: Overrides = None, budget: Budget = None) -> None:
    """Run every trial of a sweep, on this machine, and end with its cost report.

    Parameters
    ----------
    file
        The sweep's YAML file.
    """
    from nexa_infra.operations.launch import launch_slurm_sweep
    from nexa_infra.operations.progress import terminal_line
    from nexa_infra.scheduling.slurm import preview_markdown

    if preview:
        sys.stdout.write(preview_markdown(launch_slurm_sweep(file, overrides=overrides or (), budget_usd=budget)))
        return
    with terminal_line() as tell:
        made = launch_slurm_sweep(file, submit=True, overrides=overrides or (), budget_usd=budget, tell=tell)
    _show_report(made.run_id)


@app.command
def train(
    file: Path,
    *,
    distributed: Annotated[bool, Parameter(help="start it by torchrun, one process a GPU", negative="")] = False,
    overrides: Overrides = None,
    budget: Budget = None,
) -> None:
    """Run one training, on this machine, and end with its cost report.

    Parameters
    ----------
    file
        The training's YAML file.
    """
    from nexa_infra.operations.launch import launch_training_job
    from nexa_infra.operations.progress import terminal_line

    with terminal_line() as tell:
        launch_training_job(file, distributed, overrides=overrides or (), budget_usd=budget, tell=tell)
    _show_report("latest")


@app.command
def status(run: str | None = None) -> None:
    """Show how the newest runs stand, or one of them.

    Parameters
    ----------
    run
        A run's id, a part of it, `latest`, or its directory.
    """
    from nexa_infra.operations import manage

    found = [manage.status(manage.find(run))] if run else list(manage.recent())
    if not found:
        _say(f"There are no runs under {manage.home()} yet: start one with `nexa-infra sweep FILE`.")
    for each in found:
        told = ", ".join(f"{count:,} {state}" for state, count in sorted(each.states.items()))
        _say(f"{each.run.id}  {each.end:<10}  {told}")
    if run:
        _say(f"directory   {found[0].run.directory}")


@app.command
def logs(
    run: str,
    trial: int | None = None,
    *,
    follow: Annotated[bool, Parameter(name=["--follow", "-f"], help="go on until the trial ends", negative="")] = False,
    stderr: Annotated[bool, Parameter(help="what it wrote to standard error", negative="")] = False,
    attempt: Annotated[int | None, Parameter(help="which attempt; unset, the last")] = None,
) -> None:
    """Show what a trial printed; without a trial, what the array script itself said.

    Parameters
    ----------
    run
        A run's id, a part of it, `latest`, or its directory.
    trial
        The trial's index.
    """
    from nexa_infra.operations.logs import log_path, tail

    found = _find(run)
    path = log_path(found, trial, attempt=attempt, stderr=stderr)
    for piece in tail(found, path, trial, follow=follow):
        sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()


@app.command
def cancel(run: str) -> None:
    """End a run: its trials get TERM, then KILL; what they wrote stays.

    Parameters
    ----------
    run
        A run's id, a part of it, `latest`, or its directory.
    """
    from nexa_infra.operations import manage

    found = manage.cancel(run)
    _say(f"Run {found.id} is cancelled. `nexa-infra resume {found.id}` would go on with it.")


@app.command
def resume(run: str) -> None:
    """Run what is unfinished of a run: what was interrupted, cancelled, or never started.

    Parameters
    ----------
    run
        A run's id, a part of it, `latest`, or its directory.
    """
    from nexa_infra.operations import manage
    from nexa_infra.operations.launch import follow_run
    from nexa_infra.operations.progress import terminal_line

    found = manage.prepare_resume(run)
    with terminal_line() as tell:
        follow_run(found, tell=tell)
    _show_report(found.id)


@app.command
def retry(run: str) -> None:
    """Run the failed trials of a run again, and only those.

    Parameters
    ----------
    run
        A run's id, a part of it, `latest`, or its directory.
    """
    from nexa_infra.operations import manage
    from nexa_infra.operations.launch import follow_run
    from nexa_infra.operations.progress import terminal_line

    found = manage.prepare_retry(run)
    with terminal_line() as tell:
        follow_run(found, tell=tell)
    _show_report(found.id)


@app.command
def report(
    run: str = "latest", *, json: Annotated[bool, Parameter(help="as JSON, for programs", negative="")] = False
) -> None:
    """Show what a run was going to cost, did cost, and what the money bought.

    Parameters
    ----------
    run
        A run's id, a part of it, `latest`, or its directory.
    """
    _show_report(run, json=json)


@app.command
def compare(left: str, right: str) -> None:
    """Set two runs side by side, trial by trial, matched by their parameters.

    Parameters
    ----------
    left
        A run's id, a part of it, `latest`, or its directory.
    right
        The other run.
    """
    from nexa_infra.operations.comparison import comparison_text

    _say(comparison_text(_find(left), _find(right)))


@app.command
def clean(
    *,
    older: Annotated[str, Parameter(help="how long ago a run must have ended: 30d, 12h, 45m")] = "30d",
    dry_run: Annotated[bool, Parameter(help="say what would be removed; remove nothing", negative="")] = False,
) -> None:
    """Remove old run directories, and the snapshots that only they used."""
    from nexa_infra.operations import manage

    found = manage.leftovers(_seconds(older))
    total = sum(each.size for each in found)
    for each in found:
        _say(
            f"{'would remove' if dry_run else 'removed'} {each.path}  {each.size / 2**20:,.1f} MiB  {each.files:,} files"
        )
        if not dry_run:
            manage.remove(each)
    files = sum(each.files for each in found)
    _say(f"{len(found)} {'to remove' if dry_run else 'removed'}: {total / 2**30:.3f} GiB, {files:,} inodes")


@app.command
def doctor() -> None:
    """Look at this machine: what is there, what is wrong with it, and what to do."""
    from nexa_infra.operations import manage
    from nexa_infra.provisioning.doctor import check_here

    checks = list(check_here(manage.home()))
    for check in checks:
        _say(f"{'ok' if check.fine else 'NO':<3} {check.name:<8} {check.found}")
        if check.remedy:
            _say(f"    {'':<8} -> {check.remedy}")
    if not all(check.fine for check in checks):
        raise SystemExit(1)


def main(argv: list[str] | None = None) -> NoReturn:
    """Run a verb; an error is one sentence on standard error, and its kind's exit code."""
    try:
        app(argv, exit_on_error=False, print_error=True)
    except cyclopts.CycloptsError:
        code = 2
    except NexaError as error:
        sys.stderr.write(f"{error}\n")
        code = error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("cancelled: nothing of it is left running here\n")
        code = 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone: nothing more can be told
        code = 141
    else:
        code = 0
    raise SystemExit(code)


def _find(name: str) -> Run:
    from nexa_infra.operations import manage

    return manage.find(name)


def _show_report(name: str, *, json: bool = False) -> None:
    from nexa_infra.monitoring.report import to_json, to_terminal
    from nexa_infra.operations.launch import write_report

    found = _find(name)
    made = write_report(found)
    sys.stdout.write(to_json(made) if json else to_terminal(made))


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    if not found:
        raise ConfigError(Problem("--older", f"{text!r} is no span of time: write 30d, 12h or 45m", file="clean"))
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[found[2]]


if __name__ == "__main__":
    main()
