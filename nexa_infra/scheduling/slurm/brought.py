"""What a client keeps of a run's many small files: the lines of the status files in one, all metrics in another."""

from __future__ import annotations

import base64
import fcntl
import zlib
from typing import TYPE_CHECKING

from nexa_infra.errors import HostError
from nexa_infra.runs.directory import write_atomically

if TYPE_CHECKING:
    from nexa_infra.runs.record import Run

# Clocks of file servers differ: files that changed this long before the last look are brought again, seconds.
SLACK_SECONDS = 120
_MARK = "==nexa metrics=="
# What is unpacked at once, bytes.
_PIECE = 2**16
# An archive ends in two blocks of zeros.
_TAR_END = bytes(1024)


def newer(since: float | None) -> str:
    """Return the arguments by which `find` leaves out what has not changed since a moment there, in epoch seconds."""
    return "" if since is None else f"-newermt @{since - SLACK_SECONDS:.0f} "


def status_lines(since: float | None) -> str:
    """Return shell that prints the status files that have changed since a moment there, one after another, packed.

    A NUL byte at the end says that they are all.
    """
    return (
        f"{{ find status -type f ! -name '.*' {newer(since)}-exec cat {{}} + 2>/dev/null && printf '\\000'; }}"
        " | gzip -1c | base64 -w0"
    )


def keep_lines(run: Run, known: set[bytes], told: str) -> bool:
    """Add what `status_lines` has printed to this client's copy, each line once; say whether it was all.

    `known` are the lines that the copy has, which only the first of a process's calls has to read. A line that is not
    whole yet comes again when it is; where another file's first line has come behind it, that one is found there
    (see `runs.attempts`).

    Raises:
        HostError: it is damaged.
    """
    try:
        text = zlib.decompress(base64.b64decode(told), wbits=31)
    except (ValueError, zlib.error) as error:
        raise HostError(f"the status files of run {run.id} did not come whole: {error}") from error
    path = run.files.brought
    if not path.exists():
        known.clear()
    elif not known:
        known.update(path.read_bytes().split(b"\n")[:-1])
    new = [line for line in dict.fromkeys(text.split(b"\n")[:-1]) if line not in known]
    if new:
        path.parent.mkdir(exist_ok=True)
        with path.open("ab") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            stream.write(b"".join(line + b"\n" for line in new))
        known.update(new)
    return text.endswith(b"\0")


def metrics_files() -> str:
    """Return shell that packs every trial's metrics."""
    return (
        f"echo {_MARK}\n"
        "find trials -mindepth 2 -maxdepth 2 -type f -name metrics.json -size -16384k -print0 2>/dev/null"
        " | tar -czf - --null -T - 2>/dev/null\ntrue\n"
    )


def keep_metrics(run: Run, told: str) -> None:
    """Keep what `metrics_files` has printed, in place of what was kept before.

    Raises:
        HostError: it is damaged.
    """
    _, mark, packed = told.partition(f"{_MARK}\n")
    data = packed.encode("utf-8", "surrogateescape")
    if not mark or not _whole(data):
        raise HostError(f"the metrics of run {run.id} did not come whole")
    write_atomically(run.files.metrics_pack, data)


def _whole(packed: bytes) -> bool:
    """Say whether an archive is there to its end."""
    stream, end = zlib.decompressobj(wbits=31), b""
    try:
        for begin in range(0, len(packed), _PIECE):
            end = (end + stream.decompress(packed[begin : begin + _PIECE]))[-len(_TAR_END) :]
    except zlib.error:
        return False
    return stream.eof and end == _TAR_END
