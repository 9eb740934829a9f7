"""Where the nodes of a job meet: the job script's own function, by real bash, with a stub of Slurm."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nexa_infra.scheduling.script import render_script
from nexa_infra.spec.run import TrainingConfig

SCONTROL = """#!/bin/bash
case "$1 $2" in
  'show hostnames') printf '%s\\n' n7 n8 ;;
  'show node') echo "NodeName=$4 Arch=x86_64 ${ADDRESS:+NodeAddr=$ADDRESS} NodeHostName=h Version=24" ;;
esac
"""
GETENT = '#!/bin/bash\n[[ -n ${KNOWN-} ]] && echo "10.0.0.7 n7"\n'

Meet = Callable[..., subprocess.CompletedProcess[str]]


def script(job: dict[str, Any], launcher: dict[str, Any], **config: Any) -> str:
    asked = {"job": job, "launcher": {"type": "torchrun", "script": "train.py", **launcher}, **config}
    return render_script(TrainingConfig.model_validate(asked), run_id="r", run_dir="/r").text


def function(text: str, name: str) -> str:
    """Return a function's text."""
    begin = text.index(f"\n{name}() {{\n") + 1
    return text[begin : text.index("\n}\n", begin) + 3]


@pytest.fixture
def meet(tmp_path: Path) -> Meet:
    """Run `meet` of a job of two nodes, and print where."""
    for name, text in {"scontrol": SCONTROL, "getent": GETENT}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(job_id: int, launcher: dict[str, Any] | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        text = script({"nodes": 2}, launcher or {})
        body = "\n".join(("set -u", function(text, "stop"), function(text, "meet")))
        body += '\nnexa_endpoint= nexa_head=\nmeet\nprintf "%s %s" "$nexa_endpoint" "$nexa_head"\n'
        return subprocess.run(
            ["bash", "-c", body],
            env={
                "PATH": f"{tmp_path}:{os.environ['PATH']}",
                "SLURM_JOB_ID": str(job_id),
                "SLURM_JOB_NODELIST": "n[7-8]",
                **variables,
            },
            capture_output=True,
            text=True,
            check=False,
        )

    return run


@pytest.fixture
def listener() -> Any:
    """Something that listens on a port which a job's number leads to."""
    for job in range(1, 12000):
        taken, free = 20000 + job % 12000, 20000 + (job + 257) % 12000
        try:
            with socket.create_server(("127.0.0.1", free)):
                pass
            with socket.create_server(("127.0.0.1", taken)) as server:
                yield job, taken, free, server
                return
        except OSError:
            continue


def test_nodes_meet_at_the_first_one_at_a_port_of_the_job_s_own(meet: Meet, listener: Any) -> None:
    job, taken, _, server = listener
    server.close()
    done = meet(job, KNOWN="1")
    assert (done.stdout, done.stderr) == (f"n7:{taken} n7", "")
    assert meet(job + 12000, KNOWN="1").stdout == done.stdout


def test_a_port_that_something_listens_on_is_left_alone(meet: Meet, listener: Any) -> None:
    job, _, free, _ = listener
    assert meet(job, KNOWN="1").stdout == f"n7:{free} n7"


def test_a_node_whose_name_is_none_on_the_network_is_met_at_its_address(meet: Meet) -> None:
    endpoint, _, head = meet(7, ADDRESS="10.1.2.3").stdout.partition(" ")
    assert endpoint.startswith("10.1.2.3:") and head == "10.1.2.3"
    done = meet(7)
    assert done.returncode == 2
    assert done.stderr == "job.sbatch: the first node of n[7-8] has no address: set launcher.rdzv_endpoint\n"


def test_the_launcher_s_own_endpoint_is_taken_as_it_is(meet: Meet) -> None:
    assert meet(7, {"rdzv_endpoint": "n9:29500"}).stdout == "n9:29500 "


def test_a_single_node_meets_nobody() -> None:
    assert "meet" not in script({}, {}) and "gang.sh" in script({}, {})


@pytest.mark.parametrize(
    ("job", "launcher", "config"),
    [
        ({"nodes": 2}, {}, {}),
        ({"nodes": 2}, {"rdzv_endpoint": "n9:29500", "interface": "it's"}, {"checkpoint": {"requeue": 2}}),
        ({"nodes": 3}, {"nnodes": "1:3"}, {"checkpoint": {"chain_until_done": True, "dir": "~/it's kept/"}}),
        ({}, {}, {"checkpoint": {"chain_until_done": True, "requeue": 3}}),
    ],
)
def test_a_script_of_a_gang_passes_shellcheck(
    tmp_path: Path, job: dict[str, Any], launcher: dict[str, Any], config: dict[str, Any]
) -> None:
    (tmp_path / "job.sbatch").write_text(script(job, launcher, **config))
    done = subprocess.run(["shellcheck", "--shell=bash", tmp_path / "job.sbatch"], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("", 0)


def test_a_job_that_requeues_itself_is_warned_and_requeued_by_slurm_s_options() -> None:
    text = script({"signal_before_end": 120}, {}, checkpoint={"requeue": 2})
    assert "#SBATCH --requeue\n#SBATCH --signal=B:USR1@120\n" in text
    assert "nexa_restarts < 2" in text and "sleep 60\n" in text
    assert "nexa_restarts <" not in script({}, {}, checkpoint={"chain_until_done": True})
    assert "requeue" not in script({}, {}) and "USR1@" not in script({}, {})


def test_a_job_is_warned_by_the_signal_that_it_asks_for_and_without_a_checkpoint_only_where_it_asks() -> None:
    command = {"type": "python"}
    for job, option in (
        ({"signal": "HUP"}, "HUP@90"),
        ({"signal_before_end": 60}, "USR1@60"),
        ({"signal": "USR1"}, "USR1@90"),
    ):
        text = script(job, command)
        assert f"#SBATCH --signal=B:{option}\n" in text and "requeue" not in text
        assert f"\ntrap 'forward {option[:-3]}' {option[:-3]}\n" in text
        assert f'$nexa_caught == " {option[:-3]}"' in function(text, "ended_by")
    assert "--signal" not in script({}, command) and "forward HUP" not in script({}, command)
    assert "#SBATCH --requeue\n#SBATCH --signal=B:INT@90\n" in script(
        {"signal": "INT"}, command, checkpoint={"requeue": 1}
    )


# Ends of a trial: what the script says of why, with Slurm's word on the job.
ENDS: list[tuple[dict[str, Any], str, int, str, bool | None, str]] = [
    ({"requeue": 1}, " USR1", 143, "", False, "timeout"),
    ({"requeue": 1}, " USR1", 0, "", False, ""),
    ({"requeue": 1}, " USR1", 0, "", True, "timeout"),  # it has saved itself: it goes on
    ({"requeue": 1}, " USR1 TERM", 0, "", False, "timeout"),
    ({"requeue": 1}, "", 1, "", False, ""),
    ({"requeue": 1}, " TERM", 143, " PreemptTime=None ", False, ""),
    ({"requeue": 1}, " TERM", 143, " PreemptTime=2026-11-24T08:15:00 ", False, "preempted"),
    ({"chain_until_done": True}, " USR1", 143, "", False, "timeout"),
    ({"chain_until_done": True}, " USR1", 143, "", None, "stuck"),
    ({"chain_until_done": True}, " USR1", 143, "", True, "timeout"),
    ({"chain_until_done": True}, " USR1", 0, "", False, ""),
]


@pytest.mark.parametrize(("checkpoint", "caught", "code", "job", "saved", "why"), ENDS)
def test_why_a_trial_has_ended_is_told(
    tmp_path: Path, checkpoint: dict[str, Any], caught: str, code: int, job: str, saved: bool | None, why: str
) -> None:
    (tmp_path / "scontrol").write_text(f'#!/bin/bash\necho "JobId=7{job}x=y"\n')
    (tmp_path / "scontrol").chmod(0o755)
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / ".nexa-attempt").touch()
    (kept / ".nexa-warning").touch()
    for number, name in enumerate((".nexa-attempt", ".nexa-warning"), 1):
        os.utime(kept / name, (number, number))
    if saved is None:  # nor did the attempt before
        (kept / ".nexa-idle").write_text("1\n")
        os.utime(kept / ".nexa-idle", (0, 0))
    if saved:
        (kept / "last.pt").touch()
    body = f"""set -u
{function(script({}, {}, checkpoint=checkpoint), "ended_by")}
{function(script({}, {}, checkpoint=checkpoint), "may_requeue")}
{function(script({}, {}, checkpoint=checkpoint), "moves_on") if "chain_until_done" in checkpoint else ""}
nexa_caught='{caught}' nexa_code={code} nexa_checkpoints=kept nexa_status=status nexa_why='' nexa_job=7
nexa_trial=0 nexa_attempt=2
ended_by
printf '%s' "$nexa_why"
"""
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", body], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (why, "")
    status = tmp_path / "status"
    assert (status.read_text() if status.exists() else "") == (f"why\t0\t2\t{why}\n" if why else "")


@pytest.mark.parametrize(("restarts", "asked"), [("0", "requeue 7\n"), ("1", "")])
def test_a_trial_that_goes_on_after_its_warning_is_requeued_or_left_to_its_own_end(
    tmp_path: Path, restarts: str, asked: str
) -> None:
    (tmp_path / "scontrol").write_text(f'#!/bin/bash\necho "$@" >>{tmp_path}/asked\n')
    (tmp_path / "scontrol").chmod(0o755)
    text = script({}, {}, checkpoint={"requeue": 1})
    names = ("ended_by", "may_requeue", "requeue", "requeue_later")
    functions = "\n".join(function(text, name) for name in names)
    body = f"""set -u
{functions}
sleep() {{ :; }}
nexa_caught=" USR1" nexa_checkpoints=kept
nexa_run_dir={tmp_path} nexa_status=status nexa_why='' nexa_job=7 nexa_trial=0 nexa_attempt=2
requeue_later
wait "$nexa_timer"
"""
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_RESTART_COUNT": restarts}
    subprocess.run(["bash", "-c", body], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=30)
    file = tmp_path / "asked"
    assert (file.read_text() if file.exists() else "") == asked
    assert not (tmp_path / "status").exists(), "it may end well yet"
