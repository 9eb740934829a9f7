"""What a trial prints is kept up to job.log_limit: the real script, under real bash."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from nexa_infra.scheduling.script import render_script
from nexa_infra.spec.run import TrainingConfig

MIB = 2**20


def laid_out(folder: Path, program: str, **job: Any) -> Path:
    """Lay out a run directory whose one trial is a bash program, and return its script."""
    for place in ("status", "trials", "claims", "code"):
        (folder / place).mkdir(parents=True)
    config = TrainingConfig.model_validate(
        {"job": job, "launcher": {"type": "command", "command": ["bash", "-c", program]}}
    )
    path = folder / "job.sbatch"
    path.write_text(render_script(config, run_id="r", run_dir=str(folder)).text)
    return path


def started(script: Path) -> subprocess.Popen[str]:
    environment = {"PATH": os.environ["PATH"], "NEXA_SCHEDULER": "local"}
    environment |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0", "HOSTNAME": "n1"}
    return subprocess.Popen(["bash", str(script), "0", "1"], env=environment, stderr=subprocess.PIPE, text=True)


def ended(script: Path) -> int:
    with started(script) as process:
        assert process.communicate(timeout=60)[1] == ""
    return process.returncode


def kept(folder: Path, stream: str = "out") -> dict[str, bytes]:
    """What is kept of a stream: the bytes of each of its files."""
    found = (folder / "trials" / "0").glob(f"attempt-1.{stream}*")
    return {path.name.removeprefix(f"attempt-1.{stream}"): path.read_bytes() for path in found}


def test_a_trial_that_prints_little_has_the_two_files_that_it_always_had(tmp_path: Path) -> None:
    assert ended(laid_out(tmp_path, "printf 'a\\0b\\xff\\n'; exit 3")) == 3
    assert kept(tmp_path) == {"": b"a\0b\xff\n"} and kept(tmp_path, "err") == {"": b""}
    assert sorted(path.name for path in (tmp_path / "trials" / "0").iterdir()) == [
        "attempt-1.err",
        "attempt-1.out",
        "checkpoints",
    ]


def test_the_beginning_and_the_end_of_much_are_kept_and_no_more_than_may_be(tmp_path: Path) -> None:
    lines = 50 * MIB // 10
    script = laid_out(tmp_path, f"seq -f %09.0f {lines}; seq -f %09.0f {lines} >&2; exit 5", log_limit="1M")
    with started(script) as process:
        most = 0
        while process.poll() is None:
            most = max(most, on_disk(tmp_path))
            time.sleep(0.01)
    assert process.returncode == 5
    assert 0 < most <= MIB
    everything = b"".join(b"%09d\n" % number for number in range(1, lines + 1))
    for stream in ("out", "err"):
        files = kept(tmp_path, stream)
        assert sum(map(len, files.values())) <= MIB
        assert everything.startswith(files[""]) and len(files[""]) > 0.45 * MIB
        end = files[".before"] + files[".last"]
        assert everything.endswith(end) and len(end) > 0.2 * MIB


def on_disk(folder: Path) -> int:
    """How much one stream takes at this moment; a file that is gone by then takes nothing."""
    total = 0
    for path in (folder / "trials" / "0").glob("attempt-1.out*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def test_many_short_lines_fill_the_beginning_before_the_end_begins(tmp_path: Path) -> None:
    """dd counts reads: one that is short must not count as a full one."""
    script = laid_out(tmp_path, "for ((n = 0; n < 3000; n++)); do echo $n; done", log_limit="64K")
    assert ended(script) == 0
    assert kept(tmp_path)[""] == b"".join(b"%d\n" % n for n in range(3000))


@pytest.mark.parametrize("limit", ["0", None])
def test_without_a_limit_everything_is_kept(tmp_path: Path, limit: str | None) -> None:
    assert ended(laid_out(tmp_path, "head -c 3000000 /dev/zero", log_limit=limit)) == 0
    assert len(kept(tmp_path)[""]) == 3_000_000


def test_what_a_trial_prints_is_there_at_once(tmp_path: Path) -> None:
    with started(laid_out(tmp_path, "echo early; read -t 5 _ <> <(:); echo late")) as process:
        deadline = time.monotonic() + 4
        while b"early" not in kept(tmp_path).get("", b"") and time.monotonic() < deadline:
            time.sleep(0.02)
        assert kept(tmp_path)[""] == b"early\n" and process.poll() is None
        process.terminate()


def test_what_a_trial_leaves_behind_holds_its_end_up_for_seconds_only(tmp_path: Path) -> None:
    script = laid_out(tmp_path, "echo said; setsid sleep 60 & exit 4")
    before = time.monotonic()
    try:
        assert ended(script) == 4
        assert time.monotonic() - before < 8
        assert kept(tmp_path)[""] == b"said\n"
    finally:
        for path in Path("/proc").glob("[0-9]*"):
            if f"NEXA_RUN_DIR={tmp_path}".encode() in environment_of(path):
                os.kill(int(path.name), signal.SIGKILL)


def environment_of(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except OSError:
        return b""


def test_the_last_words_of_a_trial_that_is_told_to_end_are_kept(tmp_path: Path) -> None:
    with started(laid_out(tmp_path, "trap 'echo told; exit 9' TERM; echo up; while :; do sleep 0.05; done")) as process:
        deadline = time.monotonic() + 10
        while b"up" not in kept(tmp_path).get("", b"") and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 9
    assert kept(tmp_path)[""] == b"up\ntold\n"


def test_a_trial_inherits_no_descriptor_but_the_three(tmp_path: Path) -> None:
    script = laid_out(tmp_path, "cd /proc/$$/fd && echo *", log_limit="1M")
    assert ended(script) == 0
    plain = laid_out(tmp_path / "plain", "cd /proc/$$/fd && echo *", log_limit="0")
    assert ended(plain) == 0
    assert kept(tmp_path) == kept(tmp_path / "plain")


def test_what_cannot_start_says_so_in_its_log(tmp_path: Path) -> None:
    script = laid_out(tmp_path, "true", env_file=str(tmp_path / "secrets"))
    assert ended(script) == 78
    assert b"secrets is not there" in kept(tmp_path, "err")[""]


def test_a_full_disk_ends_no_trial(tmp_path: Path) -> None:
    script = laid_out(tmp_path, "head -c 300000 /dev/zero && exit 6")
    (tmp_path / "trials" / "0").mkdir()
    (tmp_path / "trials" / "0" / "attempt-1.out").symlink_to("/dev/full")
    with started(script) as process:
        process.communicate(timeout=60)
    assert process.returncode == 6
