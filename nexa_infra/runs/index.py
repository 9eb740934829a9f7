"""Which runs exist, and where."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nexa_infra.errors import RunNotFoundError
from nexa_infra.runs.directory import RunDirectory
from nexa_infra.runs.record import Run, read_run
from nexa_infra.spec.fields import suggestion


@dataclass(frozen=True)
class Entry:
    """A run that is known here."""

    id: str
    directory: Path


def register(home: Path, run: Run) -> None:
    """Remember a run whose directory is not under `home`; the others are found where they are."""
    if run.files.path.parent == home / "runs":
        return
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    line = json.dumps({"id": run.id, "directory": run.directory}) + "\n"
    descriptor = os.open(home / "index.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def known_runs(home: Path) -> list[Entry]:
    """Return the runs that are known under `home`, newest first."""
    found = {entry.id: entry for entry in _listed(home)}
    try:
        with os.scandir(home / "runs") as entries:
            # A name that starts with a dot is a run that is being deleted.
            names = [entry.name for entry in entries if not entry.name.startswith(".")]
    except FileNotFoundError:
        names = []
    for name in names:
        directory = home / "runs" / name
        if _is_run(directory):
            found[name] = Entry(name, directory)
    return sorted(found.values(), key=lambda entry: entry.id, reverse=True)


def find_run(name: str, home: Path) -> Run:
    """Find a run by its id, a part of it that only one run has, `latest`, or its directory's path.

    Raises:
        RunNotFoundError: none, or several, answer to it.
        NexaError: its record cannot be read.
    """
    if "/" in name or name in {".", ".."}:
        return run_at(Path(name).expanduser())
    entries = known_runs(home)
    if not entries:
        raise RunNotFoundError(f"there are no runs under {home} yet: start one with `nexa-infra sweep FILE`")
    if name == "latest":
        return run_at(_newest(entries).directory)
    exact = [entry for entry in entries if entry.id == name]
    matching = exact or [entry for entry in entries if name in entry.id]
    if not matching:
        raise RunNotFoundError(
            f"no run under {home} is called {name!r}{suggestion(name, [entry.id for entry in entries])}: "
            f"the newest is {entries[0].id}; `nexa-infra status` lists them"
        )
    if len(matching) > 1:
        told = "".join(f"\n  {entry.id}" for entry in matching[:5])
        more = f"\n  … and {len(matching) - 5} more" if len(matching) > 5 else ""
        raise RunNotFoundError(f"{name!r} fits {len(matching)} runs: say which of{told}{more}")
    return run_at(matching[0].directory)


def _newest(entries: Sequence[Entry]) -> Entry:
    """Return the newest run: of those that were made in one second, whose ids do not tell, by their records."""
    second = len("20261128-093746")
    rivals = [entry for entry in entries if entry.id[:second] == entries[0].id[:second]]
    if len(rivals) == 1:
        return rivals[0]
    return max(rivals, key=lambda entry: RunDirectory(entry.directory).record.stat().st_mtime_ns)


def run_at(place: Path) -> Run:
    """Read the run in a directory; one that was moved or copied is where it is now, not where its record says.

    Raises:
        RunNotFoundError: it is no run directory.
        NexaError: its record cannot be read.
    """
    if not _is_run(place):
        raise RunNotFoundError(f"{place} is not a run directory: it has no run.json")
    run = read_run(place)
    here = place.resolve()
    if run.cluster is not None and run.cluster.host is not None:
        if str(here) != run.directory:
            return run.model_copy(update={"mirror": str(here)})
        # This is the cluster itself: its commands are here, too.
        return run.model_copy(update={"cluster": run.cluster.model_copy(update={"host": None})})
    return run if Path(run.directory).resolve() == here else run.model_copy(update={"directory": str(here)})


def _is_run(directory: Path) -> bool:
    return RunDirectory(directory).record.is_file()


def _listed(home: Path) -> Iterator[Entry]:
    try:
        lines = (home / "index.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            entry = json.loads(line)
            directory = Path(entry["directory"])
        except (ValueError, KeyError, TypeError):
            continue  # torn by a crash
        if _is_run(directory):
            yield Entry(str(entry["id"]), directory)
