"""What a training made: described last, verified whenever it is read, and brought where it is asked for."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from nexa_infra import launch_training_job
from nexa_infra.errors import ArtifactError
from nexa_infra.hosts.local import LocalHost
from nexa_infra.operations import manage
from nexa_infra.operations.fetch import fetch
from nexa_infra.runs import artifact
from nexa_infra.runs.artifact import read_artifact
from nexa_infra.runs.directory import write_atomically
from nexa_infra.runs.record import Run
from nexa_infra.spec.run import TrainingConfig

SCRIPT = """
cd "$NEXA_TRIAL_DIR" && mkdir -p "a dir" && echo '{"loss": 0.5, "bad": NaN}' >metrics.json
printf model >model.bin; : >empty; printf x >$'line\\nend \\\\ \\xff'; printf y >"a dir/y"; ln -s model.bin latest
mkfifo pipe
"""


@pytest.fixture(autouse=True)
def project(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a little code in it, to be in."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "code.txt").write_text("code\n")
    monkeypatch.chdir(folder)
    return folder


def a_training(script: str = SCRIPT) -> TrainingConfig:
    return TrainingConfig.model_validate(
        {"job": {"name": "one"}, "launcher": {"type": "command", "command": ["bash", "-c", script]}}
    )


def trained() -> Run:
    launch_training_job(a_training())
    return manage.find("latest")


def read(run: Run, **more: Any) -> artifact.ArtifactMeta:
    return read_artifact(run, LocalHost(), **more)


def test_every_file_is_in_the_manifest_by_content_and_links_are_not_followed() -> None:
    run = trained()
    # What the run itself keeps there is not of interest.
    lines = [line for line in run.files.manifest.read_text().splitlines() if ".nexa-" not in line]
    assert [line.split("  ", 2)[2] for line in lines] == [
        "a dir/y",
        "attempt-1.err",
        "attempt-1.out",
        "empty",
        "latest",
        r"line\x0aend \\ \xff",
        "metrics.json",
        "model.bin",
    ]
    assert lines[4].split("  ")[1] == "link" and lines[7].split("  ")[1] == "5"
    # sha256sum of `model`
    assert lines[7].startswith("9372c470eeadd5ecd9c3c74c2b3cb633f8e2f2fad799250a0f70d652b6b825e4  ")
    assert read(run).bytes == 5 + 1 + 1 + len('{"loss": 0.5, "bad": NaN}\n')


def test_what_has_been_made_is_verified_when_it_is_read() -> None:
    run = trained()
    (run.files.trial(0) / "more").write_text("files beside are no damage")
    assert read(run).metrics["loss"] == 0.5


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / "model.bin").unlink(), r"model.bin is missing: it was 5 bytes, SHA-256 9372c470"),
        (
            lambda folder: (folder / "model.bin").write_text("modem"),
            r"model.bin has changed: it is 5 bytes, SHA-256 .*, and was 5 bytes, SHA-256 9372",
        ),
        (lambda folder: os.truncate(folder / "model.bin", 2), r"model.bin has changed: it is 2 bytes.*was 5 bytes"),
        (
            lambda folder: ((folder / "latest").unlink(), (folder / "latest").symlink_to("empty")),
            r"latest has changed: it is a link",
        ),
        (
            lambda folder: ((folder / "latest").unlink(), (folder / "latest").write_text("model.bin")),
            r"latest has changed: it is 9 bytes.*and was a link",
        ),
        (lambda folder: (folder / "line\nend \\ \udcff").unlink(), r"line\\x0aend \\\\ \\xff is missing"),
        (lambda folder: shutil.rmtree(folder / "a dir"), r"a dir/y is missing"),
        (lambda folder: (folder.parents[1] / "manifest.txt").unlink(), r"manifest.txt cannot be read"),
        (
            lambda folder: (folder.parents[1] / "manifest.txt").open("a").write("x"),
            r"manifest.txt is not the one that artifact.json was written with",
        ),
        (lambda folder: (folder.parents[1] / "artifact.json").unlink(), r"has no .*artifact.json.*nexa-infra status"),
        (lambda folder: os.truncate(folder.parents[1] / "artifact.json", 20), r"artifact.json is damaged .*resume"),
    ],
)
def test_damage_is_told_with_the_file_what_it_is_and_what_it_was(damage: Any, told: str) -> None:
    run = trained()
    damage(run.files.trial(0))
    with pytest.raises(ArtifactError, match=f"run {run.id}.*{told}"):
        read(run)


@pytest.mark.parametrize("key", ["kind", "uri", "bytes", "inputs", "labels", "metrics"])
def test_a_record_that_says_something_else_is_noticed(key: str) -> None:
    run = trained()
    said = json.loads(run.files.artifact.read_text())
    said[key] = {"kind": "model", "uri": "file:///elsewhere", "bytes": 1}.get(key, {"a": "b"})
    run.files.artifact.write_text(json.dumps(said))
    with pytest.raises(ArtifactError, match=f"artifact.json does not say what was written: {key} is .*follows"):
        read(run)


def test_a_manifest_and_its_hash_changed_together_are_noticed_by_the_files() -> None:
    run = trained()
    changed = run.files.manifest.read_text().replace("9372c470", "00000000")
    run.files.manifest.write_text(changed)
    said = json.loads(run.files.artifact.read_text())
    said["sha256"] = hashlib.sha256(changed.encode()).hexdigest()
    run.files.artifact.write_text(json.dumps(said))
    with pytest.raises(ArtifactError, match=r"model.bin has changed"):
        read(run)


def test_the_artifact_is_the_last_act(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    def failing(path: Path, text: str) -> None:
        written.append(path.name)
        if path.name == "artifact.json" and len(written) == 2:
            raise OSError(28, "No space left on device", str(path))
        write_atomically(path, text)

    monkeypatch.setattr(artifact, "write_atomically", failing)
    with pytest.raises(OSError, match="No space left"):
        launch_training_job(a_training())
    run = manage.find("latest")
    assert written == ["manifest.txt", "artifact.json"] and not run.files.artifact.exists()

    launch_training_job(None, resume=run.id)
    assert written == ["manifest.txt", "artifact.json"] * 2 and read(run).bytes > 5


def test_a_run_that_is_taken_up_again_does_not_bless_damage() -> None:
    run = trained()
    first = run.files.artifact.read_text()
    (run.files.trial(0) / "model.bin").write_text("modem")
    with pytest.raises(ArtifactError, match=r"model.bin has changed"):
        launch_training_job(None, resume=run.id)
    assert run.files.artifact.read_text() == first


def test_what_a_training_made_is_brought_where_it_is_asked_for(tmp_path: Path) -> None:
    made = launch_training_job(a_training(), fetch_to=tmp_path / "out")
    run = manage.find("latest")
    copy = tmp_path / "out" / run.id
    assert (copy / "trials" / "0" / "model.bin").read_text() == "model"
    assert (copy / "trials" / "0" / "latest").is_symlink()
    assert read(run, copy=copy) == made == read(run)


def test_a_damaged_copy_is_mended_and_a_damaged_original_is_told(tmp_path: Path) -> None:
    run = trained()
    copy = fetch(run, to=tmp_path)
    there, here = run.files.trial(0) / "model.bin", copy / "trials" / "0" / "model.bin"
    here.write_text("modem")
    os.utime(here, ns=(there.stat().st_atime_ns, there.stat().st_mtime_ns))  # rsync alone would leave it
    with pytest.raises(ArtifactError, match=rf"in {copy}/trials/0, model.bin has changed.*nexa-infra fetch {run.id}"):
        read(run, copy=copy)
    fetch(run, to=tmp_path)
    assert here.read_text() == "model"

    os.truncate(there, 2)
    with pytest.raises(ArtifactError, match=rf"in {run.directory}/trials/0, model.bin has changed.*run the training"):
        fetch(run, to=tmp_path)


def test_a_copy_whose_trial_is_asked_for_alone_is_brought_without_the_rest(tmp_path: Path) -> None:
    run = trained()
    copy = fetch(run, to=tmp_path, trials=[0])
    assert (copy / "trials" / "0" / "model.bin").exists() and not (copy / "artifact.json").exists()


def test_the_config_is_hashed_as_it_was_recorded() -> None:
    run = trained()
    recorded = json.loads(run.files.record.read_text())["config"]
    text = json.dumps(recorded, sort_keys=True).encode()
    assert read(run).inputs["config"] == hashlib.sha256(text).hexdigest()
    assert run.snapshot is not None and read(run).inputs["code"] == run.snapshot.hash
