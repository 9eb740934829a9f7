"""What trials print, while they run and after."""

from __future__ import annotations

import errno
import os
import secrets
import tarfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from nexa_infra.errors import NexaError, RunNotFoundError
from nexa_infra.hosts.base import Host, retried
from nexa_infra.hosts.connections import host_of, kept_open
from nexa_infra.monitoring.report_text import ranges
from nexa_infra.operations import steps
from nexa_infra.runs.attempts import ENDED_BADLY, read_states
from nexa_infra.runs.directory import RunDirectory
from nexa_infra.runs.log import LogReader, gap_line
from nexa_infra.runs.record import Run
from nexa_infra.runs.submissions import read_submissions

_LOOK_SECONDS = 0.2
# How long a run may take from its record to its array, before it counts as one that does not run.
_START_SECONDS = 60.0

# A log on another host, in its parts; $1 is the file, $2 the line for what is missing. The last part becomes the one
# before at any moment: it is opened first, so that nothing is left out.
_BEGINNING = r"""
nexa_beginning() {
  cat -- "$1" 2>/dev/null
  if [ -e "$1.before" ]; then
    [ -z "$(tail -c 1 -- "$1")" ] || echo
    printf '%s\n' "$2"
  fi
}
"""
_SHOW = f"""{_BEGINNING}
nexa_beginning "$1" "$2"
{{ {{ cat <&4; cat <&3; }} 3<"$1.last" 4<"$1.before"; }} 2>/dev/null || cat -- "$1.before" "$1.last" 2>/dev/null
true
"""
_FOLLOW = f"""{_BEGINNING}
[ -e "$1.before" ] || exec tail -q -c +1 -F -- "$1" "$1.last"
nexa_beginning "$1" "$2"
{{ cat <&4; [ "$1.last" -ef /dev/fd/3 ] || cat <&3; }} 3<"$1.last" 4<"$1.before" || cat -- "$1.before"
exec tail -c +1 -F -- "$1.last"
"""

# The logs of a run, packed; $1 is where its directory $2 is, the rest are spans of trials, such as `0-3 7`, or none for
# all of them. What grows meanwhile, for which tar ends with 1, is packed as it was.
_PACK = r"""
cd -- "$1" || exit 66
nexa_run=$2
shift 2
{
  [ $# -eq 0 ] || printf '%s\n' $*
  echo
  [ ! -f "$nexa_run/job.log" ] || printf '%s\n' "$nexa_run/job.log"
  find "$nexa_run/trials" -mindepth 2 -maxdepth 3 -type f -path '*/attempt-*' 2>/dev/null
} | awk '
  $0 == "" && !begun { begun = 1; next }
  !begun { ends = split($0, end, "-"); spans++; first[spans] = end[1] + 0; last[spans] = end[ends] + 0; next }
  /^[^\/]+\/job\.log$/ { print; next }
  !/^[^\/]+\/trials\/[0-9]+\/attempt-[0-9]+(\.(out|err)|\/rank-[0-9]+\.log)(\.before|\.last)?$/ { next }
  !spans { print; next }
  {
    split($0, part, "/"); trial = part[3] + 0; low = 1; high = spans
    while (low < high) { mid = int((low + high) / 2); if (last[mid] < trial) low = mid + 1; else high = mid }
    if (first[low] <= trial && trial <= last[low]) print
  }' | tar -czf - -T - || [ $? -eq 1 ]
"""
_WORD_BYTES = 100_000
_MOST_WORDS = 15


@dataclass(frozen=True)
class Log:
    """Which output is meant: a trial's, of one attempt or the last, or, without a trial, the array script's."""

    trial: int | None = None
    attempt: int | None = None
    stderr: bool = False


def tail(run: Run, log: Log, *, follow: bool) -> Iterator[bytes]:
    """Yield a log's bytes; with `follow`, until the trial, or the run, has ended.

    A trial that has not started yet is waited for. Without an attempt, a new one is gone on with.
    A log that has outgrown `job.log_limit` is its beginning, a line that says so, and its end.

    Raises:
        RunNotFoundError: the run has no such trial, or the trial no such attempt.
    """
    if run.mirror is not None:
        yield from _tail_there(run, log, follow=follow)
        return
    path, going = _look(run, log)
    looked = time.monotonic()
    cost = 0.0
    patience = _look_seconds(run)
    reader = LogReader(path, _gap(run))
    try:
        while True:
            yield from reader.new()
            if not (follow and going):
                return
            time.sleep(_LOOK_SECONDS)
            # A large run takes longer to look at: looking never takes more than a tenth of the time.
            if time.monotonic() - looked >= max(patience, 9 * cost):
                started = time.monotonic()
                newest, going = _look(run, log)
                looked = time.monotonic()
                cost = looked - started
                if newest != path:
                    yield from reader.new()
                    reader.close()
                    path, reader = newest, LogReader(newest, _gap(run))
    finally:
        reader.close()


def _tail_there(run: Run, log: Log, *, follow: bool) -> Iterator[bytes]:
    """Yield the bytes of a log on another host: as it is, or by a `tail -F` that goes on as long as more may come."""
    host = host_of(run.cluster)
    path, going = _look(run, log)
    words = (str(path), _gap(run).decode().rstrip())
    if not (follow and going):
        with closing(host.stream(["sh", "-c", _SHOW, "sh", *words])) as pieces:
            yield from filter(None, pieces)
        return
    looked = time.monotonic()
    with closing(host.stream(["sh", "-c", _FOLLOW, "sh", *words])) as pieces:
        for piece in pieces:
            yield piece
            if piece:
                continue
            if not going:
                return  # nothing came since it was seen to have ended
            if time.monotonic() - looked >= _look_seconds(run):
                newest, going = _look(run, log)
                looked = time.monotonic()
                if newest != path:
                    break
    yield from _tail_there(run, log, follow=follow)


def _gap(run: Run) -> bytes:
    return gap_line(run.config.job.log_limit)


def _look_seconds(run: Run) -> float:
    """Return how often it is asked whether more may come: a cluster no oftener than by its polls."""
    return run.cluster.poll_floor if run.cluster else _LOOK_SECONDS


def pack_logs(run: Run, target: str | Path, *, failed: bool = False, force: bool = False) -> Path:
    """Pack the logs of a run's trials, every attempt's, into one .tar.gz on this machine, and return where it is.

    In it is a folder of the run's id. `failed` takes only trials that ended badly; `force` takes the
    place of a file that is there. It is packed where it lies and comes as it is packed, so that it is
    never whole in memory; the file has its name once it is whole. Logs that still grow are packed as they are.

    Raises:
        OSError: the file is there already, or cannot be written.
        RunNotFoundError: there is nothing to pack.
        HostError: the cluster cannot be reached.
    """
    path = Path(target).expanduser().resolve()
    if path.exists() and not path.is_dir() and not force:
        raise FileExistsError(errno.EEXIST, "it is there already: name another, or replace it with --force", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(path.parent))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    with kept_open(run.cluster):
        words = _chosen(run) if failed else []
        argv = ["sh", "-c", _PACK, "sh", str(Path(run.directory).parent), Path(run.directory).name, *words]
        staged = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            retried(lambda: _bring(host_of(run.cluster), argv, staged))
            with tarfile.open(staged, "r|gz") as packed:
                if packed.next() is None:
                    whose = "its trials that ended badly have" if failed else "it has"
                    raise RunNotFoundError(f"there is nothing of run {run.id} to pack: {whose} no logs")
            staged.replace(path)
        finally:
            staged.unlink(missing_ok=True)
    return path


def _chosen(run: Run) -> list[str]:
    """Return the trials that ended badly, in words of a length that a command may have."""
    scheduler = steps.scheduler_of(run)
    scheduler.poll(run)
    states, _ = read_states(run.files, run.trials, scheduler.tasks(run))
    told = ranges(trial for trial, state in enumerate(states) if state in ENDED_BADLY)
    if not told:
        raise RunNotFoundError(f"no trial of run {run.id} ended badly: leave out --failed to pack the others' logs")
    words = textwrap.wrap(told.replace(",", " "), _WORD_BYTES)
    if len(words) > _MOST_WORDS:
        raise NexaError(f"too many trials of run {run.id} ended badly to name them: leave out --failed")
    return words


def _bring(host: Host, argv: Sequence[str], target: Path) -> None:
    """Write what a command prints into a file."""
    with target.open("wb") as stream, closing(host.stream(argv)) as pieces:
        os.fchmod(stream.fileno(), 0o600)
        for piece in pieces:
            stream.write(piece)


def silence(run: Run, log: Log) -> str:
    """Say why a log is empty."""
    if log.trial is None:
        return (
            f"the array script of run {run.id} has printed nothing, which is as it should be: "
            f"`nexa-infra logs {run.id} TRIAL` shows what a trial printed"
        )
    path, going = _look(run, log)
    started = host_of(run.cluster).run(["test", "-e", str(path)]).returncode == 0
    stream = "standard error" if log.stderr else "standard output"
    if started:
        return f"trial {log.trial} of run {run.id} has written nothing to its {stream}{' yet' if going else ''}"
    return f"trial {log.trial} of run {run.id} has not started{' yet: -f waits for it' if going else ''}"


def _look(run: Run, log: Log) -> tuple[Path, bool]:
    """Return the file that holds a log now, and whether more of it may come."""
    scheduler = steps.scheduler_of(run)
    active = scheduler.poll(run).active or about_to_start(run)
    files = RunDirectory(Path(run.directory))
    if log.trial is None:
        return files.log, active
    if not 0 <= log.trial < run.trials:
        raise RunNotFoundError(f"run {run.id} has trials 0 to {run.trials - 1}: there is no trial {log.trial}")
    states, attempts = read_states(run.files, run.trials, scheduler.tasks(run))
    tried = {each.number: each for each in attempts.get(log.trial, [])}
    if log.attempt is not None:
        if log.attempt not in tried:
            told = ", ".join(map(str, tried)) or "none yet"
            raise RunNotFoundError(f"trial {log.trial} of run {run.id} has no attempt {log.attempt}: it has {told}")
        going = active and tried[log.attempt].ended is None
    else:
        going = active and states[log.trial] in {"pending", "running"}
    number = log.attempt or max(tried, default=1)
    file = files.stderr if log.stderr else files.stdout
    return file(log.trial, number), going


def about_to_start(run: Run) -> bool:
    """Say whether a run is about to be submitted."""
    if run.files.refused.exists() or run.files.cancelled.exists() or read_submissions(run.files)[:1]:
        return False
    return (datetime.now(UTC) - run.created_at).total_seconds() < _START_SECONDS
