"""The verbs of a working day, on a run that is on a cluster: as a person types them."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nexa_infra.operations import manage
from nexa_infra.runs.index import known_runs
from nexa_infra.spec.cluster import Cluster
from tests.rig.clusters import shell_config, states_by_sacct
from tests.rig.slurm import SlurmRig
from tests.rig.ssh import SshRig

SLOW = 'echo "started $2"; echo $2 >"$NEXA_TRIAL_DIR/made"; for each in $(seq 300); do sleep 0.2; done'


@pytest.fixture
def where(cluster: Cluster, tmp_path: Path, home: Path) -> str:
    """The cluster as a file, as `--cluster` takes it."""
    path = tmp_path / "rig.yaml"
    path.write_text(cluster.model_dump_json(exclude_none=True))
    return str(path)


def verb(*words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "nexa_infra", *words]
    return subprocess.run(argv, capture_output=True, text=True, timeout=timeout)


@contextmanager
def started(*words: str) -> Iterator[subprocess.Popen[str]]:
    argv = [sys.executable, "-m", "nexa_infra", *words]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as client:
        try:
            yield client
        finally:
            client.kill()


def until(true: object, seconds: float = 30) -> None:
    limit = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < limit
        time.sleep(0.1)


def running(slurm: SlurmRig, count: int) -> bool:
    return slurm.run(["squeue", "-h", "-r", "-t", "RUNNING"]).stdout.count("\n") == count


def test_ctrl_c_once_detaches_and_the_verbs_go_on_with_the_run(
    where: str, slurm: SlurmRig, sshd: SshRig, tmp_path: Path, workdir: Path
) -> None:
    config = shell_config(tmp_path, SLOW, [1, 2])
    with started("sweep", str(config), "-c", where) as client:
        until(lambda: running(slurm, 2))
        client.send_signal(signal.SIGINT)
        assert client.wait(20) == 130
        said = client.stdout.read() if client.stdout else ""
    assert "detached: its jobs go on. Ctrl-C again, now, cancels them" in said
    assert "goes on without this client" in said and "nexa-infra resume" in said
    assert running(slurm, 2)

    run = manage.find("latest")
    told = verb("status", run.id)
    assert "running" in told.stdout and "2 running" in told.stdout, told
    assert run.id in verb("status").stdout
    with started("logs", run.id, "1", "-f") as log:
        assert log.stdout is not None and log.stdout.readline() == "started 2\n"

    into = tmp_path / "fetched"
    fetched = verb("fetch", run.id, "0", "--to", str(into))
    assert fetched.returncode == 0, fetched
    assert (into / run.id / "trials" / "0" / "made").read_text() == "1\n"
    assert not (into / run.id / "trials" / "1").exists()

    cancelled = verb("cancel", run.id)
    assert cancelled.returncode == 0 and "is cancelled" in cancelled.stdout, cancelled
    assert slurm.run(["squeue", "-h"]).stdout == ""
    assert [
        state.partition(" ")[0] for state in states_by_sacct(slurm, run) if state != "by" and not state.isdigit()
    ] == ["CANCELLED"] * 2
    assert "cancelled" in verb("status", run.id).stdout
    report = verb("report", run.id)
    assert "2 cancelled" in report.stdout and re.search(r"Cost +\$0\.000\d+ for", report.stdout), report
    assert (workdir / "runs" / run.id / "cancelled").read_text() == "person: cancelled by hand\n"
    again = verb("cancel", run.id)
    assert again.returncode == 1 and "has already ended (cancelled)" in again.stderr


def test_ctrl_c_twice_cancels(where: str, slurm: SlurmRig, tmp_path: Path) -> None:
    config = shell_config(tmp_path, SLOW, [1])
    with started("sweep", str(config), "-c", where) as client:
        until(lambda: running(slurm, 1))
        client.send_signal(signal.SIGINT)
        time.sleep(1.0)
        client.send_signal(signal.SIGINT)
        assert client.wait(40) == 130
    assert slurm.run(["squeue", "-h"]).stdout == ""
    assert manage.status(manage.find("latest")).end == "cancelled"


def test_a_client_that_is_killed_leaves_its_jobs_and_resume_follows_them(
    where: str, slurm: SlurmRig, tmp_path: Path
) -> None:
    mark = tmp_path / "go"
    config = shell_config(tmp_path, f"until [ -e {mark} ]; do sleep 0.1; done", [1, 2, 3])
    with started("sweep", str(config), "-c", where) as client:
        until(lambda: running(slurm, 3))
        client.kill()
    with started("resume", "latest") as client:
        time.sleep(2)
        client.terminate()
        assert client.wait(20) == 143
    assert running(slurm, 3)
    mark.touch()
    resumed = verb("resume", "latest")
    assert resumed.returncode == 0 and "3 of 3 trials completed" in resumed.stdout, resumed
    run = manage.find("latest")
    assert states_by_sacct(slurm, run) == ["COMPLETED"] * 3
    assert states_by_sacct(slurm, run, 2) == []


def test_retry_runs_only_what_failed_and_compare_sets_runs_beside_each_other(
    where: str, slurm: SlurmRig, tmp_path: Path
) -> None:
    mark = tmp_path / "mended"
    script = f'[ "$2" != 2 ] || [ -e {mark} ] || exit 4; echo "{{\\"score\\": $2}}" >"$NEXA_METRICS"'
    config = shell_config(tmp_path, script, [1, 2, 3], more="objective: {metric: score, goal: max}")
    first = verb("sweep", str(config), "-c", where)
    assert first.returncode == 1 and "trial 1 ended as failed with exit code 4" in first.stderr, first
    run = manage.find("latest")
    nothing = verb("fetch", run.id, "7")
    assert nothing.returncode == 2 and "there is no trial 7" in nothing.stderr
    mark.touch()
    again = verb("retry", run.id)
    assert again.returncode == 0 and "3 of 3 trials completed" in again.stdout, again
    assert states_by_sacct(slurm, run, 2) == ["COMPLETED"]
    assert "no trial of run" in verb("retry", run.id).stderr

    here = verb("sweep", str(config))
    assert here.returncode == 0, here
    compared = verb("compare", run.id, "latest")
    assert compared.returncode == 0 and "score" in compared.stdout, compared


def test_a_run_is_extended_by_what_it_has_not_finished(where: str, slurm: SlurmRig, tmp_path: Path) -> None:
    mark = tmp_path / "mended"
    script = f'[ "$2" != 2 ] || [ -e {mark} ] || exit 4'
    assert verb("sweep", str(shell_config(tmp_path, script, [1, 2, 3])), "-c", where).returncode == 1
    run = manage.find("latest")
    mark.touch()
    larger = shell_config(tmp_path, script, [4, 3, 2, 1], name="larger")
    shown = verb("extend", run.id, str(larger), "-c", where, "--preview")
    assert f"extends {run.id}: 2 of 4 trials finished there" in shown.stdout and "Array `0-1`" in shown.stdout, shown
    extended = verb("extend", run.id, str(larger), "-c", where)
    assert extended.returncode == 0 and "2 of 2 trials completed" in extended.stdout, extended
    newest = next(entry.id for entry in known_runs(manage.home()) if entry.id != run.id)
    assert states_by_sacct(slurm, newest) == ["COMPLETED"] * 2
    again = verb("extend", newest, str(larger), "-c", where)
    assert again.returncode == 1 and "all 4 trials of" in again.stderr and "nothing left to run" in again.stderr, again


def test_a_limited_log_is_shown_with_its_gap_and_all_logs_are_packed(where: str, tmp_path: Path) -> None:
    script = """
    for each in $(seq 2000); do echo "line $2 $each"; done
    for each in $(seq 2000); do echo "error $2 $each"; done >&2
    echo "no such layer" >&2; [ "$2" != 2 ]
    """
    config = shell_config(tmp_path, script, [1, 2], job=", log_limit: 4K")
    done = verb("sweep", str(config), "-c", where)
    assert done.returncode == 1 and "error 2 2000\n    no such layer\n" in done.stderr, done
    run = manage.find("latest")

    shown = verb("logs", run.id, "1").stdout
    assert shown.startswith("line 2 1\nline 2 2\n") and shown.endswith("line 2 1999\nline 2 2000\n")
    assert shown.count("not kept (job.log_limit is 4K)") == 1 and len(shown) < 6000

    into = tmp_path / "logs.tar.gz"
    packed = verb("logs", run.id, "--pack", str(into))
    assert packed.returncode == 0 and packed.stdout == f"{into}\n", packed
    with tarfile.open(into) as archive:
        names = {member.name.removeprefix(f"{run.id}/") for member in archive}
        last = archive.extractfile(f"{run.id}/trials/1/attempt-1.err.last")
        assert last is not None and b"\nno such layer\n" in last.read()
    parts = {f"attempt-1.{stream}{part}" for stream in ("out", "err") for part in ("", ".before", ".last")}
    assert names - {"job.log"} == {f"trials/{trial}/{part}" for trial in (0, 1) for part in parts}

    again = verb("logs", run.id, "--pack", str(into), "--failed")
    assert again.returncode == 1 and "there already" in again.stderr and again.stderr.count("\n") == 1, again
    assert verb("logs", run.id, "--pack", str(into), "--failed", "--force").returncode == 0
    with tarfile.open(into) as archive:
        assert {member.name.split("/")[2] for member in archive if "/trials/" in member.name} == {"1"}


def test_a_limited_log_is_followed_through_its_parts(where: str, slurm: SlurmRig, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    script = f"""
    for burst in $(seq 12); do
      for each in $(seq 40); do echo "line $burst $each"; done
      until [ -e {mark}.$burst ]; do sleep 0.1; done
    done
    """
    config = shell_config(tmp_path, script, [1], job=", log_limit: 4K")
    with started("sweep", str(config), "-c", where) as client:
        until(lambda: running(slurm, 1))
        with started("logs", "latest", "0", "-f") as log:
            assert log.stdout is not None
            for burst in range(1, 13):
                shown = [log.stdout.readline() for _ in range(40)]
                assert shown == [f"line {burst} {each}\n" for each in range(1, 41)]
                Path(f"{mark}.{burst}").touch()
            assert log.stdout.read() == ""
            assert log.wait(30) == 0
        assert client.wait(60) == 0


def test_another_clients_run_can_be_followed_from_its_directory_on_the_cluster(
    where: str, tmp_path: Path, workdir: Path
) -> None:
    assert verb("sweep", str(shell_config(tmp_path, "echo done", [1])), "-c", where).returncode == 0
    run = manage.find("latest")
    there = verb("status", f"{workdir}/runs/{run.id}")
    assert "1 completed" in there.stdout, there


def test_a_doctor_looks_at_a_cluster_file(where: str) -> None:
    told = verb("doctor", where)
    assert told.returncode == 0 and "ok  SSH" in told.stdout and "MaxArraySize" in told.stdout, told


def test_a_cluster_that_is_not_known_is_one_clear_error(where: str, tmp_path: Path) -> None:
    config = shell_config(tmp_path, "true", [1])
    missing = verb("sweep", str(config), "-c", str(tmp_path / "nowhere.yaml"))
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1 and "nowhere.yaml" in missing.stderr, missing
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("workdir: /scratch\nhots: login\n")
    told = verb("sweep", str(config), "-c", str(wrong))
    assert told.returncode == 2 and "wrong.yaml:2: hots" in told.stderr and "host" in told.stderr, told


def test_a_terminal_shows_progress_and_takes_ctrl_c(where: str, slurm: SlurmRig, tmp_path: Path) -> None:
    config = shell_config(tmp_path, SLOW, [1])
    master, slave = pty.openpty()
    argv = [sys.executable, "-m", "nexa_infra", "sweep", str(config), "-c", where]
    with subprocess.Popen(argv, stdin=slave, stdout=slave, stderr=slave, start_new_session=True) as client:
        os.close(slave)
        until(lambda: running(slurm, 1))
        client.send_signal(signal.SIGINT)
        shown = b""
        while True:
            try:
                piece = os.read(master, 1 << 16)
            except OSError:
                break
            if not piece:
                break
            shown += piece
        assert client.wait(20) == 130
    assert b"Traceback" not in shown and b"detached" in shown
