"""Status files, which are read again only where they have changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nexa_infra.runs.attempts import read_attempts
from nexa_infra.runs.directory import RunDirectory


@pytest.fixture
def files(tmp_path: Path) -> RunDirectory:
    (tmp_path / "status").mkdir()
    return RunDirectory(tmp_path)


def start(trial: int, attempt: int = 1, moment: float = 10.0) -> str:
    return f"start\t{trial}\t{attempt}\t{moment}\tn1\t0\n"


def end(trial: int, attempt: int = 1, code: int = 0) -> str:
    return f"end\t{trial}\t{attempt}\t20.0\t{code}\t\n"


def ends(files: RunDirectory) -> dict[int, list[int | None]]:
    return {trial: [each.exit_code for each in tried] for trial, tried in read_attempts(files).items()}


def settle(path: Path, seconds: float) -> None:
    """Make a file as old as one that is not looked at twice."""
    os.utime(path, (seconds, seconds))


def test_what_is_added_is_read_and_nothing_else_is_forgotten(files: RunDirectory) -> None:
    one, two = files.status / "7_0", files.status / "7_1"
    one.write_text(start(0))
    two.write_text(start(1) + end(1, code=3))
    settle(one, 1000)
    settle(two, 1000)
    assert ends(files) == {0: [None], 1: [3]}
    with one.open("a") as stream:
        stream.write(end(0))
    assert ends(files) == {0: [0], 1: [3]}
    (files.status / "8_0").write_text(start(1, 2) + end(1, 2))
    assert ends(files) == {0: [0], 1: [3, 0]}


def test_what_a_crash_tore_is_read_once_it_is_whole(files: RunDirectory) -> None:
    path = files.status / "7_0"
    path.write_text(start(0) + "end\t0\t1\t20.0\t")
    assert ends(files) == {0: [None]}
    path.write_text(start(0) + "end\t0\t1\t20.0\t" + start(0, 2))
    assert ends(files) == {0: [None, None]}


def test_a_copy_that_is_brought_anew_is_read_anew(files: RunDirectory) -> None:
    path = files.status / "7_0"
    path.write_text(start(0))
    settle(path, 1000)
    assert ends(files) == {0: [None]}
    staged = files.path / "staged"
    staged.write_text(start(0) + end(0, code=5))
    settle(staged, 1000)
    staged.replace(path)
    assert ends(files) == {0: [5]}


def test_what_is_rewritten_within_a_moment_and_looks_the_same_is_read(files: RunDirectory) -> None:
    path = files.status / "7_0"
    path.write_text(start(0) + end(0, code=1))
    assert ends(files) == {0: [1]}
    before = path.stat()
    path.write_text(start(0) + end(0, code=2))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert ends(files) == {0: [2]}


def test_another_run_in_the_same_place_starts_afresh(files: RunDirectory) -> None:
    path = files.status / "7_0"
    path.write_text(start(0) + end(0))
    settle(path, 1000)
    assert ends(files) == {0: [0]}
    path.unlink()
    assert ends(files) == {}
    (files.status / "9_0").write_text(start(4))
    assert ends(files) == {4: [None]}


def test_a_caller_may_change_what_it_was_given(files: RunDirectory) -> None:
    (files.status / "7_0").write_text(start(0) + end(0))
    found = read_attempts(files)
    found[0].clear()
    found[9] = []
    assert ends(files) == {0: [0]}
    files.status.joinpath("7_0").unlink()
    assert read_attempts(RunDirectory(files.path / "nowhere")) == {}
