"""A client's copy of a run directory that is on another host: made there from here, and kept up here from there."""

from __future__ import annotations

import base64
import fcntl
import io
import os
import re
import secrets
import tarfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from nexa_infra.errors import HostError, SubmitError
from nexa_infra.hosts.framing import write_file
from nexa_infra.hosts.shell import quote
from nexa_infra.runs.directory import write_atomically
from nexa_infra.runs.series import MOST_LOG
from nexa_infra.scheduling.slurm.brought import newer

if TYPE_CHECKING:
    from nexa_infra.runs.record import Run

TAIL_BYTES = 8192
# What a poll brings of a training's metrics, and what one question does at its end, bytes.
PIECE_BYTES = 2 * 2**20
LAST_BYTES = 16 * 2**20

_LOG = "trials/0/metrics.jsonl"
_MARK = "==nexa files=="
_NAMES = re.compile(r"(?:submissions|steward)/\w[\w.-]*")
_RANK_FILE = re.compile(r"node-\d+|rank-\d+\.log")


def push_script(run: Run) -> str:
    """Return a script that makes the run directory from the client's copy, whole or not at all."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as archive:
        archive.add(run.files.path, arcname=".", filter=_as_made)
    parent, name = str(Path(run.directory).parent), Path(run.directory).name
    staged = f".staging-{secrets.token_hex(8)}"
    workdir = quote(run.workdir)
    return f"""
umask 077
mkdir -p -- {workdir} {quote(parent)} || exit 73
[ -e {workdir}/.gitignore ] || printf '*\\n' >{workdir}/.gitignore
cd -- {quote(parent)} && mkdir -- {staged} || exit 73
if base64 -d <<'NEXA_FILES' | tar -xzf - -C {staged} && chmod 700 -- {staged} && mv -T -- {staged} {quote(name)}
{base64.encodebytes(packed.getvalue()).decode()}NEXA_FILES
then exit 0; fi
rm -rf -- {staged}
[ -e {quote(name)}/run.json ] || exit 74
"""


def _as_made(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Leave out what belongs to this client alone."""
    if Path(member.name).name in {"lock", "tails"}:
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def changed_records(since: float | None) -> str:
    """Return shell that packs what tells of submissions, and has changed since a moment there, in epoch seconds."""
    return (
        f"printf '%s\\n' {quote(_MARK)}\n"
        f"find submissions steward -type f ! -name '.*' ! -name lock ! -name '*.pyz' {newer(since)}-print0 2>/dev/null"
        " | tar -czf - --null -T - 2>/dev/null\ntrue\n"
    )


def log_piece(held: int, most: int) -> str:
    """Return shell that prints how long a training's metrics log is, and what of it a copy of `held` bytes lacks.

    It prints at most `most` bytes of it, packed; of a log that is too long, nothing more.
    """
    size = min(most, MOST_LOG - held)
    if size <= 0:
        return "true"
    return (
        f"if [ -f {_LOG} ]; then wc -c <{_LOG} 2>/dev/null; "
        f"tail -c +{held + 1} -- {_LOG} 2>/dev/null | head -c {size} | gzip -1c | base64 -w0; fi"
    )


def keep_log(run: Run, held: int, told: str) -> bool:
    """Add what `log_piece` has printed to a copy that held `held` bytes; say whether there is more to come.

    What another client of this machine has brought meanwhile is never added twice.
    """
    size, _, packed = told.partition("\n")
    if not size.strip().isdigit():
        return False
    copy = run.files.metrics_log(0)
    if int(size) < held:
        copy.unlink(missing_ok=True)  # it was begun anew
        return True
    try:
        data = zlib.decompressobj(wbits=31).decompress(base64.b64decode(packed), MOST_LOG)
    except (ValueError, zlib.error) as error:
        raise HostError(f"the metrics of run {run.id} did not come whole: {error}") from error
    if not data:
        return False
    copy.parent.mkdir(parents=True, exist_ok=True)
    with copy.open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        if stream.seek(0, os.SEEK_END) == held:
            stream.write(data)
    return held + len(data) < min(int(size), MOST_LOG)


def held_of(run: Run) -> int:
    """Return how much of a training's metrics log this client's copy has, bytes."""
    try:
        return run.files.metrics_log(0).stat().st_size
    except FileNotFoundError:
        return 0


def unpack(run: Run, stdout: str) -> str:
    """Put the files of an answer into the client's copy; return what came before them."""
    before, mark, packed = stdout.partition(f"{_MARK}\n")
    if not mark:
        raise HostError(f"the answer about run {run.id} lacks its files")
    data = packed.encode("utf-8", "surrogateescape")
    if not data:
        return before
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
            for member in archive:
                content = archive.extractfile(member) if member.isfile() else None
                if content is not None and _NAMES.fullmatch(member.name):
                    _put(run.files.path / member.name, content.read())
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise HostError(f"the files of run {run.id} did not come whole: {error}") from error
    return before


def _put(path: Path, content: bytes) -> None:
    """Write a file under a name of its own, and rename it; what is here already is left as it is."""
    with suppress(FileNotFoundError):
        if path.read_bytes() == content:
            return
    path.parent.mkdir(exist_ok=True)
    staged = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    staged.write_bytes(content)
    staged.replace(path)


def words_script(run: Run, failed: Sequence[tuple[int, int]]) -> str:
    """Return a script that prints the ends of some attempts' standard error, in order."""
    lines = [f"cd -- {quote(run.directory)} || exit 66"]
    for trial, attempt in failed:
        lines.append(f"{_end_of(f'trials/{trial}/attempt-{attempt}.err')} | base64 -w0; echo")
    return "\n".join(lines)


def _end_of(log: str) -> str:
    """Return shell that prints the end of a log, whatever parts it is in; see `runs.log`."""
    parts = (log, f"{log}.before", f"{log}.last")
    ends = "".join(f"tail -c {TAIL_BYTES} -- {part} 2>/dev/null; " for part in parts)
    return f"{{ {ends}}} | tail -c {TAIL_BYTES}"


def keep_words(run: Run, failed: Sequence[tuple[int, int]], stdout: str) -> None:
    """Keep what `words_script` has printed."""
    for (trial, attempt), line in zip(failed, stdout.split("\n")):
        path = run.files.tail(trial, attempt)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, base64.b64decode(line).decode("utf-8", "replace"))


def records_script(run: Run, failed: Sequence[tuple[int, int]]) -> str:
    """Return a script that prints what the nodes of some gangs recorded: `TRIAL ATTEMPT NODE BASE64` a line."""
    lines = [f"cd -- {quote(run.directory)} || exit 66"]
    for trial, attempt in failed:
        lines.append(
            f"for nexa_file in trials/{trial}/attempt-{attempt}/node-*; do\n"
            f'  [ -f "$nexa_file" ] && printf "{trial} {attempt} ${{nexa_file##*/}} " && '
            'head -c 1000000 -- "$nexa_file" | base64 -w0 && echo\ndone'
        )
    return "\n".join([*lines, "true"])


def logs_script(run: Run, ranks: Sequence[tuple[int, int, int]]) -> str:
    """Return a script that prints the ends of some ranks' logs, each `(trial, attempt, rank)`."""
    lines = [f"cd -- {quote(run.directory)} || exit 66"]
    for trial, attempt, rank in ranks:
        lines.append(
            f"printf '{trial} {attempt} rank-{rank}.log '; "
            f"{_end_of(f'trials/{trial}/attempt-{attempt}/rank-{rank}.log')} | base64 -w0; echo"
        )
    return "\n".join(lines)


def keep_ranks(run: Run, stdout: str) -> None:
    """Keep what `records_script` or `logs_script` has printed."""
    for line in stdout.splitlines():
        words = line.split(" ")
        if len(words) == 4 and _RANK_FILE.fullmatch(words[2]):
            folder = run.files.rank_tails(int(words[0]), int(words[1]))
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / words[2], base64.b64decode(words[3]).decode("utf-8", "replace"))


def publish_script(run: Run, paths: Sequence[Path]) -> str:
    """Return a script that writes some of the client's files into the run directory."""
    lines = [f"cd -- {quote(run.directory)} || exit 66"]
    folders = sorted({path.parent.relative_to(run.files.path).as_posix() for path in paths} - {"."})
    lines.extend(f"mkdir -p -- {quote(folder)}" for folder in folders)
    # In their order: what comes later may tell of what came before.
    written = (write_file(path.relative_to(run.files.path).as_posix(), path.read_bytes()) for path in paths)
    lines.extend(f"{each} || exit 74" for each in written)
    return "\n".join(lines)


def check_pushed(run: Run, code: int, stderr: str) -> None:
    """Raise where the run directory could not be made."""
    if code:
        words = stderr.strip()[-300:] or f"it ended with {code}"
        raise SubmitError(f"the run directory {run.directory} could not be made: {words}")
