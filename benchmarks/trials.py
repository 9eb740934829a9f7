"""What launching costs on this machine, beside `xargs` and beside the trials' own time."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.measure import CORES, ROOT, Figure, alternated, own_time, place

TRIALS = 64
ROUNDS = 5


def local() -> Iterator[Figure]:
    """From config file to the end of 64 trials of `true`, beside `xargs -P` of the same."""
    with place() as here:
        config = here.sweep(TRIALS)
        numbers = "".join(f"{n}\n" for n in range(TRIALS))
        xargs = ("xargs", "-P", str(CORES), "-n", "1", "true", "--n")
        raw, verb, call = alternated(
            ROUNDS,
            lambda: here.run(*xargs, stdin=numbers).seconds,
            lambda: here.python("-m", "nexa_infra", "sweep", config).seconds,
            lambda: float(here.inside("engine", config)),
        )
    for name, seconds in (("verb", verb), ("call", call)):
        beside = {"tool": " ".join(xargs[:3]), "ms": raw * 1000 / TRIALS, "ratio": seconds / raw}
        yield Figure(f"local.{name}", (seconds - raw) * 1000 / TRIALS, "ms more a trial", baseline=beside)


def overhead() -> Iterator[Figure]:
    """The example sweep by the verb, less what its trials took from the first start to the last end."""
    with place() as here:
        done = here.python("-m", "nexa_infra", "sweep", "deployments/configs/digits.yaml", cwd=ROOT)
        own = own_time(here.home)
    # Added up and shared by the cores, they take less: cores stand idle at the end, and between two trials.
    beside = {"trials_s": own.span, "trials_over_cores_s": own.total / CORES}
    yield Figure("engine-overhead", done.seconds - own.span, "s more than the trials", limit=3, baseline=beside)
