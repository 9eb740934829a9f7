"""What every benchmark needs: a figure, a place that is removed again, and processes on a stopwatch."""

from __future__ import annotations

import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nexa_infra.runs.attempts import read_attempts
from nexa_infra.runs.directory import RunDirectory
from nexa_infra.runs.index import known_runs

ROOT = Path(__file__).resolve().parents[1]
CORES = len(os.sched_getaffinity(0))
# What a person's shell, or the make that started this, says to these tools is not for what is measured.
_NOT_PASSED_ON = ("NEXA_", "PREFECT_", "PYTHON", "VIRTUAL_ENV", "MAKE", "MFLAGS")


class BenchmarkError(Exception):
    """Something that was to be measured did not work; the message ends with its last words."""


@dataclass(frozen=True)
class Figure:
    """One measured value. `limit` is the most it may be; `baseline` what it stands beside, from the same run."""

    figure: str
    value: float
    unit: str
    limit: float | None = None
    baseline: Mapping[str, object] | float | None = None

    @property
    def missed(self) -> bool:
        """Whether the value is over its limit."""
        return self.limit is not None and self.value > self.limit

    def line(self) -> str:
        """Return the figure as one line of JSON, to four digits."""
        return json.dumps(_rounded(asdict(self)), ensure_ascii=False)


@dataclass(frozen=True)
class Done:
    """A process that has ended well."""

    seconds: float
    stdout: str

    def answer(self) -> Any:
        """Return the JSON on its last line."""
        return json.loads(self.stdout.rstrip().rpartition("\n")[2])


@dataclass(frozen=True)
class Place:
    """A folder of its own: a project to launch from, and the home of what is launched."""

    folder: Path
    project: Path
    home: Path

    @property
    def environment(self) -> dict[str, str]:
        """The environment that processes get here: this tree's code, and this place's home."""
        return environment() | {"NEXA_HOME": str(self.home), "PYTHONPATH": str(ROOT)}

    def run(self, *argv: str | Path, **more: Any) -> Done:
        """Run a command in the project, and time it."""
        return timed(argv, **{"cwd": self.project, "env": self.environment, **more})

    def python(self, *words: str | Path, **more: Any) -> Done:
        """Run this interpreter in the project, and time it."""
        return self.run(sys.executable, *words, **more)

    def inside(self, *words: str | Path, **more: Any) -> Any:
        """Return what `benchmarks.inside` measures in a fresh process."""
        return self.python("-m", "benchmarks.inside", *words, **more).answer()

    def sweep(self, trials: int) -> Path:
        """Write the config of a sweep of `true`, as many at once as there are cores."""
        config = {
            "job": {"name": "bench", "array_parallelism": CORES},
            "launcher": {"type": "command", "command": ["true"]},
            "sweep": {"parameters": {"n": list(range(trials))}},
        }
        path = self.project / f"true-{trials}.yaml"
        path.write_text(json.dumps(config))  # JSON is YAML
        return path


@contextmanager
def place() -> Iterator[Place]:
    """Make a place, and remove it with all that was made in it."""
    with tempfile.TemporaryDirectory(prefix="nexa-bench-", ignore_cleanup_errors=True) as name:
        made = Place(Path(name), Path(name) / "project", Path(name) / "home")
        made.project.mkdir()
        yield made


def environment() -> dict[str, str]:
    """Return a person's environment without what they set for the tools that are measured."""
    return {name: value for name, value in os.environ.items() if not name.startswith(_NOT_PASSED_ON)}


def timed(
    argv: Sequence[str | Path], *, cwd: Path, env: Mapping[str, str], stdin: str = "", patience: float = 900.0
) -> Done:
    """Run a command to its end; no process of its group outlives this call.

    Raises:
        BenchmarkError: it failed, or took longer than `patience` seconds.
    """
    told = shlex.join(str(word) for word in argv)
    begun = time.perf_counter()
    pipe = subprocess.PIPE
    with subprocess.Popen(
        argv, cwd=cwd, env=env, text=True, start_new_session=True, stdin=pipe, stdout=pipe, stderr=pipe
    ) as process:
        try:
            stdout, stderr = process.communicate(stdin, timeout=patience)
            seconds = time.perf_counter() - begun
        except BaseException as error:
            _end_group(process)
            if isinstance(error, subprocess.TimeoutExpired):
                raise BenchmarkError(f"`{told}` had not ended after {patience:.0f} s") from error
            raise
    if process.returncode:
        words = "\n".join(f"{stdout}\n{stderr}".strip().splitlines()[-20:])
        raise BenchmarkError(f"`{told}` ended with exit code {process.returncode}:\n{words}")
    return Done(seconds, stdout)


def alternated(rounds: int, *measures: Callable[[], float]) -> list[float]:
    """Return each measure's median over `rounds`, taken in turn, after one that warms caches up."""
    taken = [[measure() for measure in measures] for _ in range(rounds + 1)][1:]
    return [statistics.median(values) for values in zip(*taken, strict=True)]


def newest_run(home: Path) -> RunDirectory:
    """Return the directory of the newest run under `home`."""
    return RunDirectory(known_runs(home)[0].directory)


@dataclass(frozen=True)
class OwnTime:
    """What a run's trials took by themselves, in seconds: first start to last end, and all of them added up."""

    span: float
    total: float


def own_time(home: Path) -> OwnTime:
    """Return what the trials of the newest run under `home` took."""
    tried = read_attempts(newest_run(home))
    attempts = [attempt for each in tried.values() for attempt in each]
    ended = max(attempt.ended or 0.0 for attempt in attempts)
    return OwnTime(ended - min(attempt.started for attempt in attempts), sum(attempt.seconds for attempt in attempts))


def say(text: str) -> None:
    """Tell a person how far it is."""
    print(f"benchmarks: {text}", file=sys.stderr, flush=True)


def _end_group(process: subprocess.Popen[str]) -> None:
    """Ask a process and its group to end, and make them."""
    for number, patience in ((signal.SIGTERM, 15.0), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value
