"""A client's copy of many small files: real shells pack them, and what is kept is read back."""

import json
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nexa_infra.errors import HostError, NexaError
from nexa_infra.runs.attempts import read_attempts
from nexa_infra.runs.directory import RunDirectory
from nexa_infra.runs.metrics import metrics_of
from nexa_infra.runs.record import Run
from nexa_infra.scheduling.slurm import brought


class Copied:
    """A run directory, and a client's copy of it elsewhere."""

    def __init__(self, folder: Path) -> None:
        self.far, self.near = RunDirectory(folder / "far"), RunDirectory(folder / "near")
        for each in (self.far, self.near):
            each.status.mkdir(parents=True)
            each.trials.mkdir()
        self.run = cast(Run, SimpleNamespace(id="r", files=self.near))
        self.known: set[bytes] = set()

    def ask(self, script: str) -> str:
        """Run a script in the run directory, as a poll does."""
        done = subprocess.run(["sh", "-c", script], cwd=self.far.path, capture_output=True, check=True)
        return done.stdout.decode("utf-8", "surrogateescape")

    def bring(self, since: float | None = None) -> bool:
        return brought.keep_lines(self.run, self.known, self.ask(brought.status_lines(since)))

    def write(self, name: str, text: str) -> None:
        with (self.far.status / name).open("a") as stream:
            stream.write(text)

    def measure(self, trial: int, metrics: Any) -> None:
        self.far.trial(trial).mkdir(exist_ok=True)
        self.far.metrics(trial).write_text(json.dumps(metrics))


@pytest.fixture
def copied(tmp_path: Path) -> Copied:
    return Copied(tmp_path)


def start(trial: int, attempt: int = 1, moment: float = 100.0) -> str:
    return f"start\t{trial}\t{attempt}\t{moment}\tn1\t0\n"


def end(trial: int, attempt: int = 1, moment: float = 101.0) -> str:
    return f"end\t{trial}\t{attempt}\t{moment}\t0\t\n"


def test_each_line_is_kept_once_and_read_as_from_the_files_themselves(copied: Copied) -> None:
    for task in range(3):
        copied.write(f"7_{task}", start(task))
    assert copied.bring()
    assert read_attempts(copied.near) == read_attempts(copied.far)
    copied.write("7_1", end(1))
    copied.write("7_2", end(2) + start(2, 2))
    assert copied.bring() and copied.bring()
    assert read_attempts(copied.near) == read_attempts(copied.far)
    lines = copied.near.brought.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 6
    assert [each.name for each in copied.near.status.iterdir()] == ["brought"]


def test_another_process_and_another_client_go_on_with_the_same_copy(copied: Copied) -> None:
    copied.write("7_0", start(0))
    copied.bring()
    copied.known = set()  # as a new process begins
    copied.write("7_0", end(0))
    copied.bring()
    assert copied.near.brought.read_text() == start(0) + end(0)
    # What another one has added meanwhile may come twice, and is one attempt.
    with copied.near.brought.open("a") as stream:
        stream.write(start(1))
    copied.write("7_1", start(1))
    copied.bring()
    assert list(read_attempts(copied.near)) == [0, 1]


def test_a_copy_that_was_removed_is_brought_whole_again(copied: Copied) -> None:
    copied.write("7_0", start(0))
    copied.bring()
    assert list(read_attempts(copied.near)) == [0]
    copied.near.brought.unlink()
    copied.write("7_0", end(0))
    copied.bring()
    assert read_attempts(copied.near) == read_attempts(copied.far)


@pytest.mark.parametrize("cut", range(1, len(start(0))))
def test_a_line_that_is_being_written_hides_no_other_and_comes_when_it_is_whole(copied: Copied, cut: int) -> None:
    """However the files are ordered: each stands before the other once."""
    for torn, whole in (("7_0", "7_1"), ("8_1", "8_0")):
        copied.write(torn, start(0)[:cut])
        copied.write(whole, start(1))
    copied.bring()
    assert list(read_attempts(copied.near)) == [1]
    copied.write("7_0", start(0)[cut:])
    copied.bring()
    assert read_attempts(copied.near) == read_attempts(copied.far)


@pytest.mark.parametrize("written", [1, 17, len(start(0)) - 1])
def test_a_client_that_ended_in_the_middle_of_a_line_hides_none(copied: Copied, written: int) -> None:
    copied.write("7_0", start(0))
    copied.write("7_1", start(1))
    copied.near.brought.write_text(start(0)[:written])
    copied.bring()
    assert read_attempts(copied.near) == read_attempts(copied.far)


def test_what_has_not_changed_since_does_not_come(copied: Copied) -> None:
    import os

    copied.write("7_0", start(0))
    copied.write("7_1", start(1))
    os.utime(copied.far.status / "7_0", (1000, 1000))
    assert copied.bring(since=time.time())
    assert list(read_attempts(copied.near)) == [1]


def test_what_could_not_be_read_is_said(copied: Copied) -> None:
    copied.far.status.rmdir()
    assert not copied.bring()


@pytest.mark.parametrize("told", ["", "x", "H4sIAAAAAAAAAysuSSwqUTA"])
def test_a_damaged_answer_is_an_error_and_nothing_is_kept(copied: Copied, told: str) -> None:
    with pytest.raises(HostError, match="the status files of run r did not come whole"):
        brought.keep_lines(copied.run, copied.known, told)
    assert not copied.near.brought.exists()


def test_metrics_are_those_that_came_last(copied: Copied) -> None:
    copied.measure(0, {"loss": 0.5, "at": {"epoch": 3}})
    copied.measure(12, {"loss": 0.25})
    copied.far.trial(12).joinpath("metrics.json.tmp").write_text("{")
    brought.keep_metrics(copied.run, copied.ask(brought.metrics_files()))
    measured = metrics_of(copied.near)
    assert (measured(0), measured(12), measured(1)) == ({"loss": 0.5, "at.epoch": 3}, {"loss": 0.25}, {})
    # A retry has put aside what an attempt before it has measured; a copy of that is none any more.
    copied.near.trial(0).mkdir()
    copied.far.metrics(0).rename(copied.near.metrics(0))
    brought.keep_metrics(copied.run, copied.ask(brought.metrics_files()))
    assert metrics_of(copied.near)(0) == {}
    assert metrics_of(copied.far)(12) == {"loss": 0.25}


def test_of_no_metrics_at_all_there_are_none(copied: Copied) -> None:
    brought.keep_metrics(copied.run, copied.ask(brought.metrics_files()))
    assert metrics_of(copied.near)(0) == {}


def test_metrics_that_did_not_come_whole_replace_none(copied: Copied) -> None:
    copied.measure(0, {"loss": 0.5})
    told = copied.ask(brought.metrics_files())
    brought.keep_metrics(copied.run, told)
    packed = copied.near.metrics_pack.read_bytes()
    begin = told.index("\n") + 1
    for cut in [*range(begin, len(told)), 0]:
        with pytest.raises(HostError, match="the metrics of run r did not come whole"):
            brought.keep_metrics(copied.run, told[:cut])
    # An archive that tar could not end, in a stream that gzip did.
    ended = "find trials -name metrics.json -print0 | tar -cf - --null -T - | head -c 1024 | gzip -1c"
    with pytest.raises(HostError, match="did not come whole"):
        brought.keep_metrics(copied.run, told[:begin] + copied.ask(ended))
    assert copied.near.metrics_pack.read_bytes() == packed


def test_a_damaged_pack_says_what_to_do(copied: Copied) -> None:
    copied.near.metrics_pack.write_bytes(b"no archive")
    with pytest.raises(NexaError, match=r"metrics\.tar\.gz cannot be read: .*; remove it, and collect again"):
        metrics_of(copied.near)
