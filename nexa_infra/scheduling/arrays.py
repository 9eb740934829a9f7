"""How many tasks of each array may run at once: never more than the run's share. The standard library alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Array:
    """An array of a run that waits or runs."""

    id: str
    pending: int
    running: int
    limit: int | None = None  # how many of its tasks run at once: %N
    held: bool = False  # whether it waits for another array to end

    @property
    def tasks(self) -> int:
        """Tasks that have not ended."""
        return self.pending + self.running

    @property
    def most(self) -> int:
        """The most of its tasks that can run at once from now on; a requeued one is none more."""
        return self.tasks if self.limit is None else min(max(self.limit, self.running), self.tasks)


@dataclass(frozen=True)
class Throttle:
    """Let so many tasks of an array run at once, now, or once another has ended."""

    array: str
    limit: int
    after: str | None = None


def place(
    arrays: Sequence[Array], sizes: Sequence[int], slots: int | None
) -> list[tuple[int | None, int | str | None]]:
    """Give each new array its share of the slots, and what it waits for where there is none left for it.

    `arrays` are those that wait or run already, `sizes` the tasks of the new ones. What is waited for is the
    place of another new array, or a live one's id. Whatever ends when, no more than `slots` tasks run at once.
    """
    if slots is None:
        return [(None, None)] * len(sizes)
    free = max(0, slots - sum(array.most for array in arrays if not array.held))
    lanes = min(free, len(sizes))
    given = [free // lanes + (lane < free % lanes) for lane in range(lanes)]
    # One that waits begins with one task at a time, as its predecessor ends with one at the least; `shares` gives it
    # more. Only so may what a predecessor's last tasks leave free be given to others.
    behind: list[tuple[int | None, int | str | None]] = []
    for number in range(lanes, len(sizes)):
        earlier = number - (lanes or 1)
        behind.append((1, earlier if earlier >= 0 else arrays[-1].id))
    return [*((limit, None) for limit in given), *behind]


def shares(arrays: Sequence[Array], slots: int | None) -> tuple[Throttle, ...]:
    """Say which arrays may run more tasks at once, or must run fewer; none where that is as it should be."""
    if slots is None:
        return tuple(Throttle(array.id, 0) for array in arrays if array.limit is not None)
    live = [array for array in arrays if not array.held and array.tasks]
    held = [array for array in arrays if array.held and array.tasks]
    free = slots - sum(array.most for array in live)
    if free < 0:
        return tuple(_lowered(live, slots))
    changes = []
    for array in sorted(live, key=lambda array: -array.tasks):
        if free and array.limit is not None and array.pending and array.limit < array.tasks:
            now = min(array.tasks, array.most + free)
            free -= now - array.most
            changes.append(Throttle(array.id, now))
    for array in held:
        if free:
            given = min(free, array.tasks)
            free -= given
            changes.append(Throttle(array.id, given))
    return tuple(changes)


def _lowered(live: Sequence[Array], slots: int) -> list[Throttle]:
    """Share out fewer slots than are taken: the arrays that are too many wait for others."""
    first, rest = live[:slots], live[slots:]
    total = sum(array.tasks for array in first)
    given = [max(1, slots * array.tasks // total) for array in first]
    while sum(given) > slots:
        given[given.index(max(given))] -= 1
    changes = [
        Throttle(array.id, now)
        for array, now in zip(first, given)
        if array.pending and (array.limit is None or array.limit > now)
    ]
    changes += [
        Throttle(array.id, 1, first[place % len(first)].id) for place, array in enumerate(rest) if array.pending
    ]
    return changes
