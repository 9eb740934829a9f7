"""What old runs have left on disk, and its removal: run directories, snapshots, and the remains of crashes."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator, Set
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from nexa_infra.errors import HostError, NexaError, RunNotFoundError
from nexa_infra.operations import steps
from nexa_infra.operations.clean_images import (
    CONTAINERS,
    IMAGES,
    is_heard,
    left_containers,
    left_folders,
    left_images,
    remove_container,
    remove_image,
)
from nexa_infra.operations.failures import failure
from nexa_infra.operations.manage import home
from nexa_infra.operations.sync import snapshots_locked
from nexa_infra.runs.directory import RunDirectory
from nexa_infra.runs.index import known_runs, run_at
from nexa_infra.runs.record import Run
from nexa_infra.runs.submissions import read_submissions

# What was used this short a time ago may belong to a run that is just being made, whatever a person asks for.
GRACE_SECONDS = 300.0

_DOOMED = ".deleting-"
_STAGED = ".staging-"
_SNAPSHOT = re.compile(r"[0-9a-f]{16}")

Kind = Literal["run", "snapshot", "remains", "container", "image"]


@dataclass(frozen=True)
class Leftover:
    """Something that `clean` may remove: a run directory, a snapshot or image that no run uses, or what a crash left.

    A file that snapshots share counts for a part in each of them, so that the sum over all is what they hold.
    """

    kind: Kind
    path: Path  # a container's is its name
    size: int  # bytes
    files: int  # inodes
    used: float  # when it was last used, seconds since the epoch


@dataclass(frozen=True)
class Staying:
    """An old run that stays, and why."""

    path: Path
    reason: str


class NotRemovedError(NexaError):
    """Some of what was to go could not be deleted: it is no run any more, and is still there."""


def leftovers(older: float) -> tuple[list[Leftover], list[Staying]]:
    """Return what was last used more than `older` seconds ago, oldest first, and the runs that stay all the same.

    Only what lies in the local default's own `runs/` and `snapshots/` is looked at, and a link is not followed.
    """
    base = home()
    limit = time.time() - older
    gone: list[Leftover] = []
    stays: list[Staying] = []
    silent: dict[str, str] = {}  # a cluster that does not answer is asked once
    for path in _folders(base / "runs"):
        if path.name.startswith(_DOOMED) or _half_made(path):
            gone.extend(_remains(path, limit))
        elif not path.name.startswith(".") and RunDirectory(path).record.exists():
            asked = None
            try:
                run = run_at(path)
                used = last_used(run)
                if used >= limit:
                    continue
                asked = run.cluster.name if run.cluster else None
                if asked in silent:
                    stays.append(Staying(path, silent[asked]))
                elif not _in_use(run):
                    gone.append(_measured("run", path, used))
            except (NexaError, OSError, ValidationError) as error:
                reason = told[0] if (told := failure(error)) else str(error)
                stays.append(Staying(path, reason))
                if asked is not None and isinstance(error, HostError):
                    silent[asked] = reason
    stays.extend(_elsewhere(base, limit))
    kept = _used_snapshots(base, except_for={each.path for each in gone})
    for path in _folders(base / "snapshots"):
        if path.name.startswith((_DOOMED, _STAGED)):
            gone.extend(_remains(path, limit))
        elif _SNAPSHOT.fullmatch(path.name) and path.resolve() not in kept:
            used = path.stat().st_mtime
            if used < min(limit, time.time() - GRACE_SECONDS):
                gone.append(_measured("snapshot", path, used))
    for name, made in left_containers(_in_use):
        gone.append(Leftover("container", Path(name), 0, 0, made))
    gone.extend(_measured("run", path, used) for path, used in left_folders(base, older))
    for path in _folders(base / CONTAINERS):
        if path.name.startswith(_DOOMED):
            gone.extend(_remains(path, limit))
    sifs = list(left_images(base, older, except_for={each.path for each in gone}))
    gone.extend(Leftover("image", each.path, each.size, each.files, each.used) for each in sifs)
    # Runs go first: a snapshot or an image stays as long as a run that uses it.
    return sorted(gone, key=lambda each: (each.kind in {"snapshot", "image"}, each.used)), stays


def remove(leftover: Leftover) -> None:
    """Delete a run directory, a snapshot or what a crash left, unless it is in use again.

    Raises:
        NexaError: it is in use, or is none of these; it stays.
    """
    path = leftover.path
    if leftover.kind == "container":
        remove_container(str(path))
        return
    if leftover.kind == "image" and path.parent == home() / IMAGES:
        remove_image(path)
        return
    if path.is_symlink() or path.parent not in {home() / name for name in ("runs", "snapshots", CONTAINERS)}:
        raise NexaError(f"{path} is not in this home's runs/ or snapshots/: it stays")
    if path.parent.name == CONTAINERS and is_heard(path):
        raise NexaError(f"the container of {path} runs: it stays")
    # First out of sight, so that half a run is never taken for a whole one.
    doomed = path if path.name.startswith(_DOOMED) else path.with_name(_DOOMED + path.name)
    if leftover.kind == "run" and path.parent.name == CONTAINERS:
        path.rename(doomed)
    elif leftover.kind == "run":
        _hide_run(path, doomed)
    elif leftover.kind == "snapshot":
        _hide_snapshot(path, doomed)
    elif doomed != path:
        path.rename(doomed)
        (path.parent / ".verified" / path.name.removeprefix(_STAGED)).unlink(missing_ok=True)
    _delete(doomed)


def last_used(run: Run) -> float:
    """Return when a run was last submitted or reported, seconds since the epoch."""
    moments = [run.created_at, *(submission.created_at for submission in read_submissions(run.files))]
    last: datetime = max(moments)
    report = run.files.report_json
    return max(last.timestamp(), report.stat().st_mtime if report.exists() else 0.0)


def _in_use(run: Run) -> bool:
    """Say whether a run goes on, or is just being made: it has a record, and is about to be submitted."""
    try:
        if steps.scheduler_of(run).poll(run).active:
            return True
    except RunNotFoundError:
        if run.mirror is None:
            raise
        # What was removed on its cluster does not run: this is all that is left of it.
    if run.files.refused.exists() or read_submissions(run.files):
        return False
    return run.created_at.timestamp() > time.time() - GRACE_SECONDS


def _hide_run(path: Path, doomed: Path) -> None:
    run = run_at(path)
    # Whoever submits holds this lock: a run is not resumed while it goes, and does not go while it is resumed.
    with (run.files.submissions / "lock").open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise NexaError(f"run {run.id} is being submitted: it stays") from None
        if _in_use(run):
            raise NexaError(f"run {run.id} is running again: it stays")
        path.rename(doomed)


def _hide_snapshot(path: Path, doomed: Path) -> None:
    with snapshots_locked(path.parent):
        if path.stat().st_mtime > time.time() - GRACE_SECONDS or path.resolve() in _used_snapshots(home()):
            raise NexaError(f"snapshot {path.name} is in use again: it stays")
        path.rename(doomed)
        (path.parent / ".verified" / path.name).unlink(missing_ok=True)


def _folders(folder: Path) -> Iterator[Path]:
    """Yield the folders in a folder, but no links to folders."""
    if folder.is_dir():
        with os.scandir(folder) as entries:
            yield from (Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))


def _half_made(path: Path) -> bool:
    """Say whether a client ended while it made this run's directory: nothing was submitted yet."""
    files = RunDirectory(path)
    if path.name.startswith(".") or files.record.exists() or not files.submissions.is_dir():
        return False
    return not any(folder.is_dir() and any(folder.iterdir()) for folder in (files.submissions, files.trials))


def _elsewhere(base: Path, limit: float) -> Iterator[Staying]:
    """Yield the old runs that lie outside of `runs/`, or are reached by a link: a person chose their places."""
    for entry in known_runs(base):
        if entry.directory.parent == base / "runs" and not entry.directory.is_symlink():
            continue
        record = RunDirectory(entry.directory).record
        if record.exists() and record.stat().st_mtime < limit:
            yield Staying(entry.directory, f"it lies outside of {base / 'runs'}: remove it by hand")


def _used_snapshots(base: Path, *, except_for: Set[Path] = frozenset()) -> set[Path]:
    """Return the snapshots that runs use, those that are just being made and those that lie elsewhere included."""
    places = {*_folders(base / "runs"), *(entry.directory for entry in known_runs(base))} - except_for
    return {(place / "code").resolve() for place in places if (place / "code").is_symlink()}


def _remains(path: Path, limit: float) -> Iterator[Leftover]:
    found = _measured("remains", path, 0.0)
    if found.used < min(limit, time.time() - GRACE_SECONDS):
        yield found


def _measured(kind: Kind, path: Path, used: float) -> Leftover:
    """Measure a folder; where `used` is 0, it was last used when anything in it was last changed."""
    size, files, newest = 0.0, 1.0, path.lstat().st_ctime
    for folder, folders, names in os.walk(path):
        for name in (*folders, *names):
            try:
                found = os.lstat(f"{folder}/{name}")
            except FileNotFoundError:
                continue
            part = 1.0 if stat.S_ISDIR(found.st_mode) else 1 / found.st_nlink
            size, files, newest = size + found.st_size * part, files + part, max(newest, found.st_ctime)
    return Leftover(kind, path, round(size), round(files), used or newest)


def _delete(path: Path) -> None:
    """Delete a folder of ours, also where a trial or the code has made a folder in it read-only."""
    for folder, _, _ in os.walk(path):
        if os.lstat(folder).st_mode & stat.S_IRWXU != stat.S_IRWXU:
            os.chmod(folder, stat.S_IRWXU)  # noqa: PTH101
    shutil.rmtree(path)
