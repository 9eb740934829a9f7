"""What is paid before anything runs: rendering a script, and the import."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.measure import Figure, alternated, place

ROUNDS = 9


def render(rounds: int = ROUNDS) -> Iterator[Figure]:
    """Render a grid of 1,000,000 trials, six axes of ten, beside one of 4, each first in its process."""
    with place() as here:
        large = here.inside("render", "6", "10")
        small = here.inside("render", "2", "2")
        large_ms, small_ms = alternated(
            rounds,
            lambda: float(here.inside("render", "6", "10")["ms"]),
            lambda: float(here.inside("render", "2", "2")["ms"]),
        )
    beside = {"trials": small["trials"], "ratio": large_ms / small_ms}
    yield Figure("render.first", large_ms, "ms", limit=10, baseline={"ms": small_ms, **beside})
    beside = {"trials": small["trials"], "ratio": large["KiB"] / small["KiB"]}
    yield Figure("render.script", large["KiB"], "KiB", limit=16, baseline={"KiB": small["KiB"], **beside})


def imports(rounds: int = ROUNDS) -> Iterator[Figure]:
    """Import the package beside an interpreter that does nothing, in fresh processes."""
    with place() as here:
        bare, whole = alternated(
            rounds,
            lambda: here.python("-c", "pass").seconds,
            lambda: here.python("-c", "import nexa_infra").seconds,
        )
        yield Figure("import.time", whole - bare, "s", limit=0.3, baseline={"tool": "python -c pass", "s": bare})
        yield Figure("import.heavy", len(here.inside("heavy")), "packages", limit=0)
