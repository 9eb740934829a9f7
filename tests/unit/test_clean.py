"""What `clean` removes, and, above all, what it leaves."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nexa_infra.errors import NexaError
from nexa_infra.operations import manage, steps
from nexa_infra.operations.clean import GRACE_SECONDS, Leftover, leftovers, remove
from nexa_infra.runs.index import known_runs
from nexa_infra.runs.record import Run
from nexa_infra.scheduling.local import is_supervised
from nexa_infra.spec.run import SweepConfig

DAY = 86400.0


@pytest.fixture(autouse=True)
def project(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a little code in it, to be in."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "code.txt").write_text("code\n")
    monkeypatch.chdir(folder)
    return folder


def a_run(*, days: float = 0, code: str = "code\n", output_dir: Path | None = None) -> Run:
    """A run that never started, as if it had been made some days ago."""
    Path("code.txt").write_text(code)
    config = SweepConfig.model_validate(
        {
            "job": {"name": "test", **({"output_dir": str(output_dir)} if output_dir else {})},
            "launcher": {"type": "command", "command": ["true"]},
            "sweep": {"parameters": {"n": [1, 2]}},
        }
    )
    run = steps.render(steps.sync(steps.plan(config)))
    if days:
        record = json.loads(run.files.record.read_text())
        record["created_at"] = f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime(time.time() - days * DAY))}"
        run.files.record.write_text(json.dumps(record))
        backdate(run.files.record, days)
        backdate(snapshot_of(run), days)
    return run


def snapshot_of(run: Run) -> Path:
    assert run.snapshot is not None
    return Path(run.snapshot.path)


def backdate(path: Path, days: float) -> None:
    os.utime(path, (time.time() - days * DAY,) * 2)


def found(older: float) -> dict[Path, Leftover]:
    return {each.path: each for each in leftovers(older)[0]}


def clean(older: float) -> list[Path]:
    gone = leftovers(older)[0]
    for each in gone:
        remove(each)
    return [each.path for each in gone]


@pytest.fixture
def grace_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nexa_infra.operations.clean.GRACE_SECONDS", -1.0)


def test_old_runs_go_with_the_snapshots_that_only_they_used() -> None:
    old, older, new = a_run(days=40), a_run(days=50, code="other\n"), a_run()
    assert snapshot_of(old) == snapshot_of(new) != snapshot_of(older)
    gone = clean(30 * DAY)
    assert gone == [older.files.path, old.files.path, snapshot_of(older)], "runs first, the oldest first"
    assert not any(path.exists() for path in gone)
    assert new.files.path.exists() and snapshot_of(new).exists()
    assert [entry.id for entry in known_runs(manage.home())] == [new.id]


def test_sizes_and_inodes_are_those_of_the_folder() -> None:
    run = a_run(days=40)
    (run.files.trials / "0").mkdir()
    (run.files.trials / "0" / "model.bin").write_bytes(b"x" * 100_000)
    (run.files.trials / "0" / "link").symlink_to("/usr")
    leftover = found(30 * DAY)[run.files.path]
    assert leftover.kind == "run"
    assert leftover.files == sum(1 for _ in run.files.path.rglob("*")) + 1
    assert 100_000 < leftover.size < 150_000


def test_looking_removes_nothing() -> None:
    run = a_run(days=40)
    assert set(found(30 * DAY)) == {run.files.path, snapshot_of(run)}
    assert run.files.path.exists() and snapshot_of(run).exists()


def test_a_report_makes_a_run_young_again() -> None:
    run = a_run(days=40)
    run.files.report_json.write_text("{}")
    assert not found(30 * DAY)
    backdate(run.files.report_json, 35)
    assert run.files.path in found(30 * DAY)


def test_a_run_that_is_just_being_made_stays_whatever_is_asked() -> None:
    run = a_run()  # between its record and its submission
    assert not found(0)
    with pytest.raises(NexaError, match="it stays"):
        remove(Leftover("run", run.files.path, 0, 0, 0.0))
    run.files.refused.write_text("too dear\n")
    assert run.files.path in found(0)


def test_everything_that_has_ended_is_older_than_no_time(grace_is_over: None) -> None:
    run = a_run()
    assert set(clean(0)) == {run.files.path, snapshot_of(run)}
    assert leftovers(0) == ([], [])


def test_a_snapshot_that_was_just_used_stays_whatever_is_asked() -> None:
    """A run that is being made has its snapshot first, and its directory a moment later."""
    run = a_run(days=40)
    shutil.rmtree(run.files.path)
    backdate(snapshot_of(run), 40)
    assert snapshot_of(run) in found(0)
    config = run.config.model_copy()
    steps.sync(steps.plan(config))  # takes the old snapshot up again
    assert not found(0)
    backdate(snapshot_of(run), (GRACE_SECONDS + 5) / DAY)
    assert snapshot_of(run) in found(0)


def test_a_snapshot_that_is_taken_up_while_it_is_cleaned_stays() -> None:
    old = a_run(days=40)
    shutil.rmtree(old.files.path)
    (leftover,) = leftovers(30 * DAY)[0]
    new = a_run()  # of the same code
    with pytest.raises(NexaError, match="is in use again: it stays"):
        remove(leftover)
    backdate(snapshot_of(new), 40)  # as long as the run is there, its age does not matter
    with pytest.raises(NexaError, match="is in use again: it stays"):
        remove(leftover)
    assert snapshot_of(new).exists()


def test_a_snapshot_that_is_taken_up_while_it_is_removed_stays() -> None:
    old = a_run(days=40)
    shutil.rmtree(old.files.path)
    (leftover,) = leftovers(30 * DAY)[0]
    new = a_run()
    with pytest.raises(NexaError, match="is in use again: it stays"):
        remove(leftover)
    assert leftover.path == snapshot_of(new)
    assert (new.files.code / "code.txt").read_text() == "code\n"


SLEEPER = """
import sys
from nexa_infra import launch_slurm_sweep
from nexa_infra.spec.run import SweepConfig
launch_slurm_sweep(SweepConfig.model_validate_json(sys.stdin.read()), submit=True)
"""


@pytest.fixture
def running() -> Iterator[Run]:
    """A run that goes on until its client is killed."""
    config = SweepConfig.model_validate(
        {"launcher": {"type": "command", "command": ["bash", "-c", "sleep 300"]}, "sweep": {"parameters": {"n": [1]}}}
    )
    client = subprocess.Popen([sys.executable, "-c", SLEEPER], stdin=subprocess.PIPE, text=True)
    try:
        assert client.stdin is not None
        with client.stdin:
            client.stdin.write(config.model_dump_json(exclude_defaults=True))
        deadline = time.monotonic() + 15
        while not (known := known_runs(manage.home())) or not any(manage.find("latest").files.status.iterdir()):
            assert time.monotonic() < deadline, f"it never came: {known}"
            time.sleep(0.05)
        yield manage.find("latest")
    finally:
        client.send_signal(signal.SIGKILL)
        client.wait()


def test_a_run_that_runs_is_never_removed(running: Run, grace_is_over: None) -> None:
    assert not found(0)
    leftover = Leftover("run", running.files.path, 0, 0, 0.0)  # as if it had been resumed since it was listed
    with pytest.raises(NexaError, match="is running again: it stays"):
        remove(leftover)
    assert is_supervised(running.files)
    assert running.files.record.exists() and snapshot_of(running).exists()


def test_a_run_that_is_being_submitted_stays() -> None:
    run = a_run(days=40)
    leftover = found(30 * DAY)[run.files.path]
    with (run.files.submissions / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(NexaError, match="is being submitted: it stays"):
            remove(leftover)
    assert run.files.record.exists()


def test_a_run_elsewhere_stays_and_so_does_its_snapshot(tmp_path: Path) -> None:
    run = a_run(days=40, output_dir=tmp_path / "elsewhere")
    gone, stays = leftovers(30 * DAY)
    assert gone == []
    (staying,) = stays
    assert staying.path == run.files.path
    assert "remove it by hand" in staying.reason
    with pytest.raises(NexaError, match="it stays"):
        remove(Leftover("run", run.files.path, 0, 0, 0.0))
    assert run.files.record.exists() and snapshot_of(run).exists()


def test_a_linked_run_is_not_followed(tmp_path: Path) -> None:
    run = a_run(days=40)
    place = tmp_path / "big disk" / run.id
    shutil.move(run.directory, place)
    run.files.path.symlink_to(place)
    gone, stays = leftovers(30 * DAY)
    assert gone == [] and [each.path for each in stays] == [run.files.path]
    with pytest.raises(NexaError, match="it stays"):
        remove(Leftover("run", run.files.path, 0, 0, 0.0))
    assert (place / "run.json").exists() and run.files.path.is_symlink() and snapshot_of(run).exists()


def test_a_link_inside_a_run_is_removed_and_what_it_leads_to_stays(tmp_path: Path, grace_is_over: None) -> None:
    run = a_run(days=40)
    data = tmp_path / "data"
    data.mkdir()
    (data / "set.bin").write_text("precious\n")
    (run.files.trials / "data").symlink_to(data)
    (run.files.trials / "set.bin").symlink_to(data / "set.bin")
    (snapshot_of(run) / "data").symlink_to(data)
    backdate(snapshot_of(run), 40)
    assert set(clean(30 * DAY)) == {run.files.path, snapshot_of(run)}
    assert (data / "set.bin").read_text() == "precious\n"


def test_folders_that_are_read_only_go_too() -> None:
    run = a_run(days=40)
    sealed = run.files.trials / "0" / "sealed"
    sealed.mkdir(parents=True)
    (sealed / "file").touch()
    sealed.chmod(0o500)
    (run.files.trials / "0").chmod(0o500)
    assert run.files.path in clean(30 * DAY)
    assert not run.files.path.exists()


@pytest.mark.parametrize("damage", ["record", "submission"])
def test_a_damaged_run_stays_with_its_snapshot_and_the_others_go(damage: str) -> None:
    damaged, other = a_run(days=40), a_run(days=40, code="other\n")
    path = damaged.files.record if damage == "record" else damaged.files.submission(1)
    path.write_text("{")
    gone, stays = leftovers(30 * DAY)
    assert {each.path for each in gone} == {other.files.path, snapshot_of(other)}
    assert [each.path for each in stays] == [damaged.files.path]
    assert "run.json is not" in stays[0].reason or "damaged" in stays[0].reason


def test_what_crashes_left_goes_once_it_is_old(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run()
    left = [
        home / "snapshots" / ".staging-0123456789abcdef",
        home / "snapshots" / ".deleting-0123456789abcdef",
        home / "runs" / ".deleting-20260101-000000-old-abcd",
        home / "runs" / "20260101-000000-half-made-abcd",
    ]
    for path in left:
        (path / "submissions").mkdir(parents=True)
    (left[2] / "run.json").write_text("{}")
    assert not found(0), "they may belong to somebody who is at work"
    monkeypatch.setattr("nexa_infra.operations.clean.GRACE_SECONDS", -1.0)
    assert not found(DAY)
    shutil.copytree(run.files.path, kept := home / "runs" / "kept", symlinks=True)
    (kept / "run.json").unlink()
    (kept / "trials" / "0").mkdir()
    run.files.report_json.write_text("{}")
    backdate(run.files.report_json, -1)  # it was used just now
    assert set(clean(0)) == set(left)
    assert kept.exists(), "trials without a record may still be worth something"
    assert run.files.record.exists() and snapshot_of(run).exists()


def test_what_is_not_ours_stays(home: Path, grace_is_over: None) -> None:
    run = a_run(days=40)
    others = [home / "snapshots" / "mine", home / "runs" / "mine", home / "prefect", home / "runs" / ".mine"]
    for path in others:
        path.mkdir()
        (path / "file").touch()
        backdate(path, 400)
    (home / "snapshots" / "0123456789abcdef").write_text("a file, not a folder\n")
    (home / "snapshots" / "fedcba9876543210").symlink_to(home / "prefect")
    clean(0)
    assert not run.files.path.exists()
    assert all((path / "file").exists() for path in others)
    assert (home / "snapshots" / "fedcba9876543210").is_symlink()
    for path in (home, home.parent, home / "runs", Path("/")):
        with pytest.raises(NexaError, match="it stays"):
            remove(Leftover("run", path, 0, 0, 0.0))


def test_an_empty_home_has_nothing_to_remove() -> None:
    assert leftovers(0) == ([], [])
