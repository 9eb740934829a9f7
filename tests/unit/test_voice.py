"""What a training prints, heard while it runs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from nexa_infra.operations import launch, steps
from nexa_infra.operations.voice import MOST_LINE, speaker, texts
from nexa_infra.spec.run import SweepConfig, TrainingConfig

WAITS = (
    'echo "first of $NEXA_ATTEMPT"; until [ -e "$NEXA_RUN_DIR/go" ]; do sleep 0.05; done; echo second >&2; printf end'
)


@pytest.fixture(autouse=True)
def project(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to be in."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "README").touch()
    monkeypatch.chdir(folder)
    return folder


class Ear:
    """Hears lines; at the first one of `word` it does something."""

    def __init__(self, word: str = "", act: Any = None) -> None:
        self.lines: list[str] = []
        self.word, self.act = word, act
        self.threads: set[int] = set()

    def __call__(self, lines: Sequence[str]) -> None:
        self.lines += lines
        self.threads.add(threading.get_ident())
        if self.word and self.word in self.lines and self.act is not None:
            act, self.act = self.act, None
            act()


def follow(config: Any, ear: Ear | None) -> None:
    run = steps.plan(config)
    if ear is not None and ear.word:
        ear.act = (run.files.path / "go").touch
    token = speaker.set(ear)
    try:
        launch.follow_run(run)
    finally:
        speaker.reset(token)


def a_training(script: str, **more: Any) -> TrainingConfig:
    command = {"type": "command", "command": ["bash", "-c", script]}
    return TrainingConfig.model_validate({"job": {"name": "test"}, "launcher": command, "training": {}, **more})


def test_lines_are_heard_while_the_training_waits_for_it() -> None:
    ear = Ear("first of 1")
    follow(a_training(WAITS), ear)
    assert ear.lines[0] == "first of 1" and sorted(ear.lines[1:]) == ["end", "second"]
    assert threading.get_ident() not in ear.threads


def test_a_retry_is_heard_from_its_first_line() -> None:
    ear = Ear()
    script = 'echo "attempt $NEXA_ATTEMPT"; [ $NEXA_ATTEMPT = 2 ]'
    follow(a_training(script, retry={"times": 1}), ear)
    assert ear.lines == ["attempt 1", "attempt 2"]


def test_a_reader_that_goes_away_ends_nothing() -> None:
    def away(lines: Sequence[str]) -> None:
        raise BrokenPipeError("nobody reads")

    token = speaker.set(away)
    try:
        launch.follow_run(steps.plan(a_training("echo heard")))
    finally:
        speaker.reset(token)


def test_a_sweep_is_not_heard() -> None:
    ear = Ear()
    command = {"type": "command", "command": ["echo", "{n}"]}
    follow(SweepConfig.model_validate({"launcher": command, "sweep": {"parameters": {"n": ["1"]}}}), ear)
    assert ear.lines == []


@pytest.mark.parametrize(
    ("pieces", "lines"),
    [
        ([b"a\nb", b"c\n"], ["a", "bc"]),
        ([b"10%\r50%\r100%\nend"], ["100%", "end"]),
        ([b"\xff\n"], ["\ufffd"]),
        ([b"x" * (MOST_LINE + 1), b"y\n"], ["x" * MOST_LINE, "y"]),
        ([b"\n\n"], ["", ""]),
        ([], []),
    ],
    ids=["split", "bar", "bytes", "long", "empty", "none"],
)
def test_pieces_become_lines(pieces: list[bytes], lines: list[str]) -> None:
    assert texts(pieces) == lines
