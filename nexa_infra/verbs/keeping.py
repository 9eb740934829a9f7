"""The verbs that end, slow down, remove and check: cancel, throttle, clean, doctor."""

from __future__ import annotations

import re
from typing import Annotated

from cyclopts import Parameter

from nexa_infra.errors import ConfigError, NexaError, Problem
from nexa_infra.verbs.common import Name, app, cluster_named, complain, find, flag, note, say


@app.command(sort_key=6)
def cancel(run: Name, /) -> None:
    """End a run: its trials get TERM, then KILL; their files stay."""
    from nexa_infra.operations import manage

    find(run)
    found = manage.cancel(run)
    say(f"Run {found.id} is cancelled. `nexa-infra resume {found.id}` would go on with it.")


@app.command(sort_key=7)
def throttle(
    run: Name,
    most: Annotated[str, Parameter(help="trials that may be at work at once, or off for no limit")],
    /,
) -> None:
    """Let more, or fewer, trials of a live run be at work at once; what runs already goes on."""
    from nexa_infra.operations import manage

    find(run)
    if most != "off" and not re.fullmatch(r"[0-9]{1,9}", most):
        raise ConfigError(Problem("N", f"{most!r} is no number of trials: write 1 or more, or off", file="throttle"))
    found = manage.throttle(run, None if most == "off" else int(most))
    told = "as many trials as there is room for" if most == "off" else f"{int(most):,} at once, at the most"
    say(f"Run {found.id}: {told}.")


@app.command(sort_key=13)
def clean(
    *,
    older: Annotated[str, Parameter(help="how long ago a run was last used, at least: 30d, 12h, 45m")] = "30d",
    cluster: Annotated[
        str | None, Parameter(name=["--cluster", "-c"], help="what lies on this cluster, instead of on this machine")
    ] = None,
    dry_run: Annotated[bool, flag("say what would be removed; remove nothing")] = False,
) -> None:
    """Remove old run directories, and the snapshots that only they used."""
    from nexa_infra.errors import HostError
    from nexa_infra.hosts.connections import host_of, kept_open
    from nexa_infra.operations import clean_text
    from nexa_infra.operations.clean import NotRemovedError, leftovers, remove
    from nexa_infra.operations.clean_cluster import leftovers_on, remove_on

    where = cluster_named(cluster)
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
                complain(error)
            else:
                removed.append(each)
                say(clean_text.line(each))
    for one in kept:
        note(clean_text.stays(one))
    say(clean_text.total(removed, dry_run=dry_run, place=where.name if where else ""))
    if failed:
        raise SystemExit(1)


@app.command(sort_key=14)
def doctor(
    cluster: Annotated[str | None, Parameter(help="a saved cluster, or a cluster file; unset, this machine")] = None, /
) -> None:
    """Look at this machine, or at a cluster: what is there, what is wrong, what to do."""
    from nexa_infra.operations import manage
    from nexa_infra.provisioning.doctor import check_cluster, check_here

    where = cluster_named(cluster)
    if where is None:
        checks = check_here(manage.home())
    else:
        from nexa_infra.hosts.connections import host_of

        checks = check_cluster(where, host_of(where))
    fine = True
    # Each as it comes: the last waits for a job.
    for check in checks:
        fine &= check.fine
        say(f"{'ok' if check.fine else 'NO':<3} {check.name:<{_WIDE}} {check.found}")
        if check.remedy:
            say(f"    {'':<{_WIDE}} -> {check.remedy}")
    if not fine:
        raise SystemExit(1)


# As the longest name of a check.
_WIDE = 10


def _seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    if not found:
        raise ConfigError(Problem("--older", f"{text!r} is no span of time: write 30d, 12h or 45m", file="clean"))
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[found[2]]
