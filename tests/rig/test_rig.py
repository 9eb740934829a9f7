"""The rig itself: what the other tests of this folder take for granted."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import paramiko
import pytest

from deployments.environment import SetupError
from tests.rig import slurm_files
from tests.rig.accounts import ADA, BOB, CODE, CSH, NOISY, ROOT
from tests.rig.slurm import SlurmRig
from tests.rig.ssh import SshRig


def rows(slurm: SlurmRig, job: str, fields: str, *options: str) -> list[list[str]]:
    """What sacct says of a job, a list of fields for each attempt of each task.

    A controller that was restarted empty gives out its ids once more: what was submitted long ago is another's.
    """
    told = slurm.run(["sacct", "-nPX", "-D", "-j", job, "-o", f"{fields},Submit", *options])
    found = [line.split("|") for line in told.stdout.splitlines()]
    since = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() - 240))
    return [row[:-1] for row in found if row[-1] >= since]


def wait(true: Callable[[], bool], within: float = 60.0) -> None:
    deadline = time.monotonic() + within
    while not true() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert true()


def test_an_array_runs_on_both_nodes_and_sacct_tells_its_gpus(slurm: SlurmRig, tmp_path: Path) -> None:
    script = f'echo "$SLURMD_NODENAME $CUDA_VISIBLE_DEVICES" > "{tmp_path}/$SLURM_ARRAY_TASK_ID"; sleep 1'
    job = slurm.submit("--partition=gpu", "--array=0-4", "--gres=gpu:a100:1", script=script)

    wait(lambda: [state for _, state in rows(slurm, job, "JobID,State")] == ["COMPLETED"] * 5)
    told = rows(slurm, job, "AllocTRES,NodeList")
    assert all("gres/gpu:a100=1" in tres.split(",") for tres, _ in told)
    assert {node for _, node in told} == {"n1", "n2"}
    seen = sorted(path.read_text().strip() for path in tmp_path.iterdir())
    assert seen == ["n1 0", "n1 1", "n1 2", "n1 3", "n2 0"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--array=0-1001"], "Invalid job array specification"),
        (["--partition=closed"], "Access/permission denied"),
        (["--partition=elsewhere"], "Invalid partition name specified"),
        (["--account=elsewhere"], "Invalid account or account/partition combination specified"),
        (["--gres=gpu:a100:5"], "Requested node configuration is not available"),
        (["--gres=gpu:v100:1"], "Requested node configuration is not available"),
        (["--mem=1T"], "Memory specification can not be satisfied"),
    ],
)
def test_what_the_cluster_cannot_take_is_refused(slurm: SlurmRig, options: list[str], words: str) -> None:
    with pytest.raises(SetupError, match=words):
        slurm.submit(*options)


def test_an_array_may_have_as_many_tasks_as_the_cluster_says(slurm: SlurmRig) -> None:
    job = slurm.submit("--hold", "--array=0-1000")
    assert slurm.states(job) == ["PENDING"] * 1001


def test_a_qos_refuses_what_is_over_its_limit(slurm: SlurmRig) -> None:
    for _ in range(slurm_files.TIGHT_MAX_SUBMIT):
        slurm.submit("--hold", "--qos=tight")
    with pytest.raises(SetupError, match="QOSMaxSubmitJobPerUserLimit"):
        slurm.submit("--hold", "--qos=tight")


def test_a_job_over_its_partitions_limit_waits_for_ever(slurm: SlurmRig) -> None:
    job = slurm.submit("--partition=short", "--time=3")
    reason = ["squeue", "-h", "-o", "%T %r", "-j", job]
    told = [["PENDING", word] for word in ("PartitionConfig", "PartitionTimeLimit")]  # 22.05's, 24.11's
    wait(lambda: slurm.run(reason).stdout.split() in told)


def test_a_preempted_job_is_requeued_and_runs_again(slurm: SlurmRig, tmp_path: Path) -> None:
    log = tmp_path / "attempts"
    low = slurm.submit(
        "--partition=spare", "--nodes=2", "--cpus-per-task=8", "--ntasks-per-node=1", "--open-mode=append",
        script=f'echo "${{SLURM_RESTART_COUNT:-0}}" >> "{log}"; test "$SLURM_RESTART_COUNT" || sleep 60',
    )  # fmt: skip
    wait(log.exists)
    high = slurm.submit("--partition=high", "--cpus-per-task=8")

    wait(lambda: [state for (state,) in rows(slurm, low, "State")] == ["PREEMPTED", "COMPLETED"], 30.0)
    assert log.read_text().split() == ["0", "1"]
    assert [state for (state,) in rows(slurm, high, "State")] == ["COMPLETED"]


def test_a_job_over_its_memory_is_told_as_such(slurm: SlurmRig) -> None:
    if not slurm.memory_limits:
        pytest.skip("memory is limited where the machine has cgroup v1's memory controller")
    job = slurm.submit("--mem=64M", script="exec python3 -c 'kept = bytearray(2**28); print(len(kept))'")
    wait(lambda: rows(slurm, job, "State,ExitCode") == [["OUT_OF_MEMORY", "0:125"]])


def test_a_job_outlives_the_controller(slurm: SlurmRig, tmp_path: Path) -> None:
    job = slurm.submit(script=f'touch "{tmp_path}/started"; until test -e "{tmp_path}/end"; do sleep 0.1; done')
    wait((tmp_path / "started").exists)
    slurm.stop_controller()
    assert slurm.controller.process is None
    slurm.start_controller()
    assert slurm.states(job) == ["RUNNING"]
    slurm.kill_controller()
    (tmp_path / "end").touch()
    slurm.start_controller()
    wait(lambda: rows(slurm, job, "State") == [["COMPLETED"]])


def test_a_jobs_node_crashes_and_comes_back(slurm: SlurmRig) -> None:
    job = slurm.submit("--nodelist=n1", "--no-requeue", script="sleep 61")
    wait(lambda: slurm.states(job) == ["RUNNING"])
    slurm.node_down("n1")
    wait(lambda: rows(slurm, job, "State") == [["NODE_FAIL"]])
    slurm.node_up("n1")
    again = slurm.submit("--nodelist=n1")
    wait(lambda: rows(slurm, again, "State") == [["COMPLETED"]])


def test_without_slurmdbd_sacct_fails_and_squeue_works(slurm: SlurmRig) -> None:
    slurm.stop_dbd()
    job = slurm.submit("--hold")
    sacct = slurm.run(["sacct", "-nPX", "-j", job])
    assert sacct.returncode == 1 and "Problem talking to the database" in sacct.stderr
    assert slurm.states(job) == ["PENDING"]
    slurm.start_dbd()
    slurm.run(["scancel", job])
    wait(lambda: rows(slurm, job, "State") == [["CANCELLED by 0"]])


def test_users_have_their_own_accounts(slurm: SlurmRig) -> None:
    job = slurm.submit(user=ADA)
    wait(lambda: rows(slurm, job, "User,Account,State") == [["ada", "teaching", "COMPLETED"]])
    with pytest.raises(SetupError, match="Invalid account"):
        slurm.submit(user=BOB)


def test_two_rigs_do_not_meet(slurm: SlurmRig, rig_folder: Path) -> None:
    with SlurmRig(rig_folder, accounting=False, settings={"MaxArraySize": "20"}) as other:
        with pytest.raises(SetupError, match="Invalid job array specification"):
            other.submit("--array=0-20")
        job = other.submit(script="sleep 62")
        wait(lambda: other.states(job) == ["RUNNING"])
        assert slurm.run(["squeue", "-h"]).stdout == ""
        device = rig_folder / "dev" / "n1" / "nvidia0"
        assert device.is_char_device()
    assert other.controller.process is None and not device.exists()
    assert "sleep\x0062" not in running()
    assert slurm.run(["squeue", "-h"]).returncode == 0


def running() -> str:
    """The command lines of all processes."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(entry.read_text())
        except OSError:
            continue
    return "\n".join(found)


def test_ssh_submits_with_the_host_key_verified(sshd: SshRig, slurm: SlurmRig) -> None:
    done = sshd.run("sbatch --parsable --output=/dev/null --wrap 'sleep 0.1'")
    assert done.returncode == 0, done.stderr
    wait(lambda: rows(slurm, done.stdout.strip(), "State") == [["COMPLETED"]])
    assert sshd.logins() == 1
    assert sshd.log.read_text().count("Accepted") == 1


def test_paramiko_meets_the_key_that_it_knows_and_refuses_another(sshd: SshRig) -> None:
    with paramiko.SSHClient() as client:
        client.load_host_keys(str(sshd.known_hosts))
        client.connect(sshd.host, sshd.port, "root", key_filename=str(sshd.key), allow_agent=False)
        _, output, _ = client.exec_command("sinfo --noheader --format=%P")
        assert "cpu*" in output.read().decode().split()
        with client.open_sftp() as sftp:
            assert sftp.normalize(".") == str(sshd.accounts.home(ROOT))
    sshd.change_host_key()
    with paramiko.SSHClient() as client:
        client.load_host_keys(str(sshd.known_hosts))
        with pytest.raises(paramiko.BadHostKeyException):
            client.connect(sshd.host, sshd.port, "root", key_filename=str(sshd.key), allow_agent=False)
    sshd.trust_host_key()
    assert sshd.run("true").returncode == 0


def test_login_shells_differ(sshd: SshRig) -> None:
    assert sshd.run("setenv NAME csh; echo $NAME", user=CSH).stdout == "csh\n"
    noisy = sshd.run("id -u", user=NOISY)
    assert noisy.stdout == "Welcome to the rig\n0\n" and noisy.stderr == "quota: 83 % used\n"
    assert sshd.run("id -un", user=ADA).stdout == "ada\n"


def test_a_cut_connection_leaves_the_server_and_the_command(sshd: SshRig, tmp_path: Path) -> None:
    command = sshd.command(f"touch {tmp_path}/started; sleep 1; touch {tmp_path}/ended")
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as client:
        wait((tmp_path / "started").exists)
        assert sshd.cut() == 1
        assert client.wait(10) == 255
    wait((tmp_path / "ended").exists)
    assert sshd.run("true").returncode == 0
    sshd.kill()
    assert sshd.run("true").returncode == 255
    sshd.start()
    assert sshd.run("true").returncode == 0


def test_a_second_factor_is_asked_for_by_keyboard_interactive(rig_folder: Path) -> None:
    with SshRig(rig_folder, second_factor=True, banner="Authorized use only\n") as sshd:
        refused = sshd.run("true")
        assert refused.returncode == 255 and "Authorized use only\n" in refused.stderr
        with asked_for_a_code(sshd, "000000") as transport:
            assert not transport.is_authenticated()
        with asked_for_a_code(sshd, CODE) as transport:
            assert transport.is_authenticated()


@contextmanager
def asked_for_a_code(sshd: SshRig, code: str) -> Iterator[paramiko.Transport]:
    """A connection as root that has shown its key, and then answered every question with the code."""
    with socket.create_connection((sshd.host, sshd.port)) as line, paramiko.Transport(line) as transport:
        transport.start_client(timeout=10)
        assert transport.auth_publickey("root", paramiko.Ed25519Key(filename=str(sshd.key))) == ["keyboard-interactive"]
        with suppress(paramiko.AuthenticationException):
            transport.auth_interactive("root", lambda title, instructions, prompts: [code] * len(prompts))
        yield transport


def test_a_certificate_lets_in_a_key_that_is_not_listed(sshd: SshRig) -> None:
    key = sshd.new_key(f"certified-{os.getpid()}", authorized=False)
    argv = sshd.command("id -un", user=ADA, key=key, options=["-o", "BatchMode=yes"])
    assert subprocess.run(argv, capture_output=True).returncode == 255
    sshd.certify(key, ADA)
    assert subprocess.run(argv, capture_output=True, text=True).stdout == "ada\n"
