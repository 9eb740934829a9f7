"""Who is told of each poll: a terminal's line, beside whatever follows the run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar

from nexa_infra.operations.voice import Say, speaker
from nexa_infra.scheduling.watch import Poll

Tell = Callable[[Poll], None]

# Set around a flow that is called from a terminal: its tasks have no parameter to carry a callable in.
listener: ContextVar[Tell | None] = ContextVar("nexa_listener", default=None)


# Where the line cannot be updated, a new one is written no oftener than this.
QUIET_SECONDS = 2.0


@contextmanager
def terminal_line() -> Iterator[Tell]:
    """Show one updating line on a terminal's standard error, or a plain line now and then elsewhere.

    A reader that goes away never ends the run: nothing more is told.
    """
    if not sys.stderr.isatty():
        with _speaking(_plain_words):
            yield _plain_lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column

    columns = (
        TextColumn("{task.fields[what]}"),
        BarColumn(None, table_column=Column(ratio=1, max_width=24)),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=3)),
    )
    # The report that follows says all of it, so that the line goes away at the end.
    with Progress(*columns, console=Console(stderr=True), transient=True, expand=True) as progress:
        bar = progress.add_task("", total=None, what="trials")

        def tell(poll: Poll) -> None:
            told = ", ".join(f"{count:,} {state}" for state, count in poll.states.items() if state != "pending")
            what, done, total = "trials", float(poll.over), float(poll.total)
            if (metrics := poll.progress) is not None:
                told = f"{told}; {metrics}"
                if metrics.total and not poll.over:
                    what, done, total = f"{metrics.axis}s", metrics.step, metrics.total
            words = "; ".join([told, *poll.notes])
            progress.update(bar, total=total, completed=done, description=words, what=what)
            for warning in poll.warnings:
                progress.console.print(f"warning: {warning}", markup=False, highlight=False)

        def say(lines: Sequence[str]) -> None:
            progress.console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)

        with _speaking(say):
            yield tell


@contextmanager
def _speaking(say: Say) -> Iterator[None]:
    """Let what a training prints be told beside the line."""
    token = speaker.set(say)
    try:
        yield
    finally:
        speaker.reset(token)


def _plain_words(lines: Sequence[str]) -> None:
    sys.stderr.write("".join(f"{line}\n" for line in lines))
    sys.stderr.flush()


def _plain_lines() -> Tell:
    told = -QUIET_SECONDS

    def say(poll: Poll) -> None:
        nonlocal told
        if poll.over == poll.total or poll.warnings or time.monotonic() - told >= QUIET_SECONDS:
            told = time.monotonic()
            with suppress(OSError, ValueError):
                sys.stderr.write(f"{poll}\n")
                sys.stderr.flush()

    return say
