"""metrics.jsonl, read as it grows."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from nexa_infra.runs import series
from nexa_infra.runs.series import LogReader, MetricsLog, Recorder, glance, read_log, thinned


def lines_of(*lines: dict[str, Any]) -> bytes:
    return "".join(f"{json.dumps(line)}\n" for line in lines).encode()


def log_of(data: bytes, starts: tuple[int, ...] = ()) -> MetricsLog:
    recorder = Recorder(starts)
    recorder.take(data)
    recorder.end()
    found = recorder.log()
    assert found is not None
    return found


def points_of(data: bytes) -> dict[str, tuple[tuple[float, float], ...]]:
    return {one.name: one.points for one in log_of(data).series}


def test_numbers_are_metrics_by_step() -> None:
    data = lines_of({"step": 10, "loss": 2, "accuracy": 0.5}, {"step": 20, "loss": 1.5, "note": "warm", "ok": True})
    assert points_of(data) == {"loss": ((10, 2), (20, 1.5)), "accuracy": ((10, 0.5),)}


@pytest.mark.parametrize(
    ("lines", "axis", "steps"),
    [
        ([{"epoch": 1, "a": 0}, {"epoch": 2, "a": 0}], "epoch", [1, 2]),
        ([{"iteration": 5, "a": 0}], "iteration", [5]),
        ([{"iteration": 5, "epoch": 1, "step": 7, "a": 0}], "step", [7]),
        ([{"a": 0}, {"a": 0}], "line", [1, 2]),
        ([{"step": True, "a": 0}, {"step": "9", "a": 0}, {"step": math.nan, "a": 0}], "line", [1, 2, 3]),
    ],
)
def test_a_line_stands_at_its_step_or_its_number(lines: list[dict[str, Any]], axis: str, steps: list[int]) -> None:
    (found,) = log_of(lines_of(*lines)).series
    assert (found.axis, [step for step, _ in found.points]) == (axis, steps)


def test_names_of_nested_objects_are_joined_by_dots() -> None:
    assert set(points_of(lines_of({"val": {"loss": 1, "top": {"k": 2}}, "list": [1]}))) == {"val.loss", "val.top.k"}


@pytest.mark.parametrize(
    ("lines", "place", "share"),
    [
        ([{"step": 40, "total_steps": 100, "a": 1}], "step 40/100", 0.4),
        ([{"max_steps": 80}, {"step": 40, "a": 1}], "step 40/80", 0.5),
        ([{"steps": 10}, {"iteration": 20, "a": 1}], "iteration 20/10", 1.0),
        ([{"step": 12000, "epoch": 3, "epochs": 4, "a": 1}], "epoch 3/4", 0.75),
        ([{"step": 1234, "a": 1}], "step 1,234", None),
        ([{"steps": 4, "a": 1}, {"a": 1}], "line 2/4", 0.5),
        ([{"step": 4, "total_steps": 0, "a": 1}], "step 4/0", None),
    ],
)
def test_progress_says_how_far_it_is(lines: list[dict[str, Any]], place: str, share: float | None) -> None:
    progress = log_of(lines_of(*lines)).progress
    assert (progress.place, progress.share) == (place, share)


def test_of_two_values_of_one_step_the_later_one_stands() -> None:
    first = lines_of({"step": 1, "loss": 3}, {"step": 2, "loss": 9}, {"step": 3, "loss": 8})
    again = lines_of({"step": 2, "loss": 2}, {"step": 3, "loss": 1})
    (loss,) = log_of(first + again, (len(first),)).series
    assert list(loss.points) == [(1, 3), (2, 2), (3, 1)]
    assert tuple(loss.last) == (3, 1)
    assert list(log_of(first + again, (len(first),)).marks) == [("step", 2)]


def test_what_is_no_json_object_is_passed_over() -> None:
    data = b'epoch 1\n\n[1, 2]\n"loss"\n{"loss": 1\n\xff\xfe\n{"loss": 2}\n{"a": {"b": \n12\n' + b"[" * 9000 + b"\n"
    assert points_of(data) == {"loss": ((7, 2),)}


def test_a_line_behind_what_a_killed_attempt_has_torn_is_read() -> None:
    whole = lines_of({"step": 5, "val": {"loss": 1}})
    for cut in range(1, len(whole) - 1):
        found = points_of(whole[:cut] + lines_of({"step": 6, "val": {"loss": 2}}))
        assert found["val.loss"] == ((6, 2),)


def test_a_torn_last_line_is_none_until_it_is_whole_and_one_without_a_line_end_counts_at_the_end() -> None:
    recorder = Recorder()
    recorder.take(b'{"step": 1, "loss": 1}\n{"step": 2, "lo')
    assert recorder.lines == 1
    recorder.take(b'ss": 0.5}')
    assert recorder.lines == 1
    recorder.end()
    found = recorder.log()
    assert found is not None
    assert found.series[0].points == ((1, 1), (2, 0.5))


def test_nan_and_infinity_are_told_with_their_step_and_the_line_goes_on() -> None:
    data = b'{"step": 1, "loss": 1}\n{"step": 2, "loss": NaN, "norm": -Infinity}\n{"step": 3, "loss": NaN}\n'
    recorder = Recorder()
    recorder.take(data + lines_of({"step": 4, "loss": 0.5, "big": 10**400}))
    assert [str(one) for one in recorder.unsound()] == [
        "loss is NaN at step 2",
        "norm is infinite at step 2",
        "big is infinite at step 4",
    ]
    # From the third line on, as an attempt would count that began there.
    third = data.index(b'{"step": 3')
    assert [str(one) for one in recorder.unsound(third)] == ["loss is NaN at step 3", "big is infinite at step 4"]
    assert [str(one) for one in recorder.unsound(len(data))] == ["big is infinite at step 4"]
    log = recorder.log()
    assert log is not None
    assert log.series[0].finite == ((1, 1), (4, 0.5))


def test_a_metric_has_a_bounded_number_of_points_with_its_lowest_and_highest() -> None:
    recorder = Recorder()
    for step in range(30_000):
        value = {12_345: -7.0, 23_456: 99.0}.get(step, math.sin(step))
        recorder.take(b'{"step": %d, "loss": %f}\n' % (step, value))
    log = recorder.log()
    assert log is not None
    (loss,) = log.series
    assert len(loss.points) <= series.MOST_POINTS
    assert (12_345, -7.0) in loss.points and (23_456, 99.0) in loss.points
    assert loss.points[0][0] == 0 and loss.points[-1][0] == 29_999


def test_thinned_points_keep_what_is_no_finite_number() -> None:
    points = [(float(step), math.nan if step == 500 else 1.0) for step in range(1000)]
    kept = thinned(points, 50)
    assert len(kept) <= 50
    assert [step for step, value in kept if math.isnan(value)] == [500.0]


def test_too_many_metrics_too_long_a_name_and_too_long_a_line_are_left_out() -> None:
    many = {f"m{number}": 1 for number in range(series.MOST_METRICS + 9)}
    assert len(points_of(lines_of({"x" * 999: 1, **many}))) == series.MOST_METRICS
    long = b'{"step": 1, "loss": 1, "text": "' + b"x" * series.MOST_LINE + b'"}\n'
    recorder = Recorder()
    for start in range(0, len(long), 100_000):
        recorder.take(long[start : start + 100_000])
    recorder.take(lines_of({"step": 2, "loss": 2}))
    log = recorder.log()
    assert log is not None
    assert log.series[0].points == ((2, 2),)


def test_half_a_character_in_a_name_can_be_written() -> None:
    (name,) = points_of(b'{"\\ud800loss": 1}\n')
    assert name.encode() == b"\\ud800loss"


def test_a_log_is_read_as_it_grows_each_byte_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reader = LogReader(path)
    assert reader.read() == 0
    assert reader.progress() is None
    path.write_bytes(lines_of({"step": 1, "loss": 1}) + b'{"st')
    assert reader.read() > 0
    assert reader.read() == 0
    with path.open("ab") as stream:
        stream.write(b'ep": 2, "loss": 0.5}\n')
    assert reader.read() == len(b'ep": 2, "loss": 0.5}\n')
    progress = reader.progress()
    assert progress is not None
    assert (str(progress), progress.lines) == ("step 2, loss 0.5", 2)
    assert progress.moment == path.stat().st_mtime


def test_a_log_that_is_begun_anew_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines_of({"step": 1, "loss": 1}, {"step": 2, "loss": 1}))
    reader = LogReader(path)
    reader.read()
    path.write_bytes(lines_of({"step": 1, "loss": 7}))
    reader.read()
    log = reader.recorder.log()
    assert log is not None
    assert log.series[0].points == ((1, 7),)


@pytest.mark.parametrize("kind", ["missing", "pipe", "folder", "device", "empty"])
def test_what_is_no_file_is_no_log_and_holds_nobody_up(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "metrics.jsonl"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
        case "empty":
            path.touch()
    assert read_log(path) is None
    assert glance(path) is None


def test_a_glance_reads_little_and_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    with_steps = [{"total_steps": 9000, "loss": 5}, *({"step": step, "loss": 1 / (step + 1)} for step in range(9000))]
    without = [{"loss": step} for step in range(9000)]
    monkeypatch.setattr(series, "_GLANCE", 4000)
    for lines in (with_steps, without, with_steps[:40], with_steps[:120]):
        path.write_bytes(lines_of(*lines))
        whole, glanced = read_log(path), glance(path)
        assert whole is not None and glanced is not None
        assert (glanced.place, glanced.latest, glanced.moment) == (
            whole.progress.place,
            whole.progress.latest,
            whole.progress.moment,
        )


def test_no_more_of_a_log_is_read_than_there_is_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series, "MOST_LOG", 1000)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines_of(*({"step": step, "loss": 1} for step in range(500))))
    reader = LogReader(path)
    while reader.read(300):
        pass
    assert reader.full and reader.recorder.taken == 1000
