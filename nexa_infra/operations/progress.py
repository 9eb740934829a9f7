"""Who is told of each poll: a terminal's line, beside whatever follows the run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from nexa_infra.scheduling.watch import Poll

Tell = Callable[[Poll], None]

# Set around a flow that is called from a terminal: its tasks have no parameter to carry a callable in.
listener: ContextVar[Tell | None] = ContextVar("nexa_listener", default=None)


# Where the line cannot be updated, a new one is written no oftener than this.
QUIET_SECONDS = 2.0


@contextmanager
def terminal_line() -> Iterator[Tell]:
    """Show one updating line on a terminal's standard error, or a plain line a change elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        told = -QUIET_SECONDS

        def say(poll: Poll) -> None:
            nonlocal told
            if poll.over == poll.total or time.monotonic() - told >= QUIET_SECONDS:
                told = time.monotonic()
                console.print(str(poll), markup=False, highlight=False, soft_wrap=True)

        yield say
        return
    columns = (
        TextColumn("trials"),
        BarColumn(24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=None)

        def tell(poll: Poll) -> None:
            told = ", ".join(f"{count:,} {state}" for state, count in poll.states.items() if state != "pending")
            progress.update(bar, total=poll.total, completed=poll.over, description=told)

        yield tell
