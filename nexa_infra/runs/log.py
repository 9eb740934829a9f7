"""A trial's log, which may be in parts: `job.log_limit` keeps its beginning and its end.

The file itself is the beginning. What came later goes into `.last`, which becomes `.before`, in
place of an earlier one, each time that it is full.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

# How much is read at once, bytes.
PIECE_BYTES = 1 << 16


def later(log: Path) -> tuple[Path, Path]:
    """Return where the end of a log is that has outgrown its limit: the part before the last, and the last."""
    return log.with_name(f"{log.name}.before"), log.with_name(f"{log.name}.last")


def end_of(log: Path, most: int) -> bytes:
    """Return at most the last `most` bytes of a log, whatever parts it is in; nothing where there is none."""
    found = b""
    for part in (log, *later(log)):
        with suppress(OSError), part.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - most))
            found += stream.read(most)
    return found[-most:]


def gap_line(limit: str | None) -> bytes:
    """Return the line that stands where a part of a log is missing."""
    why = f"job.log_limit is {limit}" if limit else "job.log_limit"
    return f"… what came between, if anything, was not kept ({why}) …\n".encode()


class LogReader:
    """Reads a log on this machine while it is written, through its parts; each byte once."""

    def __init__(self, log: Path, gap: bytes = b"") -> None:
        self._log = log
        self._gap = gap
        self._offset = 0
        # The part that is read now is held open: its name passes to another, and its inode must not.
        self._held: BinaryIO | None = None
        self._ends_line = True

    def new(self) -> Iterator[bytes]:
        """Yield what has been written since the last time."""
        for piece in self._new():
            self._ends_line = piece.endswith(b"\n")
            yield piece

    def close(self) -> None:
        """Let go of the files."""
        if self._held is not None:
            self._held.close()
            self._held = None

    def _new(self) -> Iterator[bytes]:
        if self._held is None:
            yield from self._beginning()
            parts = self._parts()
            if not parts:
                return
            yield from self._beginning()  # it is whole once there is another part
            yield from self._through(parts, gap=len(parts) > 1)
            return
        yield from _rest(self._held)
        parts = self._parts()
        mine = [number for number, part in enumerate(parts) if _same(part, self._held)]
        if mine == [len(parts) - 1]:
            _close(parts)  # it is the last one still
        elif mine:
            yield from _rest(self._held)
            parts.pop(mine[0]).close()
            yield from self._through(parts, gap=False)
        elif parts:
            yield from _rest(self._held)
            yield from self._through(parts, gap=True)

    def _beginning(self) -> Iterator[bytes]:
        with suppress(FileNotFoundError), self._log.open("rb") as stream:
            stream.seek(self._offset)
            for piece in _rest(stream):
                self._offset += len(piece)
                yield piece

    def _through(self, parts: list[BinaryIO], *, gap: bool) -> Iterator[bytes]:
        """Read parts from their beginnings, and hold the last one."""
        if gap and self._gap:
            yield self._gap if self._ends_line else b"\n" + self._gap
        for part in parts:
            self.close()
            self._held = part
            yield from _rest(part)

    def _parts(self) -> list[BinaryIO]:
        """Open the later parts that are there, the last one last."""
        before, last = later(self._log)
        found: list[BinaryIO] = []
        # The last one first: what takes its name meanwhile is then seen the next time, and nothing is left out.
        for path in (last, before):
            with suppress(FileNotFoundError):
                found.insert(0, path.open("rb"))
        if len(found) > 1 and _same(found[0], found[1]):
            found.pop(0).close()
        return found


def _rest(stream: BinaryIO) -> Iterator[bytes]:
    while piece := stream.read(PIECE_BYTES):
        yield piece


def _same(one: BinaryIO, other: BinaryIO) -> bool:
    return os.path.samestat(os.fstat(one.fileno()), os.fstat(other.fileno()))


def _close(streams: list[BinaryIO]) -> None:
    for stream in streams:
        stream.close()
