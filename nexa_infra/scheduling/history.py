"""What a run's attempts tell of what to do next: the standard library alone."""

from __future__ import annotations

import heapq
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from nexa_infra.runs.attempts import BY_CAUSE, Attempt, TrialState

# The states that a scheduler brings about, whatever a program's exit code says.
_FORCED: dict[str, TrialState] = {
    "TIMEOUT": "timeout",
    "OUT_OF_MEMORY": "out_of_memory",
    "NODE_FAIL": "node_fail",
    "BOOT_FAIL": "node_fail",
    "PREEMPTED": "preempted",
    "DEADLINE": "deadline",
    "CANCELLED": "cancelled",
}
# Slurm ends the attempts of a node that is gone within seconds of each other.
_AT_ONCE = 5.0
_BAD = frozenset({"failed", "timeout", "out_of_memory", "node_fail", "boot_fail", "deadline", "preempted"})


def kind_of(attempt: Attempt, said: str | None = None) -> TrialState:
    """Say how an attempt that is over ended, by its own word, and the scheduler's where it has none."""
    if attempt.cause is not None:
        return BY_CAUSE.get(attempt.cause, ("failed", ""))[0]
    if said in _FORCED:
        return _FORCED[said]
    if attempt.ended is None or attempt.signal == "KILL":
        return "node_fail"
    if "TERM" in (attempt.signal or "").split():
        return "preempted"
    return "completed" if attempt.exit_code == 0 else "failed"


def ends_of(
    states: Sequence[str], attempts: Mapping[int, Sequence[Attempt]], said: Mapping[tuple[int, int], str]
) -> dict[int, Counter[str]]:
    """Count the bad ends of each trial by their kind: trial -> kind -> how often.

    `said` is the scheduler's word on attempts, `(trial, attempt)` -> state, where it has one.
    """
    found: dict[int, Counter[str]] = {}
    for trial, tried in attempts.items():
        last = states[trial] if trial < len(states) else "completed"
        if len(tried) == 1 and last not in _BAD and last != "interrupted":
            continue
        kinds: list[str] = [kind_of(each, said.get((trial, each.number))) for each in tried[:-1]]
        if last in _BAD or last == "interrupted":
            kinds.append({"interrupted": "node_fail", "boot_fail": "node_fail"}.get(last, last))
        if bad := Counter(kind for kind in kinds if kind in _BAD):
            found[trial] = bad
    return found


def early_ends(
    states: Sequence[str], attempts: Mapping[int, Sequence[Attempt]], most: int, since: float = 0.0
) -> tuple[str, ...]:
    """Return how the first trials to end, from a moment on, have ended: `completed`, or in what way not."""
    over: list[tuple[float, str]] = []
    for trial, tried in attempts.items():
        one = tried[0] if tried[0].started >= since else next((each for each in tried if each.started >= since), None)
        if one is None or one.ended is None:
            continue
        kind = kind_of(one) if one is not tried[-1] else states[trial]
        if kind == "completed" or kind in _BAD:
            code = f"failed with exit code {one.exit_code}" if kind == "failed" else f"ended as {kind}"
            over.append((one.ended, "completed" if kind == "completed" else code))
    return tuple(words for _, words in heapq.nsmallest(most, over))


def failed_nodes(failures: Iterable[tuple[str, float]]) -> dict[str, int]:
    """Count how often each node went away, by the ends of the attempts that it took with it: node, moment.

    What it takes with it at one moment is one failure.
    """
    last: dict[str, float] = {}
    found: dict[str, int] = {}
    for node, moment in sorted(failures, key=lambda each: each[1]):
        if node not in last or moment - last[node] > _AT_ONCE:
            found[node] = found.get(node, 0) + 1
        last[node] = moment
    return found


def typical_seconds(states: Sequence[str], attempts: Mapping[int, Sequence[Attempt]]) -> float | None:
    """Return the median of what completed trials took, seconds; None where there is none."""
    spans = [tried[-1].seconds for trial, tried in attempts.items() if states[trial] == "completed"]
    return statistics.median(spans) if spans else None


def asked_for(
    submissions: Iterable[Sequence[Sequence[tuple[int, int]]]], attempts: Mapping[int, Sequence[Attempt]]
) -> tuple[dict[int, int], dict[int, int]]:
    """Return the newest attempt that each trial was submitted for, and how often one that never started was.

    `submissions` hold the trials of each array task, and exclude what is void.
    """
    asked: dict[int, int] = {}
    lost: dict[int, int] = {}
    for tasks in submissions:
        for task in tasks:
            for trial, attempt in task:
                lost[trial] = lost.get(trial, 0) + 1 if asked.get(trial) == attempt else 1
                asked[trial] = max(attempt, asked.get(trial, 0))
    for trial, tried in attempts.items():
        if tried and tried[-1].number >= asked.get(trial, 0):
            # Whatever is recorded of its submission, it was asked for.
            asked[trial] = tried[-1].number
            lost.pop(trial, None)
    return asked, lost
