"""Every interleaving of what can happen to a run on Slurm, two trials and a few faults at a time.

A `World` is a value: the run directory (intents, claims, status lines, the word of a cancel), the controller's arrays,
each sbatch on its way, and how far each client is in its program. `Model.steps` says what may happen next to it; the
clients decide by the real `decide`, `arrange`, `judge`, `task_states`, `asked_for` and `ends_of`, on data made from the
world, and do the rest as intents.py, submit.sh and job.sbatch do. `explore` visits every world that can be reached,
the nearest first, and raises the shortest story of what must not be:

- none doubled: no attempt starts twice, none beside another of its trial, none after its trial has completed or has
  used up what it may, none before the one before it; nothing is asked for, nor starts, between a cancel and a resume;
- none falsely finished: where a client takes the run for finished, every trial is, and nothing is left of it;
- none lost: from every world the run can end, with every trial completed or finally failed, though no chance helps
  (no late array comes, no forgotten one comes back). As there are finitely many worlds, it does so for certain where
  whatever can always happen again happens at some time.

Time matters to `decide` only after a queue was full: `waited` says that long enough has passed since.

The world is in explorer_world.py; what happens to it, in explorer_cluster.py; what clients do, in explorer_clients.py.
"""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass

from tests.explorer_clients import Model
from tests.explorer_world import GUARDS, Setup, World

__all__ = ["GUARDS", "CutOffError", "Explored", "Setup", "WrongError", "explore"]


class WrongError(Exception):
    """Something that must not be has happened."""


class CutOffError(Exception):
    """There is more than was to be looked at: nothing has been shown."""


@dataclass(frozen=True)
class Explored:
    """What an exploration has seen."""

    worlds: int
    steps: int
    ends: int  # worlds in which the run has ended, and nothing is left of it
    seconds: float


def explore(setup: Setup, *, most_worlds: int = 1_000_000) -> Explored:
    """Visit every world that can be reached.

    Raises:
        WrongError: a property does not hold; the message is the shortest story of it.
        CutOffError: there are more worlds than that.
    """
    began = time.monotonic()
    model = Model(setup)
    worlds = [model.first()]
    known = {worlds[0]: 0}
    parents, told = array("l", [-1]), [""]
    sources, targets = array("l"), array("l")  # of the steps that no chance is needed for
    count = 0
    for at, world in enumerate(worlds):  # which grows meanwhile
        for words, after, certain in model.steps(world):
            count += 1
            if isinstance(after, str):
                raise WrongError(_story(worlds, parents, told, at, [words, f"WRONG: {after}"]))
            there = known.setdefault(after, len(worlds))
            if there == len(worlds):
                if there >= most_worlds:
                    raise CutOffError(f"there are more than {most_worlds:,} worlds")
                worlds.append(after)
                parents.append(at)
                told.append(words)
            if certain:
                sources.append(at)
                targets.append(there)
    ends = [at for at, world in enumerate(worlds) if model.ended(world)]
    saved = _reaching(ends, len(worlds), sources, targets)
    if (lost := saved.find(0)) >= 0:
        raise WrongError(_story(worlds, parents, told, lost, ["WRONG: from here the run can never end"]))
    return Explored(len(worlds), count, len(ends), time.monotonic() - began)


def _reaching(ends: list[int], count: int, sources: array[int], targets: array[int]) -> bytearray:
    """Mark every world from which one of some can be reached."""
    before: list[list[int]] = [[] for _ in range(count)]
    for source, target in zip(sources, targets, strict=True):
        before[target].append(source)
    found, left = bytearray(count), list(ends)
    for at in ends:
        found[at] = 1
    while left:
        for source in before[left.pop()]:
            if not found[source]:
                found[source] = 1
                left.append(source)
    return found


def _story(worlds: list[World], parents: array[int], told: list[str], at: int, last: list[str]) -> str:
    lines: list[str] = []
    end = worlds[at]
    while parents[at] >= 0:
        lines.append(told[at])
        at = parents[at]
    numbered = [f"{number:3}. {line}" for number, line in enumerate([*reversed(lines), *last], 1)]
    state = "\n".join(f"     {name} {value}" for name, value in end._asdict().items())
    return "\n".join([last[-1], *numbered, "before the last step:", state])
