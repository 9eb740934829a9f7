"""How fast a large run is looked at."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.measure import BenchmarkError, Figure, alternated, newest_run, place, say

TRIALS = 10_000
ROUNDS = 5


def status() -> Iterator[Figure]:
    """The verb `status` on a run of 10,000 trials, beside `cat` of the files that it has to read."""
    with place() as here:
        say(f"making a run of {TRIALS:,} trials")
        here.python("-m", "benchmarks.past_run", here.sweep(TRIALS))
        run = newest_run(here.home)
        told = here.python("-m", "nexa_infra", "status", "latest").stdout
        if "done" not in told or f"{TRIALS:,} completed" not in told:
            raise BenchmarkError(f"the run was not written as the engine reads it; status says: {told}")
        looked, read = alternated(
            ROUNDS,
            lambda: here.python("-m", "nexa_infra", "status", "latest").seconds,
            lambda: here.run("find", run.status, "-type", "f", "-exec", "cat", "{}", "+").seconds,
        )
    beside = {"tool": "find -exec cat {} +", "s": read, "ratio": looked / read}
    yield Figure("status", looked, "s", limit=1.0, baseline=beside)
