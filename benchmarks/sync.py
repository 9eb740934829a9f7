"""Bringing code to another host, beside bare `rsync -a` over ssh, on the test rig's own sshd."""

from __future__ import annotations

import os
import shlex
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.measure import BenchmarkError, Figure, Place, place, say
from deployments.environment import SetupError
from nexa_infra.errors import NexaError
from nexa_infra.hosts.connections import close_all, ssh_host
from nexa_infra.hosts.login import Login
from nexa_infra.operations.sync import sync_repository
from tests.rig.fixtures import why_not
from tests.rig.ssh import SshRig

FILES = 10_000
FOLDERS = 100
ROUNDS = 9


def sync() -> Iterator[Figure]:
    """Sync a git repository of 10,000 files, in turn with rsync: where nothing is yet, and where all of it is.

    Each is measured from nothing to done: its own login, and what it does to be sure. Imports are done
    before: a run syncs in a process that is there already.
    """
    if reason := why_not():
        raise BenchmarkError(f"no sshd to sync to: {reason}")
    with place() as here:
        say(f"making a repository of {FILES:,} files")
        _make_repository(here)
        try:
            here.folder.chmod(0o755)
            with SshRig(here.folder / "sshd") as rig:
                taken = [_round(rig, here, number) for number in range(ROUNDS + 1)][1:]
        except (SetupError, NexaError) as error:
            raise BenchmarkError(str(error)) from error
        finally:
            close_all()
    for name, limit, ours, theirs in (("cold", 1.15, 0, 1), ("unchanged", 1.2, 2, 3)):
        spent, beside = (statistics.median(each[which] for each in taken) for which in (ours, theirs))
        baseline = {"tool": "rsync -a -e ssh", "s": beside, "ours_s": spent}
        yield Figure(f"sync.{name}", spent / beside, "times rsync", limit=limit, baseline=baseline)


def _round(rig: SshRig, here: Place, number: int) -> tuple[float, float, float, float]:
    """Return what the engine and rsync take, cold and then again, each to a folder of its own."""
    there = here.folder / "there" / str(number)
    there.mkdir(parents=True)
    login = Login(rig.host, "root", rig.port, str(rig.key), str(rig.known_hosts))
    shell = shlex.join(rig.command()[:-1])

    def ours() -> None:
        sync_repository(str(there / "ours"), root=here.project, host=ssh_host(login))

    def theirs() -> None:
        here.run("rsync", "-a", "-e", shell, f"{here.project}/", f"root@{rig.host}:{there / 'theirs'}/")

    # Who goes first meets other caches: that is taken in turn.
    first, second = (ours, theirs) if number % 2 else (theirs, ours)
    seconds: dict[Callable[[], None], list[float]] = {ours: [], theirs: []}
    for each in (first, second, first, second):
        seconds[each].append(_seconds(each))
    _check(here, there)
    (our_cold, our_again), (their_cold, their_again) = seconds[ours], seconds[theirs]
    return our_cold, their_cold, our_again, their_again


def _seconds(action: Callable[[], None]) -> float:
    # What the one before has left to be written, or open, is not for this one.
    close_all()
    os.sync()
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def _check(here: Place, there: Path) -> None:
    (snapshot,) = (path for path in (there / "ours" / "snapshots").iterdir() if not path.name.startswith("."))
    here.run("diff", "-r", "--exclude=.git", here.project, snapshot)
    here.run("diff", "-r", here.project, there / "theirs")


def _make_repository(here: Place) -> None:
    for number in range(FILES):
        path = here.project / f"package_{number % FOLDERS:03}" / f"module_{number // FOLDERS:03}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"NUMBER = {number}\n" + "# one more line of a module of a middling size\n" * 40)
    # git's own files lie elsewhere, so that rsync has the same files to copy, and nothing that git packs meanwhile.
    here.run("git", "init", "--quiet", "--separate-git-dir", here.folder / "git")
    here.run("git", "add", "--all")
    identity = ("-c", "user.name=bench", "-c", "user.email=bench@example.org", "-c", "commit.gpgsign=false")
    here.run("git", *identity, "commit", "--quiet", "--message", "start")
