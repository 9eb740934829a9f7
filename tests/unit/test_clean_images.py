"""What `clean` finds of containers: SIFs that no run asks for, folders of `run_container`, and what an engine holds."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nexa_infra.errors import NexaError
from nexa_infra.operations import clean_images, steps
from nexa_infra.operations.clean import Leftover, leftovers, remove
from nexa_infra.runs.record import Container, Run
from nexa_infra.spec.run import SweepConfig

DAY = 86400.0
A, B, C = ("ab" * 32, "cd" * 32, "ef" * 32)


@pytest.fixture(autouse=True)
def no_engine(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home, a folder to be in, and no engine of Docker's."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    monkeypatch.chdir(tmp_path)
    return home


def aged(path: Path, days: float) -> Path:
    os.utime(path, (time.time() - days * DAY,) * 2, follow_symlinks=False)
    return path


def a_sif(home: Path, digest: str, *, days: float = 0, size: int = 1000) -> Path:
    sif = home / "images" / f"{digest}.sif"
    sif.parent.mkdir(parents=True, exist_ok=True)
    sif.write_bytes(b"x" * size)
    log = sif.with_suffix(".log")
    log.write_text("BUILD\n")
    aged(log, days)
    return aged(sif, days)


def a_run_in(digest: str, *, days: float = 0) -> Run:
    """A run that never started, in an image."""
    config = SweepConfig.model_validate(
        {
            "job": {"name": "t"},
            "launcher": {"type": "command", "command": ["true"]},
            "sweep": {"parameters": {"n": [1]}},
        }
    )
    container = Container(asked="i", image=f"r.org/i@sha256:{digest}", digest=f"sha256:{digest}", runtime="none")
    planned = steps.plan(config).model_copy(update={"container": container})
    record = planned.files.record
    for folder in (planned.files.submissions, planned.files.trials):
        folder.mkdir(parents=True)
    record.write_text(planned.model_dump_json(exclude={"mirror"}))
    if days:
        data = json.loads(record.read_text())
        data["created_at"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - days * DAY))
        record.write_text(json.dumps(data))
        aged(record, days)
    return planned


def found(older: float = 30 * DAY) -> dict[Path, Leftover]:
    return {each.path: each for each in leftovers(older)[0]}


def cleaned(older: float = 30 * DAY) -> list[Path]:
    gone = leftovers(older)[0]
    for each in gone:
        remove(each)
    return [each.path for each in gone]


def test_an_old_sif_that_no_run_asks_for_goes_with_its_log(home: Path) -> None:
    unused, used, young = a_sif(home, A, days=40), a_sif(home, B, days=40), a_sif(home, C, days=10)
    a_run_in(B)
    leftover = found()[unused]
    assert (leftover.kind, leftover.size, leftover.files) == ("image", 1006, 2)
    assert cleaned() == [unused]
    assert sorted(path.name for path in (home / "images").iterdir()) == sorted(
        [used.name, f"{B}.log", young.name, f"{C}.log"]
    )
    assert cleaned() == []


def test_a_sif_that_was_read_lately_is_young(home: Path) -> None:
    sif = a_sif(home, A, days=40)
    os.utime(sif, (time.time(), time.time() - 40 * DAY))
    assert not found()


def test_a_sif_goes_with_the_last_run_that_asks_for_it_and_after_it(home: Path) -> None:
    sif = a_sif(home, A, days=40)
    run = a_run_in(A, days=50)
    other = a_run_in(A)
    assert cleaned() == [run.files.path]
    assert sif.exists()
    remove_all = json.loads(other.files.record.read_text())
    remove_all["created_at"] = "2020-01-01T00:00:00Z"
    other.files.record.write_text(json.dumps(remove_all))
    assert cleaned() == [other.files.path, sif]


def test_a_sif_that_is_asked_for_since_it_was_looked_at_stays(home: Path) -> None:
    sif = a_sif(home, A, days=40)
    leftover = found()[sif]
    a_run_in(A)
    with pytest.raises(NexaError, match="is in use again: it stays"):
        remove(leftover)
    assert sif.exists()


def test_a_sif_that_is_being_built_stays_whatever_is_asked(home: Path) -> None:
    """A builder's lock is as old as its build; only its heartbeat is young."""
    images = home / "images"
    images.mkdir(parents=True)
    lock, draft, beat = (images / f"{A}.sif.{name}" for name in ("lock", "n1.77.123.part", "beat"))
    lock.symlink_to("n1.77.123")
    draft.touch()
    for path in (lock, draft):
        aged(path, 1)
    beat.touch()
    assert not found(0)
    aged(beat, 1)
    assert [(each.path, each.files) for each in found(0).values()] == [(images / f"{A}.sif", 3)]
    assert cleaned(0) == [images / f"{A}.sif"]
    assert not list(images.iterdir())


def test_what_else_lies_among_the_images_stays(home: Path) -> None:
    images = home / "images"
    for name in (f"{A}.sif.d", "mine.sif", f"{A[:-1]}.sif", f"{A}.tar", f"x{A}.sif"):
        images.mkdir(parents=True, exist_ok=True)
        (images / name).mkdir() if name.endswith(".d") else (images / name).touch()
        aged(images / name, 400)
    before = sorted(images.iterdir())
    assert cleaned(0) == []
    with pytest.raises(NexaError, match="it stays"):
        remove(Leftover("image", images / "mine.sif", 0, 1, 0.0))
    assert sorted(images.iterdir()) == before


def a_folder(home: Path, name: str, *, days: float) -> Path:
    folder = home / "containers" / name
    folder.mkdir(parents=True)
    for log in ("stdout", "stderr"):
        (folder / f"{log}.log").write_text("said\n")
        aged(folder / f"{log}.log", days)
    return aged(folder, days)


def test_folders_of_containers_that_have_ended_go_when_they_are_old(home: Path) -> None:
    old, young = a_folder(home, "20260101-000000-train-abcd", days=40), a_folder(home, "new", days=1)
    speaking = a_folder(home, "speaking", days=40)
    aged(speaking / "stderr.log", 1)
    assert found()[old].kind == "run"
    assert cleaned() == [old]
    assert sorted((home / "containers").iterdir()) == [young, speaking]


def test_the_folder_of_a_container_that_runs_stays_whatever_is_asked(home: Path) -> None:
    """One that says nothing for a month is no less alive."""
    folder = a_folder(home, "quiet", days=40)
    leftover = found()[folder]
    with (folder / "stdout.log").open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_SH)
        assert not found(0)
        with pytest.raises(NexaError, match="runs: it stays"):
            remove(leftover)
    assert cleaned() == [folder]


def test_a_folder_that_is_just_being_made_stays(home: Path) -> None:
    a_folder(home, "new", days=0)
    assert not found(0)


def test_a_folder_whose_removal_was_cut_off_goes(home: Path) -> None:
    doomed = a_folder(home, ".deleting-old", days=40)
    assert [each for each in found(-1) if each == doomed] == []  # its inode has just changed
    link = home / "containers" / "link"
    link.symlink_to("/usr")
    os.utime(link, (0, 0), follow_symlinks=False)
    assert not found(0)


def test_without_an_engine_the_sdk_of_docker_is_not_even_looked_at(home: Path) -> None:
    program = (
        "import sys, os; os.environ.pop('DOCKER_HOST', None)\n"
        "from nexa_infra.operations.clean import leftovers; leftovers(0)\n"
        "print(os.path.exists('/var/run/docker.sock') or 'docker' not in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


class Engine:
    """An engine's list of containers, as its interface has it."""

    def __init__(self, *containers: dict[str, Any]) -> None:
        self.api = self
        self._containers = containers
        self.filters: dict[str, str] = {}

    def containers(self, *, all: bool, filters: dict[str, str]) -> list[dict[str, Any]]:  # noqa: A002 - the SDK's
        assert all
        self.filters = filters
        return list(self._containers)


def listed(name: str, run: str, *, state: str = "running", days: float = 40) -> dict[str, Any]:
    made = int(time.time() - days * DAY)
    return {"Names": [f"/{name}"], "Labels": {"nexa.run": run}, "State": state, "Created": made}


def test_containers_of_runs_that_are_over_go_and_those_that_may_be_somebody_s_stay(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run_in(A, days=40)
    engine = Engine(
        listed("over", run.id),
        listed("strange", "somebody-s"),
        listed("strange-ended", "somebody-s", state="exited"),
        listed("new", run.id, days=0),
    )

    @contextmanager
    def found_engine() -> Iterator[Any]:
        yield engine

    monkeypatch.setattr(clean_images, "_engine", found_engine)
    assert [name for name, _ in clean_images.left_containers(lambda _: False)] == ["over", "strange-ended"]
    assert [name for name, _ in clean_images.left_containers(lambda _: True)] == ["strange-ended"]
    assert engine.filters == {"label": "nexa.run"}
