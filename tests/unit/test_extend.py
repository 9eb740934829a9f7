"""Extending a sweep: what an earlier run has finished is left out of a new one, known by its parameters."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexa_infra import extend_sweep, launch_slurm_sweep, launch_training_job
from nexa_infra.errors import ConfigError, NexaError, RunFailedError
from nexa_infra.monitoring.report_model import Extended
from nexa_infra.monitoring.report_text import ranges
from nexa_infra.operations import manage
from nexa_infra.operations.comparison import compare
from nexa_infra.operations.extend import Finished, finished_in, plan_extension
from nexa_infra.runs.directory import mark_cancelled
from nexa_infra.runs.index import known_runs
from nexa_infra.runs.record import Run, read_run
from nexa_infra.spec.run import SweepConfig, TrainingConfig
from nexa_infra.spec.sweep import SweepDefinition, spans_of, trial_hash

# A trial says which it is; where both its values are b, it fails until it is mended.
SCRIPT = 'echo "$1$2" >>"$ran"; while [ -e "$ran.held" ]; do sleep 0.05; done; [ "$1$2" != bb ] || [ -e "$ran.mended" ]'


@pytest.fixture(autouse=True)
def project(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("NEXA_POLL_SECONDS", "0.05")
    (folder / "train.py").write_text("")
    return folder


def a_sweep(project: Path, **sweep: Any) -> SweepConfig:
    return SweepConfig.model_validate(
        {
            "job": {"name": "grid", "time": "10:00", "env": {"ran": str(project.parent / "ran.txt")}},
            "launcher": {"type": "command", "command": ["bash", "-c", SCRIPT, "trial", "{x}", "{y}"]},
            "sweep": sweep,
        }
    )


def ran(project: Path) -> list[str]:
    """What has run since the last time."""
    file = project.parent / "ran.txt"
    found = sorted(file.read_text().split()) if file.exists() else []
    file.unlink(missing_ok=True)
    return found


@pytest.fixture
def first(project: Path) -> Run:
    """A run of four trials, one of which has failed."""
    with pytest.raises(RunFailedError):
        launch_slurm_sweep(a_sweep(project, parameters={"x": ["a", "b"], "y": ["a", "b"]}), submit=True)
    assert ran(project) == ["aa", "ab", "ba", "bb"]
    return manage.find("latest")


def larger(project: Path) -> SweepConfig:
    """A sweep that holds the first one's trials, and more, in another order."""
    return a_sweep(project, parameters={"y": ["c", "b", "a"], "x": ["b", "a"]})


def test_only_what_the_earlier_run_has_not_finished_is_run(project: Path, first: Run) -> None:
    (project.parent / "ran.txt.mended").touch()
    done = extend_sweep(first.id, larger(project), submit=True)
    assert ran(project) == ["ac", "bb", "bc"]
    assert done.report is not None and done.report.extends is not None and done.report.end == "done"
    assert done.report.extends == Extended(first.id, finished=3, trials=6)
    told = f"{first.id}: 3 of 6 trials finished there"
    run = manage.find(done.run_id)
    assert told in run.files.report_markdown.read_text()

    record = read_run(Path(run.directory))
    assert record.labels == {"extends": first.id}
    assert isinstance(record.config, SweepConfig) and record.config.sweep.parameters == larger(project).sweep.parameters
    assert record.config.sweep.finished == "3-5"
    assert [pair.hash for pair in compare(first, run) if pair.left and pair.right] == [trial_hash({"x": "b", "y": "b"})]


def test_a_preview_says_what_is_left_out_and_writes_nothing(project: Path, first: Run, home: Path) -> None:
    before = sorted(home.rglob("*"))
    shown = extend_sweep(first.id, larger(project))
    assert shown.trials == 3 and not shown.submitted
    assert shown.notes[0] == f"extends {first.id}: 3 of 6 trials finished there"
    assert sorted(home.rglob("*")) == before and ran(project) == []


def test_what_an_extended_run_had_left_out_is_finished_too(project: Path, first: Run) -> None:
    (project.parent / "ran.txt.mended").touch()
    second = extend_sweep(first, larger(project), submit=True).run_id
    ran(project)
    whole = a_sweep(project, parameters={"x": ["a", "b", "d"], "y": ["a", "b", "c"]})
    third = extend_sweep(second, whole, submit=True).run_id
    assert ran(project) == ["da", "db", "dc"]
    with pytest.raises(NexaError, match=r"all 9 trials of the sweep finished in run .*: there is nothing left to run"):
        extend_sweep(third, whole)


def test_a_run_that_extends_another_is_resumed(project: Path, first: Run, home: Path) -> None:
    (project / "larger.yaml").write_text(larger(project).model_dump_json(exclude={"kind"}, exclude_unset=True))
    (project.parent / "ran.txt.mended").touch()
    held = project.parent / "ran.txt.held"
    held.touch()
    words = [sys.executable, "-m", "nexa_infra", "extend", first.id, "larger.yaml", "--set", "job.array_parallelism=1"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as client:
        limit = time.monotonic() + 20
        while not (project.parent / "ran.txt").exists() and time.monotonic() < limit:
            time.sleep(0.05)
        client.terminate()
        said = client.communicate()[1]
    assert client.returncode == 143 and f"extends {first.id}: 3 of 6 trials finished there" in said, said
    held.unlink()
    assert ran(project) == ["bc"]
    run = next(entry.id for entry in known_runs(home) if entry.id != first.id)
    done = launch_slurm_sweep(None, submit=True, resume=run)
    assert ran(project) == ["ac", "bb", "bc"]
    assert done.report is not None and done.report.states == {"completed": 3}
    assert done.report.extends is not None and done.report.extends.run_id == first.id


def test_nothing_is_written_where_nothing_is_left(project: Path, first: Run, home: Path) -> None:
    before = sorted(home.rglob("*"))
    with pytest.raises(NexaError, match=rf"the only trial of the sweep finished in run {first.id}: there is nothing"):
        extend_sweep(first, a_sweep(project, trials=[{"y": "a", "x": "b"}]), submit=True)
    assert sorted(home.rglob("*")) == before


def test_a_run_that_has_not_ended_is_not_extended(project: Path, first: Run) -> None:
    # Written a moment ago, and not yet submitted.
    for file in first.files.submissions.iterdir():
        file.unlink()
    with pytest.raises(NexaError, match=rf"run {first.id} is still running: wait for its end, or `nexa-infra cancel"):
        plan_extension(first.model_copy(update={"created_at": datetime.now(UTC)}), larger(project))


def test_a_training_neither_extends_nor_is_extended(project: Path, first: Run, home: Path) -> None:
    training = TrainingConfig.model_validate({"launcher": {"type": "command", "command": ["true"]}})
    with pytest.raises(ConfigError, match="this is a training, not a sweep: only a sweep extends another"):
        extend_sweep(first, training)  # type: ignore[arg-type]
    launch_training_job(training)
    with pytest.raises(ConfigError, match=r"run .* is a training: only a sweep can be extended"):
        extend_sweep(next(each.id for each in known_runs(home) if each.id != first.id), larger(project))


def test_a_point_that_stands_there_twice_is_left_out_as_often_as_it_has_finished(project: Path) -> None:
    twice = a_sweep(project, trials=[{"x": "a", "y": "a"}, {"x": "a", "y": "b"}, {"x": "a", "y": "a"}])
    once = Finished("earlier", Counter([trial_hash({"x": "a", "y": "a"})]))
    left = once.left_of(twice).sweep
    assert [left.parameters_of(trial) for trial in range(len(left))] == [{"x": "a", "y": "b"}, {"x": "a", "y": "a"}]


@given(st.data())
def test_what_is_left_is_what_was_not_finished_whatever_the_grids(data: st.DataObject) -> None:
    values = st.lists(st.sampled_from("abcd"), min_size=1, max_size=4, unique=True)
    sweep = {"parameters": {name: data.draw(values) for name in "xy"}}
    rules = (
        [{"x": sweep["parameters"]["x"][0]}] if len(sweep["parameters"]["x"]) > 1 and data.draw(st.booleans()) else []
    )
    config = a_sweep(Path("/nowhere"), **sweep, exclude=rules)
    every = [config.sweep.parameters_of(trial) for trial in range(len(config.sweep))]
    done = data.draw(st.lists(st.sampled_from(every), max_size=len(every) - 1, unique_by=trial_hash))
    left = Finished("earlier", Counter(map(trial_hash, done))).left_of(config).sweep
    assert [left.parameters_of(trial) for trial in range(len(left))] == [one for one in every if one not in done]
    assert SweepDefinition.model_validate_json(left.model_dump_json()) == left


@given(st.sets(st.integers(0, 200)))
def test_spans_are_read_as_they_are_written(numbers: set[int]) -> None:
    spans = spans_of(ranges(sorted(numbers)))
    assert list(chain.from_iterable(range(first, last + 1) for first, last in spans)) == sorted(numbers)


@pytest.mark.parametrize(
    ("finished", "said"),
    [("2", "names points that are not"), ("0-1", "leaves none of the 2 points"), ("a", "is no list of points")],
)
def test_finished_points_that_cannot_be_are_told(finished: str, said: str, project: Path) -> None:
    with pytest.raises(ValueError, match=said):
        a_sweep(project, parameters={"x": ["a", "b"]}, overrides={"y": "c"}, finished=finished)


def test_a_cancelled_run_is_extended_by_what_it_has_finished(project: Path, first: Run) -> None:
    mark_cancelled(first.files, "by hand", by="person")
    assert sum(finished_in(first).hashes.values()) == 3
