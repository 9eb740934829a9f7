"""Trials as a table: how they are judged, and what survives torn lines, odd metrics and hostile names."""

from __future__ import annotations

import csv
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nexa_infra.runs.attempts import Attempt, TaskState, TrialState, judge, read_attempts, read_states
from nexa_infra.runs.directory import RunDirectory
from nexa_infra.runs.metrics import read_metrics
from nexa_infra.runs.results import Trial, read_results, read_trials, write_results
from nexa_infra.spec.sweep import SweepDefinition


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(tmp_path / "run")
    made.status.mkdir(parents=True)
    return made


# ---- judging ----

STARTED = Attempt(0, 1, 100.0, "n1")
GOOD = replace(STARTED, ended=110.0, exit_code=0)
BAD = replace(GOOD, exit_code=3)
TOLD = replace(GOOD, exit_code=143, signal="TERM")
TOLD_AND_GOOD = replace(GOOD, signal="TERM")
WARNED_AND_GOOD = replace(GOOD, signal="USR1")
KILLED = replace(GOOD, exit_code=137, signal="KILL")
WARNED = replace(GOOD, exit_code=143, signal="USR1", cause="timeout")
GAVE_WAY = replace(TOLD, cause="preempted")
STUCK = replace(WARNED, cause="stuck")


@pytest.mark.parametrize(
    ("attempts", "task", "cancelled", "expected"),
    [
        # Before it has started.
        ([], None, False, "pending"),
        ([], None, True, "cancelled"),
        ([], TaskState(1, "PENDING"), False, "pending"),
        ([], TaskState(1, "PENDING"), True, "cancelled"),
        ([], TaskState(1, "RUNNING"), False, "running"),
        ([], TaskState(1, "NODE_FAIL"), False, "node_fail"),
        ([], TaskState(1, "INTERRUPTED"), False, "interrupted"),
        # Its own word, which nothing outweighs.
        ([GOOD], None, False, "completed"),
        ([GOOD], TaskState(1, "COMPLETED", 0), False, "completed"),
        ([GOOD], TaskState(1, "CANCELLED", 143), True, "completed"),
        ([GOOD], TaskState(1, "INTERRUPTED"), False, "completed"),
        ([WARNED_AND_GOOD], None, False, "completed"),
        ([BAD], TaskState(1, "FAILED", 3), False, "failed"),
        ([BAD], None, True, "failed"),
        # Missing is not finished.
        ([STARTED], None, False, "interrupted"),
        ([STARTED], TaskState(1, "RUNNING"), False, "running"),
        ([STARTED], TaskState(1, "COMPLETED", 0), False, "interrupted"),
        ([STARTED], TaskState(1, "A STATE OF NEXT YEAR"), False, "interrupted"),
        # Somebody else ended it: the scheduler says who.
        ([KILLED], TaskState(1, "OUT_OF_MEMORY", 137), False, "out_of_memory"),
        ([KILLED], TaskState(1, "FAILED", 137), False, "failed"),
        ([TOLD], TaskState(1, "TIMEOUT", 143), False, "timeout"),
        ([TOLD_AND_GOOD], TaskState(1, "TIMEOUT", 0), False, "timeout"),
        ([TOLD], TaskState(1, "CANCELLED", 143), True, "cancelled"),
        ([TOLD], TaskState(1, "PREEMPTED"), False, "preempted"),
        ([TOLD], TaskState(1, "INTERRUPTED", 143), False, "interrupted"),
        ([TOLD], None, False, "interrupted"),
        ([TOLD_AND_GOOD], None, False, "interrupted"),
        # Its script says why: the scheduler saw only a job that failed, or that went back into the queue.
        ([WARNED], None, False, "timeout"),
        ([WARNED], TaskState(1, "FAILED", 143), False, "timeout"),
        ([WARNED], TaskState(1, "COMPLETED", 0), False, "timeout"),
        ([WARNED], TaskState(1, "CANCELLED", 143), True, "cancelled"),
        ([WARNED], TaskState(2, "PENDING"), False, "pending"),
        ([WARNED, replace(GOOD, number=2)], None, False, "completed"),
        ([GAVE_WAY], TaskState(1, "FAILED", 143), False, "preempted"),
        ([GAVE_WAY], TaskState(1, "INTERRUPTED"), False, "preempted"),
        ([STUCK], TaskState(1, "TIMEOUT", 143), False, "failed"),
        ([replace(STUCK, ended=None)], TaskState(1, "TIMEOUT"), False, "failed"),
        ([replace(WARNED, ended=None)], None, False, "timeout"),
        ([replace(WARNED, ended=None)], TaskState(1, "RUNNING"), False, "running"),
        ([replace(WARNED, ended=None)], TaskState(1, "NODE_FAIL"), False, "node_fail"),
        ([replace(WARNED, cause="a word of next year")], None, False, "failed"),
        # The newest attempt counts, also before it has started.
        ([BAD, replace(GOOD, number=2)], None, False, "completed"),
        ([BAD], TaskState(2, "PENDING"), False, "pending"),
        ([BAD], TaskState(2, "PENDING"), True, "cancelled"),
        ([GOOD, replace(STARTED, number=2)], None, False, "interrupted"),
    ],
)
def test_a_trial_is_judged_by_its_own_lines_first(
    attempts: list[Attempt], task: TaskState | None, cancelled: bool, expected: TrialState
) -> None:
    assert judge(attempts, task, cancelled=cancelled) == expected


def test_a_script_that_was_killed_ends_when_the_scheduler_saw_it(directory: RunDirectory) -> None:
    (directory.status / "7_0").write_text("start\t0\t1\t100.5\tn1\n")
    states, attempts = read_states(directory, 2, {0: TaskState(1, "OUT_OF_MEMORY", 137, ended=130.5)})
    assert states == ["out_of_memory", "pending"]
    assert attempts[0][0].seconds == 30.0
    assert attempts[0][0].exit_code == 137


# ---- status lines ----


def test_attempts_are_read_in_order_whatever_file_they_are_in(directory: RunDirectory) -> None:
    (directory.status / "8_0").write_text("start\t3\t2\t200\tn2\nend\t3\t2\t210\t0\t\n")
    (directory.status / "7_3").write_text("start\t3\t1\t100\tn1\nend\t3\t1\t101.5\t1\tUSR1 TERM\n")
    first, second = read_attempts(directory)[3]
    assert first == Attempt(3, 1, 100.0, "n1", 101.5, 1, "USR1 TERM")
    assert second == Attempt(3, 2, 200.0, "n2", 210.0, 0, None)


def test_an_attempt_knows_what_ended_it(directory: RunDirectory) -> None:
    (directory.status / "7_3").write_text(
        "start\t3\t1\t100\tn1\nwhy\t3\t1\tstuck\nwhy\t3\t1\ttimeout\nend\t3\t1\t101.5\t143\tUSR1\n"
        "start\t3\t2\t200\tn1\nwhy\t3\t2\tpreewhy\t3\t2\tpreempted\nwhy\t3\t3\ttimeout\n"
    )
    first, second = read_attempts(directory)[3]
    assert (first.cause, first.signal) == ("timeout", "USR1"), "its last word counts"
    assert second == Attempt(3, 2, 200.0, "n1", cause="preempted")


@pytest.mark.parametrize(
    ("cause", "state", "words"),
    [
        ("timeout", "timeout", "ended after the warning that its walltime would soon be over"),
        ("preempted", "preempted", "gave way to a job with a better claim"),
        ("stuck", "failed", "came to its walltime twice without a new checkpoint: chained on, it would never end"),
    ],
)
def test_what_ended_a_trial_is_told_in_words(directory: RunDirectory, cause: str, state: str, words: str) -> None:
    (directory.status / "7_0").write_text(f"start\t0\t1\t100\tn1\nwhy\t0\t1\t{cause}\nend\t0\t1\t101\t143\tUSR1\n")
    sweep = SweepDefinition.model_validate({"parameters": {"lr": ["1", "2"]}})
    first, second = read_trials(directory, sweep, {0: TaskState(1, "FAILED", 143, words="the scheduler's")})
    assert (first.state, first.reason) == (state, words)
    assert (second.state, second.reason) == ("pending", "")


@pytest.mark.parametrize("length", range(len("end\t3\t1\t101.5\t0\t\n")))
def test_an_end_line_that_was_torn_is_no_end(directory: RunDirectory, length: int) -> None:
    whole = "start\t3\t1\t100\tn1\n"
    (directory.status / "7_3").write_text(whole + "end\t3\t1\t101.5\t0\t\n"[:length])
    assert read_attempts(directory) == {3: [Attempt(3, 1, 100.0, "n1")]}


@pytest.mark.parametrize("length", range(len("start\t3\t1\t100\tn1\n")))
def test_a_start_line_that_was_torn_is_no_attempt(directory: RunDirectory, length: int) -> None:
    (directory.status / "7_3").write_text("start\t3\t1\t100\tn1\n"[:length])
    assert read_attempts(directory) == {}


@pytest.mark.parametrize("length", range(len("end\t3\t1\t101.5\t0\t\n")))
def test_what_is_written_behind_a_torn_line_is_not_lost(directory: RunDirectory, length: int) -> None:
    torn = "start\t3\t1\t100\tn1\n" + "end\t3\t1\t101.5\t0\t\n"[:length]
    (directory.status / "7_3").write_text(f"{torn}start\t3\t2\t200\tn2\nend\t3\t2\t210\t0\t\n")
    assert read_attempts(directory)[3][-1] == Attempt(3, 2, 200.0, "n2", 210.0, 0)


def test_noise_among_status_lines_is_passed_over(directory: RunDirectory) -> None:
    (directory.status / "7_0").write_bytes(
        b"\xff\x00\n\nstart\tx\t1\t2\tn\nstart\t1\nstart\t5\t1\t100\tn\xc3\xa4\x0c1\nend\t9\t1\t2\t0\t\n"
    )
    (directory.status / "a folder").mkdir()
    assert read_attempts(directory) == {5: [Attempt(5, 1, 100.0, "nä\x0c1")]}


def test_a_run_without_status_files_has_no_attempts(tmp_path: Path) -> None:
    assert read_attempts(RunDirectory(tmp_path / "nowhere")) == {}


# ---- metrics ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            '{"loss": 0.5, "name": "a", "done": true, "nothing": null}',
            {"loss": 0.5, "name": "a", "done": True, "nothing": None},
        ),
        ('{"val": {"loss": 1, "top": {"5": 2}}}', {"val.loss": 1, "val.top.5": 2}),
        ('{"loss": Infinity}', {"loss": math.inf}),
        ('{"n": 123456789012345678901234567890}', {"n": 123456789012345678901234567890}),
        ('{"curve": [1, {"a": 2}]}', {"curve": [1, {"a": 2}]}),
        ('\ufeff{"loss": 1}', {"loss": 1}),
        # Half a surrogate pair can be said in JSON, and written in no file.
        (r'{"a\ud800": "b\udfff", "c": ["\ud800"]}', {r"a\ud800": r"b\udfff", "c": [r"\ud800"]}),
        ("{}", {}),
        # Not metrics.
        ("", {}),
        ('{"loss": 0.5', {}),
        ("[1, 2]", {}),
        ("0.5", {}),
        ("null", {}),
        ("loss: 0.5", {}),
        ('{"n": 1' + "0" * 5000 + "}", {}),
        ('{"a":' * 5000 + "1" + "}" * 5000, {}),
        ("[" * 100_000, {}),
    ],
)
def test_metrics_are_a_json_object_or_nothing(tmp_path: Path, text: str, expected: dict[str, Any]) -> None:
    path = tmp_path / "metrics.json"
    path.write_text(text, encoding="utf-8")
    assert read_metrics(path) == expected


def test_metrics_that_are_no_ordinary_file_hold_nothing_up(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "missing") == {}
    assert read_metrics(tmp_path) == {}
    os.mkfifo(tmp_path / "pipe")
    assert read_metrics(tmp_path / "pipe") == {}
    (tmp_path / "loop").symlink_to("loop")
    assert read_metrics(tmp_path / "loop") == {}
    (tmp_path / "bytes").write_bytes(b'{"loss": "\xff"}')
    assert read_metrics(tmp_path / "bytes") == {}
    with (tmp_path / "large").open("wb") as stream:
        stream.write(b'{"loss": 1}')
        stream.truncate(2**40)  # sparse
    assert read_metrics(tmp_path / "large") == {}


# ---- results.csv ----

HOSTILE = ["", " ", ",", '"', '""', "a\nb", "a\r\nb", "\r", "'", "=1+1", "\t", "é ☃ 𝄞", "\\", "#", "a;b", "\x7f"]
HOSTILE += ["x" * 10_000, "-", "010", "NULL", "\u2028", "\x0c", "\x00"]


def rows_of(path: Path) -> tuple[list[str], list[list[str]]]:
    with path.open(newline="", encoding="utf-8") as stream:
        header, *rows = csv.reader(stream)
    return header, rows


def test_hostile_values_and_names_come_back_from_the_csv_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    names = [f"p{text}" for text in HOSTILE]
    trials = [
        Trial(i, "0" * 12, dict.fromkeys(names, value), "completed", (GOOD,), metrics={f"m{value}": value})
        for i, value in enumerate(HOSTILE)
    ]
    write_results(path, trials)
    header, rows = rows_of(path)
    assert len(set(header)) == len(header)
    assert all(len(row) == len(header) for row in rows)
    for value, row in zip(HOSTILE, rows, strict=True):
        found = dict(zip(header, row, strict=True))
        assert {found[name] for name in names} == {value}
        assert found[f"m{value}"] == value
        assert all(found[f"m{other}"] == "" for other in HOSTILE if other != value)


def test_no_two_columns_have_one_name(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    parameters = {"state": "a", "parameters.state": "b", "lr": "c", "metrics.lr": "d"}
    metrics = {"state": 1, "lr": 2, "metrics.lr": 3, "metrics.metrics.lr": 4, "usd": 5, "parameters.state": 6}
    write_results(path, [Trial(0, "h", parameters, "failed", metrics=metrics)])
    header, (row,) = rows_of(path)
    found = dict(zip(header, row, strict=True))
    assert len(found) == len(header) == 7 + len(parameters) + len(metrics)
    assert found["state"] == "failed" and found["usd"] == ""
    assert [found[name] for name in ("parameters.parameters.state", "parameters.state", "lr", "metrics.lr")] == list(
        "abcd"
    )
    assert found["metrics.state"] == "1" and found["metrics.usd"] == "5"
    assert {found[name] for name in header[-6:]} == set("123456")


def test_values_are_written_as_a_program_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    metrics = {
        "whole": 10**30,
        "real": 0.1,
        "nan": math.nan,
        "inf": -math.inf,
        "yes": True,
        "no": None,
        "list": [1, "a"],
    }
    write_results(path, [Trial(0, "12e456789012", {"flag": True, "none": None, "text": "1e-4"}, metrics=metrics)])
    header, (row,) = rows_of(path)
    found = dict(zip(header, row, strict=True))
    assert [found[name] for name in ("flag", "none", "text")] == ["true", "", "1e-4"]
    assert [found[name] for name in metrics] == ["1" + "0" * 30, "0.1", "", "-Infinity", "true", "", '[1, "a"]']
    frame = read_results(path)
    assert frame["hash"][0] == "12e456789012", "a hash is never taken for a number"
    assert frame["inf"][0] == -math.inf and math.isnan(frame["nan"][0])
