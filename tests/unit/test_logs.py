"""Logs in parts, as job.log_limit makes them, and logs packed."""

from __future__ import annotations

import subprocess
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexa_infra import launch_slurm_sweep
from nexa_infra.errors import HostError, NexaError, RunFailedError, RunNotFoundError
from nexa_infra.hosts.local import LocalHost
from nexa_infra.operations import logs, manage
from nexa_infra.operations.endings import last_words
from nexa_infra.operations.logs import Log, pack_logs, tail
from nexa_infra.runs.log import LogReader, end_of, gap_line, later
from nexa_infra.runs.record import Run
from nexa_infra.scheduling.slurm import mirror
from nexa_infra.spec.run import SweepConfig

GAP = b"[gap]\n"


class Limited:
    """Writes a log as the wrapper of a trial does: a beginning, then parts that take turns."""

    def __init__(self, log: Path, most: int) -> None:
        self.log, self.most = log, most
        self.begun = 0

    def write(self, data: bytes) -> None:
        before, last = later(self.log)
        for byte in data:
            target = self.log if self.begun < self.most else last
            if target == last and last.exists() and last.stat().st_size >= self.most:
                last.replace(before)
            with target.open("ab") as stream:
                stream.write(bytes([byte]))
            self.begun += target == self.log


# ---- read while it is written ----


@given(st.lists(st.integers(0, 12), max_size=12))
def test_a_log_in_parts_is_read_once_and_in_order_however_it_is_looked_at(
    tmp_path_factory: pytest.TempPathFactory, writes: list[int]
) -> None:
    log = tmp_path_factory.mktemp("log") / "attempt-1.out"
    limited, reader = Limited(log, 4), LogReader(log, GAP)
    written = bytes(range(128, 128 + sum(writes)))  # none of it is a newline, and none stands in it twice
    at, seen = 0, b""
    for count in writes:
        limited.write(written[at : at + count])
        at += count
        seen += b"".join(reader.new())
    assert b"".join(reader.new()) == b""
    reader.close()
    pieces = seen.split(b"\n" + GAP)
    assert b"".join(pieces) == bytes(sorted(set(b"".join(pieces))))
    # All that was looked at before it was overwritten is there, and so is the beginning and the end.
    assert pieces[0].startswith(written[:4]) and seen.endswith(written[-4:])
    if all(count <= 4 for count in writes):
        assert seen.replace(b"\n" + GAP, b"") == written


def test_a_name_that_another_part_takes_over_is_no_repetition(tmp_path: Path) -> None:
    log = tmp_path / "attempt-1.out"
    before, last = later(log)
    log.write_bytes(b"one\n")
    reader = LogReader(log, GAP)
    assert b"".join(reader.new()) == b"one\n"
    last.write_bytes(b"two\n")
    assert b"".join(reader.new()) == b"two\n"
    for text in (b"three\n", b"four\n", b"five\n"):
        last.replace(before)
        last.write_bytes(text)
    assert b"".join(reader.new()) == GAP + b"four\nfive\n"
    assert b"".join(reader.new()) == b""
    reader.close()


def test_the_end_of_a_log_is_the_end_of_its_last_part(tmp_path: Path) -> None:
    log = tmp_path / "attempt-1.err"
    assert end_of(log, 10) == b""
    log.write_bytes(b"beginning")
    assert end_of(log, 5) == b"nning"
    before, last = later(log)
    last.write_bytes(b"end")
    assert end_of(log, 5) == b"ngend"
    before.write_bytes(b"before")
    assert end_of(log, 5) == b"reend"
    # The same by the shell, as a cluster is asked.
    asked = mirror._end_of(str(log))
    assert subprocess.check_output(["sh", "-c", asked]).endswith(b"beginningbeforeend")


# ---- by a run ----


@pytest.fixture
def run(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run of three trials that has ended; the last has failed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NEXA_POLL_SECONDS", "0.05")
    (tmp_path / "train.py").write_text("")
    config = SweepConfig.model_validate(
        {
            "job": {"name": "talks", "time": "10:00"},
            "launcher": {
                "type": "command",
                "command": ["bash", "-c", 'echo "out $1"; echo "err $1" >&2; [ "$1" != 2 ]', "trial", "{n}"],
            },
            "sweep": {"parameters": {"n": ["0", "1", "2"]}},
        }
    )
    with pytest.raises(RunFailedError):
        launch_slurm_sweep(config, submit=True)
    return manage.find("latest")


@pytest.fixture
def limited(run: Run) -> Run:
    """The same, where the failed trial has printed more than is kept."""
    for log in (run.files.stdout(2, 1), run.files.stderr(2, 1)):
        before, last = later(log)
        before.write_text("before\n")
        last.write_text("last\n")
    return run


def test_a_log_that_was_limited_is_shown_with_a_line_for_what_is_missing(limited: Run) -> None:
    gap = gap_line("1G")
    assert b"".join(tail(limited, Log(2), follow=False)) == b"out 2\n" + gap + b"before\nlast\n"
    assert b"".join(tail(limited, Log(2, stderr=True), follow=True)) == b"err 2\n" + gap + b"before\nlast\n"
    assert last_words(limited, 2, 1) == "err 2\nbefore\nlast"


@pytest.mark.parametrize("ends", [b"", b"\n"])
def test_another_host_shows_it_the_same(limited: Run, ends: bytes) -> None:
    log = limited.files.stdout(2, 1)
    log.write_bytes(b"out 2" + ends)
    for script in (logs._SHOW, logs._FOLLOW):
        shown = told(script, log, b"last\n")
        assert shown == b"out 2\n[gap]\nbefore\nlast\n"
    later(log)[0].unlink()
    assert told(logs._SHOW, log, b"last\n") == b"out 2" + ends + b"last\n"
    later(log)[1].unlink()
    assert told(logs._SHOW, log, b"out 2" + ends) == b"out 2" + ends


def told(script: str, log: Path, end: bytes) -> bytes:
    """Return what a script prints of a log until this end."""
    found = b""
    pieces = LocalHost().stream(["sh", "-c", script, "sh", str(log), "[gap]"])
    for piece in pieces:
        found += piece
        if found.endswith(end):
            break
    pieces.close()
    return found


def test_another_host_follows_a_log_through_its_parts(tmp_path: Path) -> None:
    log = tmp_path / "attempt-1.out"
    limited = Limited(log, 40)

    def write() -> None:
        for number in range(60):
            limited.write(b"%d\n" % number)
            time.sleep(0.05)

    writing = threading.Thread(target=write)
    writing.start()
    shown = told(logs._FOLLOW, log, b"\n59\n")
    writing.join()
    assert shown.split() == [b"%d" % number for number in range(60)]


# ---- packed ----


def names(path: Path) -> set[str]:
    with tarfile.open(path) as packed:
        return {member.name for member in packed if member.isfile()}


def test_all_logs_are_packed_under_the_run_s_name_and_nothing_else(limited: Run, tmp_path: Path) -> None:
    ranks = limited.files.ranks(1, 1)
    ranks.mkdir()
    (ranks / "rank-0.log").write_text("rank 0\n")
    (limited.files.trial(1) / "attempt-1.out\nx").write_text("not a log\n")
    (limited.files.trial(1) / "model.bin").write_text("not a log\n")
    path = pack_logs(limited, tmp_path / "logs.tar.gz")
    trials = f"{limited.id}/trials"
    expected = {f"{trials}/{trial}/attempt-1.{stream}" for trial in range(3) for stream in ("out", "err")}
    expected |= {f"{trials}/2/attempt-1.{stream}.{part}" for stream in ("out", "err") for part in ("before", "last")}
    assert names(path) == {*expected, f"{trials}/1/attempt-1/rank-0.log", f"{limited.id}/job.log"}
    assert path.stat().st_mode & 0o777 == 0o600
    with tarfile.open(path) as packed:
        member = packed.extractfile(f"{trials}/2/attempt-1.out.last")
        assert member is not None and member.read() == b"last\n"


def test_only_those_that_ended_badly_are_packed_where_that_is_asked(run: Run, tmp_path: Path) -> None:
    path = pack_logs(run, tmp_path / "logs.tar.gz", failed=True)
    assert names(path) == {f"{run.id}/job.log", *(f"{run.id}/trials/2/attempt-1.{each}" for each in ("out", "err"))}


def test_a_file_that_is_there_stays_unless_it_is_to_go(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "logs.tar.gz"
    path.write_text("mine")
    with pytest.raises(FileExistsError, match="it is there already: name another, or replace it with --force"):
        pack_logs(run, path)
    assert path.read_text() == "mine"
    assert names(pack_logs(run, path, force=True))
    with pytest.raises(IsADirectoryError):
        pack_logs(run, tmp_path, force=True)
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        pack_logs(run, tmp_path / "nowhere" / "logs.tar.gz")


def test_a_pack_that_was_cut_off_leaves_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*_: Any, **__: Any) -> Iterator[bytes]:
        yield b"half"
        raise HostError("cut")

    monkeypatch.setattr(LocalHost, "stream", cut)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(HostError):
        pack_logs(run, tmp_path / "logs.tar.gz")
    assert sorted(tmp_path.iterdir()) == before


def test_nothing_to_pack_is_told(run: Run, tmp_path: Path) -> None:
    for trial in range(3):
        for log in run.files.trial(trial).glob("attempt-*"):
            log.unlink()
    run.files.log.unlink(missing_ok=True)
    with pytest.raises(RunNotFoundError, match=r"there is nothing of run .* to pack: it has no logs"):
        pack_logs(run, tmp_path / "logs.tar.gz")
    assert not list(tmp_path.glob("*.tar.gz*"))


def test_many_spans_of_trials_are_chosen_from(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for trial in range(3, 40):
        run.files.trial(trial).mkdir()
        run.files.stdout(trial, 1).write_text("x")
    monkeypatch.setattr(logs, "_chosen", lambda _: ["0-1 3 7-9", "12 30-35"])
    found = {int(name.split("/")[2]) for name in names(pack_logs(run, tmp_path / "a.tar.gz")) if "/trials/" in name}
    assert found == set(range(40))
    chosen = names(pack_logs(run, tmp_path / "b.tar.gz", failed=True))
    assert {int(name.split("/")[2]) for name in chosen if "/trials/" in name} == {0, 1, 3, 7, 8, 9, 12, *range(30, 36)}


def test_more_spans_than_a_command_may_name_are_told(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_MOST_WORDS", 0)
    with pytest.raises(NexaError, match="leave out --failed"):
        pack_logs(run, tmp_path / "logs.tar.gz", failed=True)
