"""Which runs exist, and which one a name means."""

from __future__ import annotations

import json
import os
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from nexa_infra.errors import NexaError, RunNotFoundError
from nexa_infra.operations import steps
from nexa_infra.runs.index import find_run, known_runs, register
from nexa_infra.runs.record import Run, write_run
from nexa_infra.spec.run import SweepConfig


def a_run(token: str, *, name: str = "digits", hour: int = 10, **job: Any) -> Run:
    """A run with a record, and no more."""
    config = SweepConfig.model_validate(
        {
            "job": {"name": name, **job},
            "launcher": {"type": "command", "command": ["true"]},
            "sweep": {"parameters": {"n": [1, 2]}},
        }
    )
    run = steps.plan(config, moment=datetime(2026, 11, 24, hour, tzinfo=UTC), token=token)
    run.files.path.mkdir(parents=True)
    write_run(run)
    register(Path(run.workdir), run)
    return run


def test_a_home_that_is_not_there_has_no_runs(home: Path) -> None:
    assert known_runs(home) == []
    with pytest.raises(RunNotFoundError, match="there are no runs under .* yet: start one with"):
        find_run("latest", home)


def test_runs_are_known_newest_first(home: Path) -> None:
    made = [a_run("0001", hour=9), a_run("0003", hour=11), a_run("0002", hour=10)]
    assert [entry.id for entry in known_runs(home)] == [made[1].id, made[2].id, made[0].id]
    assert find_run("latest", home) == made[1]


def test_a_run_is_found_by_its_id_a_part_of_it_and_its_directory(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, other = a_run("a1b2"), a_run("c3d4", name="other")
    for name in (run.id, "a1b2", "digits", run.id[:20], run.directory, f"{run.directory}/"):
        assert find_run(name, home) == run
    assert find_run("other", home) == other
    monkeypatch.chdir(run.directory)
    assert find_run(".", home) == run
    assert find_run(f"../{other.id}", home) == other


def test_of_runs_that_were_made_in_one_second_the_latest_is_the_one_that_was_made_last(home: Path) -> None:
    first, second = a_run("ffff"), a_run("0000")
    os.utime(first.files.record, ns=(10**18, 10**18))
    os.utime(second.files.record, ns=(10**18 + 1_000_000, 10**18 + 1_000_000))
    assert find_run("latest", home).id == second.id
    os.utime(first.files.record, ns=(2 * 10**18, 2 * 10**18))
    assert find_run("latest", home).id == first.id


def test_a_whole_id_is_meant_even_where_another_holds_it(home: Path) -> None:
    run, longer = a_run("1"), a_run("12")
    assert run.id in longer.id
    assert find_run(run.id, home) == run


def test_a_name_that_fits_several_runs_is_asked_back(home: Path) -> None:
    made = [a_run(f"000{n}") for n in range(7)]
    with pytest.raises(RunNotFoundError) as asked:
        find_run("digits", home)
    assert str(asked.value).startswith("'digits' fits 7 runs: say which of\n  ")
    assert made[6].id in str(asked.value) and made[0].id not in str(asked.value)
    assert str(asked.value).endswith("… and 2 more")


def test_a_name_that_fits_none_is_told_the_nearest(home: Path) -> None:
    run = a_run("a1b2")
    with pytest.raises(RunNotFoundError) as missed:
        find_run(run.id.replace("digits", "digist"), home)
    assert f"did you mean '{run.id}'" in str(missed.value)
    assert "`nexa-infra status` lists them" in str(missed.value)


@pytest.mark.parametrize("name", ["/", "./nowhere", "..", "~/no-such-folder/"])
def test_a_path_that_is_no_run_says_so(home: Path, name: str) -> None:
    a_run("a1b2")
    with pytest.raises(RunNotFoundError, match="is not a run directory: it has no run.json"):
        find_run(name, home)


def test_a_run_outside_of_the_home_is_known_by_the_index(home: Path, tmp_path: Path) -> None:
    home.mkdir()
    run = a_run("a1b2", output_dir=str(tmp_path / "elsewhere"))
    assert Path(run.directory).parent == tmp_path / "elsewhere"
    assert find_run("a1b2", home) == run
    # What a crash tore from the index, or what a person has removed since, is passed over.
    with (home / "index.jsonl").open("ab") as index:
        index.write(b'{"id": "20261124-120000-gone-ffff", "directory": "/nowhere"}\n\xff\n[]\n{"id": "20261124-13')
    assert [entry.id for entry in known_runs(home)] == [run.id]
    shutil.rmtree(run.directory)
    assert known_runs(home) == []


def test_what_is_no_run_is_passed_over(home: Path) -> None:
    run = a_run("a1b2")
    (home / "runs" / "notes.txt").write_text("mine\n")
    (home / "runs" / "half-made").mkdir()
    shutil.copytree(run.directory, home / "runs" / f".deleting-{run.id}")
    (home / "runs" / "broken link").symlink_to("nowhere")
    assert [entry.id for entry in known_runs(home)] == [run.id]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"id": 1}', "\x00", '{"id": "\ud800"}'])
def test_a_damaged_record_is_named(home: Path, text: str) -> None:
    run = a_run("a1b2")
    run.files.record.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(NexaError, match=r"run\.json is not a run's record of this version"):
        find_run("a1b2", home)


def test_a_record_of_a_later_version_is_not_guessed_at(home: Path) -> None:
    run = a_run("a1b2")
    record = {**json.loads(run.files.record.read_text()), "a_later_key": 1}
    run.files.record.write_text(json.dumps(record))
    with pytest.raises(NexaError, match="a_later_key"):
        find_run("a1b2", home)


def test_a_run_that_was_moved_is_where_it_is_now(home: Path, tmp_path: Path) -> None:
    run = a_run("a1b2")
    archive = tmp_path / "archive" / run.id
    shutil.copytree(run.directory, archive)
    assert find_run(str(archive), home).directory == str(archive), "a copy is looked at, not what it was copied from"
    shutil.rmtree(run.directory)
    Path(run.directory).symlink_to(archive)
    assert find_run("a1b2", home) == run, "a link in its old place leads to it"
