"""Measure, and print one JSON line a figure: python -m benchmarks [NAME ...]; progress goes to standard error."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator

from benchmarks import containers, flow, main_job, peers, scale, slurm, start, status, sync, training, trials
from benchmarks.measure import BenchmarkError, Figure, say

BENCHMARKS: dict[str, Callable[[], Iterator[Figure]]] = {
    "render": start.render,
    "import": start.imports,
    "local": trials.local,
    "engine-overhead": trials.overhead,
    "flow": flow.flow,
    "status": status.status,
    "slurm": slurm.slurm,
    "scale": scale.scale,
    "peers": peers.peers,
    "sync": sync.sync,
    "training": training.training,
    "containers": containers.containers,
    "make-run": main_job.make_run,
}


def main(argv: list[str] | None = None) -> int:
    """Return the exit code: 0, 1 if a figure misses its limit or cannot be measured, 2 for an unknown name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").strip())
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)}; none for all of them")
    names = list(dict.fromkeys(parser.parse_args(argv).names)) or list(BENCHMARKS)
    if unknown := [name for name in names if name not in BENCHMARKS]:
        say(f"there is no benchmark {', '.join(map(repr, unknown))}: choose from {', '.join(BENCHMARKS)}")
        return 2
    fine = True
    for name in names:
        say(f"{name} …")
        try:
            for figure in BENCHMARKS[name]():
                print(figure.line(), flush=True)
                if figure.missed:
                    fine = False
                    say(f"{figure.figure} is {figure.value:.4g} {figure.unit}, over its limit of {figure.limit:g}")
        except BenchmarkError as error:
            fine = False
            say(f"{name} could not be measured: {error}")
    return 0 if fine else 1


def _end(number: int, _: object) -> None:
    raise SystemExit(128 + number)  # so that what was started is ended, and removed


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _end)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
