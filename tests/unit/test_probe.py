"""What a test job on a compute node says, and whether a steward can live there; the job's own script."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nexa_infra.errors import HostError
from nexa_infra.hosts.base import Completed
from nexa_infra.hosts.framing import alone
from nexa_infra.hosts.local import LocalHost
from nexa_infra.scheduling.slurm.client import SlurmClient
from nexa_infra.scheduling.slurm.probe import NodeAbilities, probe, probe_script, probe_steward, read_abilities
from nexa_infra.spec.cluster import Cluster
from nexa_infra.spec.job import SlurmJob

Found = Mapping[str, tuple[str, int]]
DENIED = "allocation failure: Access/permission denied"
GOOD: Found = {
    "place": ("", 0),
    "submitted": ("4711", 0),
    "node": ("g1", 0),
    "partition": ("gpu", 0),
    "lacking": ("", 0),
    "writes": ("", 0),
    "squeue": ("RUNNING", 0),
    "scontrol": ("JobId=4711", 0),
    "sacct": ("4711", 0),
    "sbatch": ("sbatch: Job 4712 to start at 2026-11-28T08:00:00 using 1 processors on nodes g1", 0),
    "python": ("3.11.2 /usr/bin/python3.11", 0),
}
CLUSTER = Cluster(name="deep", workdir="/scratch/ada", partition="cpu", account="vision")
JOB = SlurmJob(qos="long")
AGAIN = "ask again later (`nexa-infra doctor CLUSTER`)"


def read(**changed: tuple[str, int]) -> NodeAbilities:
    return read_abilities({**GOOD, **changed}, "/scratch/ada", 60)


def unanswered(job: str) -> NodeAbilities:
    return read_abilities({"place": ("", 0), "submitted": ("4711", 0), "job": (job, 0)}, "/scratch/ada", 60)


def test_a_node_that_may_submit_and_has_a_python_can_have_a_steward() -> None:
    assert read() == NodeAbilities(
        True,
        node="g1",
        partition="gpu",
        python="/usr/bin/python3.11",
        version="3.11.2",
        shared=True,
        accounting=True,
    )
    assert read().able and not read().problems
    assert read(python=("3.9.18 /opt/my tools/python3", 0)).python == "/opt/my tools/python3"


@pytest.mark.parametrize(
    ("said", "why", "remedy"),
    [
        ((DENIED, 1), "jobs may not be submitted from g1: sbatch says Access/permission denied", "AllocNodes"),
        (("allocation failure: Invalid user id", 1), "jobs may not be submitted from g1: sbatch says Invalid user id",
         "root may not submit there"),
        (("sbatch: error: by our rule 7, not from nodes", 1),
         "jobs may not be submitted from g1: sbatch says by our rule 7, not from nodes", "ask its administrators"),
        (("timeout: failed to run command 'sbatch': No such file or directory", 127),
         "sbatch is not installed on g1", "Slurm's commands on the nodes"),
    ],
)  # fmt: skip
def test_a_node_that_may_not_submit_says_why(said: tuple[str, int], why: str, remedy: str) -> None:
    abilities = read(sbatch=said)
    assert (abilities.may_submit, abilities.able, abilities.why) == (False, False, why)
    assert remedy in abilities.remedy
    assert abilities.problems == (f"{why}: {abilities.remedy}",)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"sbatch": ("", 124)}, "sbatch gave no answer on g1"),
        ({"squeue": ("", 137)}, "squeue gave no answer on g1"),
        (
            {"sbatch": ("allocation failure: Unable to contact slurm controller (connect failure)", 1)},
            "sbatch on g1 takes no job now: Unable to contact slurm controller (connect failure)",
        ),
        (
            {"sbatch": (("sbatch: error: QOSMaxSubmitJobPerUserLimit\nallocation failure: Job violates accounting/QOS "
                        "policy (job submit limit, user's size and/or time limits)"), 1)},
            ("sbatch on g1 takes no job now: Job violates accounting/QOS policy (job submit limit, user's size and/or "
            "time limits)"),
        ),
    ],
)  # fmt: skip
def test_a_controller_that_cannot_say_leaves_it_unknown(changed: dict[str, tuple[str, int]], why: str) -> None:
    abilities = read(**changed)
    assert (abilities.may_submit, abilities.able, abilities.why) == (None, None, why)
    assert abilities.remedy.startswith(AGAIN)


def test_what_else_a_steward_lacks_is_told_with_what_to_do() -> None:
    assert read(python=("none", 0)).problems == (
        "there is no Python 3.9 or newer on g1: ask its administrators for one",
    )
    abilities = read(
        lacking=("squeue\nflock\n", 0),
        squeue=("timeout: failed to run command", 127),
        scontrol=("slurm_load_jobs error: Access/permission denied", 1),
        writes=("bash: flock: command not found", 127),
    )
    assert abilities.able is False and abilities.may_submit
    assert abilities.problems == (
        "not installed on g1: squeue, flock: ask its administrators for them",
        "scontrol does not answer on g1: Access/permission denied: ask its administrators",
    )
    assert read(writes=("ln: failed to create symbolic link 'link': Operation not permitted", 1)).problems == (
        (
            "the workdir /scratch/ada does not do on g1: failed to create symbolic link 'link': Operation not "
            "permitted: name another"
        ),
    )


def test_a_cluster_without_accounting_can_have_a_steward() -> None:
    abilities = read(sacct=("Slurm accounting storage is disabled", 1))
    assert abilities.able and abilities.accounting is False


@pytest.mark.parametrize(
    ("job", "why"),
    [
        ("JobId=1 JobState=PENDING Reason=Resources", "the test job did not start within 60 s (Resources)"),
        ("JobId=1 JobState=PENDING Reason=None", "the test job did not start within 60 s"),
        ("JobId=1 JobState=RUNNING Reason=None BatchHost=g1", "the test job runs on g1 and gives no answer"),
        (
            "JobId=1 JobState=FAILED Reason=NonZeroExitCode ExitCode=127:0 BatchHost=g1",
            "the test job ended on g1 without an answer (FAILED, exit code 127)",
        ),
        ("JobId=1 JobState=DEADLINE ExitCode=0:0", "the test job ended on a compute node without an answer (DEADLINE)"),
        (
            "slurm_load_jobs error: Unable to contact slurm controller",
            "nothing is heard of the test job: Unable to contact slurm controller",
        ),
        ("", "nothing is heard of the test job: scontrol said nothing"),
    ],
)
def test_a_test_job_without_an_answer_leaves_it_unknown(job: str, why: str) -> None:
    abilities = unanswered(job)
    assert (abilities.may_submit, abilities.able, abilities.why) == (None, None, why)
    assert abilities.problems == (f"{why}: {abilities.remedy}",) and abilities.remedy.startswith(AGAIN)


@pytest.mark.parametrize(("code", "trouble"), [(61, "not seen"), (62, "not to be written")])
def test_a_workdir_that_a_node_does_not_share_is_told(code: int, trouble: str) -> None:
    abilities = unanswered(f"JobId=1 JobState=FAILED ExitCode={code}:0 BatchHost=g1")
    assert (abilities.able, abilities.shared) == (None, False)
    assert abilities.why == f"the workdir /scratch/ada is {trouble} on g1"


def test_a_test_job_that_is_refused_leaves_it_unknown() -> None:
    refused = "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified"
    abilities = read_abilities({"place": ("", 0), "submitted": (refused, 1)}, "/scratch/ada", 60)
    assert abilities.may_submit is None
    assert abilities.why.startswith("sbatch refuses a test job: Batch job submission failed: Invalid account")
    assert abilities.remedy.startswith("a steward would be refused as well")
    hung = read_abilities({"place": ("", 0), "submitted": ("", 124)}, "/scratch/ada", 60)
    assert hung.why == "sbatch gave no answer"
    full = read_abilities({"place": ("mkdir: cannot create directory: No space left on device", 1)}, "/scratch/ada", 60)
    assert full.why.endswith("No space left on device") and full.able is None


# ---- what is remembered


@dataclass
class Login(LocalHost):
    """A login node whose test jobs say this."""

    found: Found
    asked: list[str] = field(default_factory=list)

    def script(self, text: str, *, timeout: float | None = None) -> Completed:
        self.asked.append(text)
        said = "".join(f"{output}\n==nexa {name} {code}==\n" for name, (output, code) in self.found.items())
        return Completed(("sh",), 0, said, "sh: trouble")


def test_a_yes_is_remembered_for_a_day(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Login(GOOD)
    first = probe_steward(SlurmClient(host), CLUSTER, JOB)
    assert probe_steward(SlurmClient(host), CLUSTER, JOB) == first and first.able
    assert len(host.asked) == 1
    # Of another partition, account or workdir nothing is known.
    for cluster, job in (
        (CLUSTER, SlurmJob(qos="long", partition="gpu")),
        (CLUSTER, SlurmJob(qos="long", account="speech")),
        (CLUSTER, SlurmJob()),
        (CLUSTER.model_copy(update={"workdir": "/home/ada"}), JOB),
        (CLUSTER.model_copy(update={"host": "login1"}), JOB),
    ):
        host.asked.clear()
        probe_steward(SlurmClient(host), cluster, job)
        assert len(host.asked) == 1
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 86401)
    host.asked.clear()
    probe_steward(SlurmClient(host), CLUSTER, JOB)
    assert len(host.asked) == 1


@pytest.mark.parametrize("found", [{**GOOD, "sbatch": (DENIED, 1)}, {**GOOD, "sbatch": ("", 124)}])
def test_a_no_and_what_is_unknown_are_asked_again(found: Found) -> None:
    host = Login(found)
    for _ in range(2):
        assert not probe_steward(SlurmClient(host), CLUSTER, JOB).able
    assert len(host.asked) == 2


def test_a_no_ends_what_was_remembered_and_what_is_unknown_does_not() -> None:
    client = SlurmClient(Login(GOOD))
    assert probe_steward(client, CLUSTER, JOB).able
    assert probe(SlurmClient(Login({**GOOD, "sbatch": ("", 124)})), CLUSTER, JOB).able is None
    silent = SlurmClient(Login({}))
    assert probe_steward(silent, CLUSTER, JOB).able
    assert probe(SlurmClient(Login({**GOOD, "sbatch": (DENIED, 1)})), CLUSTER, JOB).able is False
    with pytest.raises(HostError, match="did not answer as it should: sh: trouble"):
        probe_steward(silent, CLUSTER, JOB)


def test_a_memory_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    host = Login(GOOD)
    probe_steward(SlurmClient(host), CLUSTER, JOB)
    (memory,) = (Path(os.environ["XDG_CACHE_HOME"]) / "nexa-infra" / "nodes").iterdir()
    for text in ("{", "[]", '{"may_submit": true}', '{"may_submit": true, "lacking": [], "of another version": 1}'):
        memory.write_text(text)
        assert probe_steward(SlurmClient(host), CLUSTER, JOB).able
    assert len(host.asked) == 5


# ---- the script itself


def script(workdir: Path | str, seconds: int = 2) -> str:
    cluster = CLUSTER.model_copy(update={"workdir": str(workdir)})
    return probe_script(cluster, JOB, name="nexa-probe-1", seconds=seconds)


def test_both_scripts_pass_shellcheck() -> None:
    whole = script("/scratch/it's ada's")
    job = whole.partition("<<'NEXA_PROBE'\n")[2].partition("NEXA_PROBE\n")[0]
    assert job.startswith("#!/bin/bash\n")
    for shell, text in (("sh", whole), ("bash", job)):
        # SC2016: what is quoted is for another shell. SC1091: /etc/profile is the site's own.
        argv = ["shellcheck", f"--shell={shell}", "--exclude=SC2016,SC1091", "-"]
        done = subprocess.run(argv, input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_the_test_job_asks_for_what_the_steward_would() -> None:
    options = "--partition=cpu --account=vision --qos=long --time=1 --nodes=1 --ntasks=1 --cpus-per-task=1 --mem=256M"
    text = script("/scratch")
    assert f"sbatch --parsable {options} --job-name=nexa-probe-1 --output=/dev/null --no-requeue" in text
    assert f"sbatch --test-only {options} --output=/dev/null" in text


Commands = Callable[..., Path]


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    """Stand-ins for Slurm's commands; `runs` is what sbatch does with the job on its standard input."""

    def make(runs: str, **others: str) -> Path:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        bodies = {
            "sbatch": f'case " $* " in *" --test-only "*) echo fine; exit;; esac\n{runs}\necho 4711',
            "squeue": "echo RUNNING",
            "scontrol": "echo 'JobId=4711 JobState=PENDING Reason=Priority'",
            "scancel": f'echo "$@" >>{tmp_path}/cancelled',
            "sacct": "exit 1",
        }
        for name, body in (bodies | others).items():
            (folder / name).write_text(f"#!/bin/sh\n{body}\n")
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        return tmp_path / "cancelled"

    return make


AS_A_JOB = """\
for word; do case $word in --chdir=*) cd "${word#--chdir=}" ;; esac; done
SLURM_JOB_ID=4711 SLURMD_NODENAME=g1 SLURM_JOB_PARTITION=cpu SBATCH_PARTITION=trap bash >/dev/null 2>&1"""


def ask(workdir: Path, seconds: int = 2) -> NodeAbilities:
    cluster = CLUSTER.model_copy(update={"workdir": str(workdir)})
    return probe(SlurmClient(LocalHost()), cluster, JOB, seconds=seconds)


def test_nothing_is_left_of_a_test_job(commands: Commands, tmp_path: Path) -> None:
    cancelled = commands(AS_A_JOB)
    place = tmp_path / "it's a 'work' dir,\nwith $lines %j"
    place.mkdir()
    for workdir in (place, place / "runs" / "more"):
        abilities = ask(workdir)
        assert abilities.able and (abilities.node, abilities.partition) == ("g1", "cpu")
        assert abilities.accounting is False and abilities.python is not None
        assert not list(place.iterdir())
    assert not cancelled.exists()


def test_a_job_reaches_no_settings_of_the_job_it_is_asked_from(commands: Commands, tmp_path: Path) -> None:
    commands(AS_A_JOB, sacct=f"env >{tmp_path}/seen")
    assert ask(tmp_path).accounting
    assert "SLURM_" not in (tmp_path / "seen").read_text() and "SBATCH_" not in (tmp_path / "seen").read_text()


def test_a_test_job_that_waits_is_cancelled(commands: Commands, tmp_path: Path) -> None:
    cancelled = commands("true")
    (tmp_path / "work").mkdir()
    begun = time.monotonic()
    assert ask(tmp_path / "work", 1).why == "the test job did not start within 1 s (Priority)"
    assert time.monotonic() - begun < 4
    assert "--name=nexa-probe-" in cancelled.read_text()
    assert not list((tmp_path / "work").iterdir())


def test_an_answer_of_sbatch_that_is_lost_is_cancelled_too(commands: Commands, tmp_path: Path) -> None:
    cancelled = commands("echo 'sbatch: error: Batch job submission failed: Socket timed out' >&2; exit 1")
    assert "Socket timed out" in ask(tmp_path).why
    assert "--name=nexa-probe-" in cancelled.read_text()


def test_a_node_that_does_not_see_the_workdir_is_found_by_its_exit_code(commands: Commands, tmp_path: Path) -> None:
    elsewhere = AS_A_JOB.replace('cd "${word#--chdir=}"', "cd /")
    failed = 'echo "JobId=4711 JobState=FAILED ExitCode=$(cat "$0.code"):0 BatchHost=g1"'
    commands(f"{elsewhere}\necho $? >{tmp_path}/bin/scontrol.code", scontrol=failed)
    abilities = ask(tmp_path, 1)
    assert abilities.why == f"the workdir {tmp_path} is not seen on g1" and abilities.shared is False


def test_a_python_that_lacks_its_library_or_is_old_is_passed_over(commands: Commands, tmp_path: Path) -> None:
    broken = {f"python3.{minor}": "exit 1" for minor in (13, 12, 11)}
    commands(AS_A_JOB, **broken, **{"python3.10": "echo 3.10.1 /site/python3.10"})
    assert (ask(tmp_path).python, ask(tmp_path).version) == ("/site/python3.10", "3.10.1")


def test_a_client_that_ends_its_shell_leaves_nothing(commands: Commands, tmp_path: Path) -> None:
    cancelled = commands("true")
    work = tmp_path / "work"
    work.mkdir()
    client = subprocess.Popen(["/bin/sh", "-s"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert client.stdin
    client.stdin.write(alone(script(work, 600)))
    client.stdin.close()
    _until((work / ".nexa-probe-1" / "told").exists)
    client.kill()
    client.wait()
    _until(lambda: cancelled.exists() and not list(work.iterdir()))


def _until(true: Callable[[], bool]) -> None:
    limit = time.monotonic() + 20
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.05)
