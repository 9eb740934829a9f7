"""What a training prints, heard while it runs: rank 0's lines, where torchrun has started several."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, closing, suppress
from contextvars import ContextVar
from pathlib import Path

from nexa_infra.errors import HostError
from nexa_infra.hosts.connections import host_of
from nexa_infra.runs.attempts import Attempt, read_attempts
from nexa_infra.runs.directory import RunDirectory
from nexa_infra.runs.log import LogReader, later
from nexa_infra.runs.record import Run

# Called with whole lines, in a thread of its own.
Say = Callable[[Sequence[str]], None]

# Set around a run that is followed on a terminal.
speaker: ContextVar[Say | None] = ContextVar("nexa_speaker", default=None)

# How often what is here is looked at, and how long lines are gathered, seconds.
GATHER_SECONDS = 0.5
# How long the last lines of a run that has ended may take to come, seconds.
LAST_SECONDS = 5.0
# A line longer than this is cut: nobody reads it.
MOST_LINE = 4096


@asynccontextmanager
async def heard(run: Run, *says: Say | None) -> AsyncIterator[None]:
    """Tell what a training prints, as it prints it, to each of `says`; a sweep's trials are not heard."""
    listening = [say for say in says if say is not None]
    if run.kind != "training" or not listening:
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(target=_listen, args=(run, listening, stop), daemon=True, name="nexa-voice")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        await asyncio.shield(asyncio.to_thread(thread.join, LAST_SECONDS))


def _listen(run: Run, says: Sequence[Say], stop: threading.Event) -> None:
    gathered = _Lines(says)
    before = _newest(run)
    # An attempt that is over has been heard, or nobody was there to hear it.
    told = before.number - (before.ended is None) if before is not None else 0
    while True:
        last = stop.is_set()  # what was written until then is read once more
        newest = _newest(run)
        if newest is not None and newest.number > told:
            told += 1
            for file, piece in _pieces(run, told, stop):
                gathered.take(piece, file)
            gathered.end()
        elif last:
            return
        else:
            stop.wait(GATHER_SECONDS)


def _newest(run: Run) -> Attempt | None:
    """Return the newest attempt, by what is known here."""
    with suppress(OSError):
        if attempts := read_attempts(run.files).get(0):
            return attempts[-1]
    return None


def _pieces(run: Run, attempt: int, stop: threading.Event) -> Iterator[tuple[int, bytes]]:
    """Yield what an attempt prints, by file, until a newer one is there or the run has ended; now and then nothing."""
    files = RunDirectory(Path(run.directory))
    if run.config.launcher.type == "torchrun":
        paths = [files.ranks(0, attempt) / "rank-0.log"]
    else:
        paths = [files.stdout(0, attempt), files.stderr(0, attempt)]
    pieces = _pieces_there(run, paths) if run.mirror is not None else _pieces_here(paths)
    with closing(pieces):
        for file, piece in pieces:
            yield file, piece
            if not piece:
                newest = _newest(run)
                if stop.is_set() or (newest is not None and newest.number > attempt):
                    return


def _pieces_here(paths: Sequence[Path]) -> Generator[tuple[int, bytes], None, None]:
    with ExitStack() as held:
        readers = [LogReader(path) for path in paths]
        for reader in readers:
            held.callback(reader.close)
        while True:
            quiet = True
            for file, reader in enumerate(readers):
                with suppress(OSError):
                    for piece in reader.new():
                        quiet = False
                        yield file, piece
            yield 0, b""
            if quiet:
                time.sleep(GATHER_SECONDS)


def _pieces_there(run: Run, paths: Sequence[Path]) -> Generator[tuple[int, bytes], None, None]:
    start = "+1"
    while True:
        try:
            # The last part of a log that outgrows its limit is a file of its own.
            files = [str(file) for path in paths for file in (path, later(path)[1])]
            argv = ["tail", "-q", "-c", start, "-F", "--", *files]
            with closing(host_of(run.cluster).stream(argv, every=GATHER_SECONDS)) as pieces:
                for piece in pieces:
                    yield 0, piece
        except HostError:
            yield 0, b"(the connection was cut: lines may be missing here; `nexa-infra logs` shows all)\n"
        start = "0"
        time.sleep(GATHER_SECONDS)
        yield 0, b""


class _Lines:
    """Gathers pieces into lines, and lines into not too many words."""

    def __init__(self, says: Sequence[Say]) -> None:
        self._says = says
        self._rests: dict[int, bytes] = {}
        self._lines: list[str] = []
        self._said = 0.0

    def take(self, piece: bytes, file: int = 0) -> None:
        """Take a piece of a file; the lines that are whole are told, at the latest when nothing more comes."""
        *lines, rest = (self._rests.get(file, b"") + piece).split(b"\n")
        if len(rest) > MOST_LINE:
            lines.append(rest)
            rest = b""
        self._rests[file] = rest
        self._lines += map(_shown, lines)
        if not piece or time.monotonic() - self._said >= GATHER_SECONDS:
            self._say()

    def end(self) -> None:
        """Tell what is left, though its last line has no end."""
        self._lines += [_shown(rest) for rest in self._rests.values() if rest]
        self._rests.clear()
        self._say()

    def _say(self) -> None:
        if self._lines:
            for say in self._says:
                with suppress(OSError, ValueError):  # a reader that goes away never ends the run
                    say(self._lines)
            self._lines = []
        self._said = time.monotonic()


def texts(pieces: Sequence[bytes]) -> list[str]:
    """Return the lines of some pieces, as they would be told."""
    found: list[str] = []
    gathered = _Lines([found.extend])
    for piece in pieces:
        gathered.take(piece)
    gathered.end()
    return found


def _shown(line: bytes) -> str:
    """Return a line as it would stand on a screen in the end: a bar that was drawn over and over, once."""
    return line[:MOST_LINE].rstrip(b"\r").rpartition(b"\r")[2].decode("utf-8", "replace")
