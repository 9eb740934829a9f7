"""The benchmarks' output: a JSON line a figure, and an exit code that says whether all are within their limits."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import __main__ as program
from benchmarks.measure import BenchmarkError, Figure, environment, own_time, place, timed

ROOT = Path(__file__).resolve().parents[2]


def test_the_quick_figures_are_printed_a_line_each() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "import", "render"], cwd=ROOT, capture_output=True, text=True
    )

    figures = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["figure"] for each in figures] == ["import.time", "import.heavy", "render.first", "render.script"]
    assert all(list(each) == ["figure", "value", "unit", "limit", "baseline"] for each in figures)
    assert all(isinstance(each["value"], int | float) for each in figures)
    assert done.returncode == any(each["value"] > each["limit"] for each in figures)
    # These two do not depend on how busy the machine is.
    held = {each["figure"]: each for each in figures}
    assert held["import.heavy"]["value"] == 0
    assert held["render.script"]["value"] <= held["render.script"]["limit"] == 16


def test_an_unknown_name_is_one_clear_error_and_nothing_is_measured() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "render", "rendr"], cwd=ROOT, capture_output=True, text=True
    )

    assert done.returncode == 2
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert "'rendr'" in line
    assert "render, import, local" in line


@pytest.mark.parametrize(("value", "code"), [(9.99, 0), (10, 0), (10.01, 1)])
def test_a_figure_over_its_limit_fails_the_program(
    value: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(program.BENCHMARKS, "render", lambda: iter([Figure("render.first", value, "ms", limit=10)]))

    assert program.main(["render"]) == code
    assert ("over its limit of 10" in capsys.readouterr().err) == bool(code)


def test_a_benchmark_that_cannot_be_measured_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Iterator[Figure]:
        yield from ()
        raise BenchmarkError("`make run` ended with exit code 2")

    monkeypatch.setitem(program.BENCHMARKS, "render", broken)
    monkeypatch.setitem(program.BENCHMARKS, "import", lambda: iter([Figure("import.time", 0.01, "s", limit=0.3)]))

    assert program.main(["render", "import"]) == 1

    told = capsys.readouterr()
    assert json.loads(told.out)["figure"] == "import.time"
    assert "render could not be measured: `make run` ended with exit code 2" in told.err


def test_figures_have_four_digits() -> None:
    line = Figure("status", 0.498_765_4, "s", limit=1.0, baseline={"tool": "cat", "s": 12.345_678}).line()

    assert json.loads(line) == {
        "figure": "status",
        "value": 0.4988,
        "unit": "s",
        "limit": 1.0,
        "baseline": {"tool": "cat", "s": 12.35},
    }


def test_a_command_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"(?s)exit code 3.*no such luck"):
        timed(["sh", "-c", "echo no such luck >&2; exit 3"], cwd=tmp_path, env=environment())


def test_a_command_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="had not ended after 1 s"):
        timed(["sh", "-c", "sleep 600 & echo $! >pid; wait"], cwd=tmp_path, env=environment(), patience=1.0)

    child = Path(f"/proc/{int((tmp_path / 'pid').read_text())}/stat")
    deadline = time.monotonic() + 10
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "the child lives on"
        time.sleep(0.02)


@pytest.mark.parametrize("making", [("nexa_infra", "sweep"), ("benchmarks.past_run",)])
def test_a_made_run_reads_as_a_real_one_and_its_place_is_removed(making: tuple[str, ...]) -> None:
    with place() as here:
        here.python("-m", *making, here.sweep(5))
        status = here.python("-m", "nexa_infra", "status", "latest").stdout
        assert "done" in status
        assert "5 completed" in status
        assert own_time(here.home).total > 0

    assert not here.folder.exists()
