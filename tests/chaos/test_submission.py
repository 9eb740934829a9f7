"""Clients of a real Slurm that are killed as they submit: each array is submitted once, each trial runs once.

What is here of a site and its clients serves `tests/rig/test_submission.py` as well.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import pytest

from deployments.processes import MARK, Process
from nexa_infra.hosts import connections
from nexa_infra.operations import launch, manage, steps
from nexa_infra.runs.record import Run
from nexa_infra.scheduling.base import Admission
from nexa_infra.settings import settings
from nexa_infra.spec.cluster import Cluster
from tests.rig.daemons import descendants, end
from tests.rig.slurm import SlurmRig
from tests.rig.ssh import SshRig

ROUNDS = int(os.environ.get("NEXA_CHAOS_ROUNDS", "20"))
SEED = int(os.environ.get("NEXA_CHAOS_SEED", "20261124"))
TRIALS = 2
AT_ONCE = 8
PATIENCE = 90.0  # seconds
GRACE = 0.5

# sbatch, as slow as the file `pauses` of the run directory says; a file `held-TOKEN` holds it back, a file `mute` its
# answer. What it was asked stays in `argv`.
SBATCH = """\
#!/bin/sh
[ ! -e impatient ] || export SLURM_CONF="$(cat impatient)"
before=0 after=0
[ ! -e pauses ] || read -r before after <pauses
printf '%s\\n' "$@" >argv
while [ -e "held-${{2#--job-name=}}" ]; do sleep 0.02; done
sleep "$before"
told=$({program} "$@")
code=$?
sleep "$after"
while [ -e mute ]; do sleep 0.02; done
[ -z "$told" ] || printf '%s\\n' "$told"
exit $code
"""
# squeue, which where there is a file `impatient` waits for an answer as long as the slurm.conf says that it names.
SQUEUE = """\
#!/bin/sh
[ ! -e impatient ] || export SLURM_CONF="$(cat impatient)"
exec {program} "$@"
"""
# flock, as on a file system without locks where the run directory has a file `unlocked`.
FLOCK = """\
#!/bin/sh
[ ! -e unlocked ] || exit 0
exec {program} "$@"
"""


@dataclass(frozen=True)
class Site:
    """The rig's Slurm and an sshd before it, as clients see them."""

    slurm: SlurmRig
    sshd: SshRig
    folder: Path
    config: Path
    environment: dict[str, str]

    def cluster(self, *, over_ssh: bool) -> Cluster:
        """The cluster, from afar or from its login node."""
        sshd = self.sshd
        login = {"host": sshd.host, "port": sshd.port, "user": "root"} if over_ssh else {}
        keys = {"key_file": str(sshd.key), "known_hosts": str(sshd.known_hosts)} if over_ssh else {}
        return Cluster(
            name="rig", workdir=str(self.folder / "it's w"), poll_floor=0.3, poll_ceiling=0.5, **login, **keys
        )

    def run(self, *overrides: str, over_ssh: bool = False, snapshot: Run | None = None) -> Run:
        """A run that lacks nothing but its submission; its code is another run's where one is given."""
        run = steps.plan(self.config, cluster=self.cluster(over_ssh=over_ssh), overrides=overrides)
        run = run.model_copy(update={"snapshot": snapshot.snapshot}) if snapshot else steps.sync(run)
        return steps.render(run)

    def client(self, act: Callable[[str], object], run: Run | str, **environment: str) -> Client:
        """Start a process that does something with a run."""
        here, there = _PROCESSES.Pipe()
        name = run if isinstance(run, str) else run.id
        process = _PROCESSES.Process(target=_live, args=(act, name, {**self.environment, **environment}, there))
        process.start()
        there.close()
        assert here.poll(PATIENCE) and here.recv() == "begun"
        return Client(process, here)

    def arrays(self, run: Run) -> dict[str, list[str]]:
        """What accounting says of every array of a run: token and id -> its tasks' states."""
        return accounted(self.slurm, run.created_at).get(run.id, {})

    def queued(self, run: Run) -> set[str]:
        """The ids of the arrays of a run that the controller knows."""
        told = self.slurm.run(["squeue", "-h", "-t", "all", "-o", "%F|%j"]).stdout
        return {line.partition("|")[0] for line in told.splitlines() if f"|nexa-{run.id}-" in line}


@dataclass
class Client:
    """A process of its own that works on a run."""

    process: multiprocessing.process.BaseProcess
    line: Connection

    def wait(self, within: float = PATIENCE) -> str:
        """Return how it ended: `done`, or an error's kind and words."""
        if not self.line.poll(within):
            self.kill()
            raise AssertionError(f"a client has not ended within {within:g} s")
        told = self.line.recv()
        self.process.join(PATIENCE)
        return str(told)

    def kill(self) -> None:
        """End it by SIGKILL, and nothing else."""
        self.process.kill()
        self.process.join(PATIENCE)

    def kill_all(self, run: Run) -> None:
        """End it, all that it has started, and what works in the run directory without being a job."""
        found = Process.of(self.process.pid or 0)
        end([*([found, *descendants(found)] if found else []), *at_work(run)])
        self.process.join(PATIENCE)


_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["nexa_infra.operations.launch", "nexa_infra.hosts.ssh", "fabric", __name__])


def _live(act: Callable[[str], object], name: str, environment: dict[str, str], line: Connection) -> None:
    os.environ.clear()
    os.environ.update(environment)
    settings.cache_clear()
    line.send("begun")
    try:
        act(name)
        line.send("done")
    except (Exception, SystemExit, KeyboardInterrupt) as error:  # noqa: BLE001 - whatever it is, the test is told
        line.send(f"{type(error).__name__}: {error}")


def submit(name: str) -> None:
    """Submit a run, as the road does."""
    steps.submit(manage.find(name))


def resume(name: str) -> None:
    """Take a run to its end, as the verb does."""
    launch.follow_run(manage.prepare_resume(name))


def cancel(name: str) -> None:
    """End a run, as the verb does."""
    manage.cancel(name)


def at_work(run: Run) -> list[Process]:
    """The processes that work in a run directory and are no job's: the submission's shells, sbatch."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").readlink() != Path(run.directory):
                continue
            environment = b"\0" + (entry / "environ").read_bytes()
            if b"\0SLURM_JOB_ID=" in environment or f"\0{MARK}=".encode() in environment:
                continue  # a job's, or slurmstepd
        except OSError:
            continue
        if process := Process.of(int(entry.name)):
            found.append(process)
    return found


def accounted(slurm: SlurmRig, since: datetime) -> dict[str, dict[str, list[str]]]:
    """What sacct says of all arrays since a moment: run -> `token array` -> its tasks' states."""
    start = since.astimezone().strftime("%Y-%m-%dT%H:%M:%S")
    told = slurm.run(["sacct", "-XnPD", "-S", start, "--format=JobID,JobName,State"]).stdout
    found: dict[str, dict[str, list[str]]] = {}
    for line in told.splitlines():
        job, name, state = line.split("|")
        if name.startswith("nexa-"):
            arrays = found.setdefault(name.removeprefix("nexa-").rpartition("-")[0], {})
            arrays.setdefault(f"{name} {job.partition('_')[0]}", []).append(state)
    return found


def there(run: Run, name: str) -> Path:
    """A file of a run directory on the cluster."""
    return Path(run.directory) / name


def ran(run: Run) -> Counter[str]:
    """How often each trial ran, by its own file."""
    path = there(run, "ran")
    return Counter(path.read_text().split()) if path.exists() else Counter()


def started(run: Run) -> Counter[str]:
    """How often each trial started, by the status files."""
    lines = [line for path in there(run, "status").iterdir() for line in path.read_text().splitlines()]
    return Counter(line.split("\t")[1] for line in lines if line.startswith("start"))


def once(trials: int = TRIALS) -> Counter[str]:
    """Each trial, once."""
    return Counter(map(str, range(trials)))


def wait(true: Callable[[], object], within: float = 30.0) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + within
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


@pytest.fixture
def site(slurm: SlurmRig, rig_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    project = tmp_path / "project"
    project.mkdir()
    config = project / "submission.yaml"
    run = 'echo "$NEXA_TRIAL" >>"$NEXA_RUN_DIR/ran"'
    config.write_text(
        json.dumps(
            {
                "job": {"name": "chaos", "memory": "100M", "time": "5"},
                "launcher": {"type": "command", "command": ["sh", "-c", run]},
                "sweep": {"parameters": {"n": list(map(str, range(TRIALS)))}},
            }
        )
    )
    monkeypatch.chdir(project)
    bin_folder = rig_folder / "bin"
    bin_folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE), ("flock", FLOCK)):
        (bin_folder / name).write_text(text.format(program=shutil.which(name)))
        (bin_folder / name).chmod(0o755)
    path = f"{bin_folder}:{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)
    monkeypatch.setenv("NEXA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NEXA_GRACE_SECONDS", str(GRACE))
    settings.cache_clear()
    monkeypatch.setattr(steps, "check", lambda run: Admission())
    environment = {"SLURM_CONF": str(slurm.conf), "PATH": path}
    with SshRig(rig_folder / "sshd", environment=environment, accounts=slurm.accounts) as sshd:
        yield Site(slurm, sshd, rig_folder, config, dict(os.environ))
        connections.close_all()


# ---- killed at random ----

Phase = Literal["before", "between", "after"]
PHASES: tuple[Phase, ...] = ("before", "between", "after")


@dataclass
class Tally:
    """What was seen over all rounds."""

    killed: Counter[str] = field(default_factory=Counter)
    unanswered: int = 0  # arrays that the controller had at the kill, with no id returned
    resumed: int = 0  # clients that were killed as they went on
    arrays: int = 0
    given_up: int = 0  # tokens that were claimed by nobody, for want of an array
    void: int = 0  # arrays of such tokens, which came after all
    lost: int = 0
    doubled: int = 0
    told: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"submissions {sum(self.killed.values())}, killed before the intent {self.killed['before']}, between "
            f"intent and id {self.killed['between']} (taken, and no id returned: {self.unanswered}), after "
            f"{self.killed['after']}, and once more {self.resumed}; tokens given up {self.given_up}, "
            f"arrays {self.arrays}, of them void {self.void}: lost={self.lost} doubled={self.doubled}"
        )


@dataclass
class Round:
    """A run, and how its client is killed."""

    run: Run
    aim: Phase
    chance: random.Random

    @property
    def over_ssh(self) -> bool:
        """Whether its client is elsewhere."""
        return self.run.mirror is not None

    @property
    def phase(self) -> Phase:
        """How far it is, by what is in the run directory."""
        if there(self.run, "submissions/1.answer").exists():
            return "after"
        return "between" if there(self.run, "submissions/1.json").exists() else "before"

    def has_intent(self) -> bool:
        """Whether it is past its intent."""
        return self.phase != "before"

    def kill(self, client: Client, site: Site) -> None:
        """Kill the client: alone, with its connection, or with all that it has set going."""
        match self.chance.choice(("alone", "cut", "all", "all")):
            case "cut" if self.over_ssh:
                client.kill()
                site.sshd.cut()
            case "all":
                client.kill_all(self.run)
            case _:
                client.kill()


def until_intent(rounds: Sequence[Round], site: Site) -> float:
    """How long it takes until a client's intent is there, seconds."""
    seconds = []
    for each in rounds:
        client = site.client(submit, each.run)
        begun = time.monotonic()
        wait(each.has_intent)
        seconds.append(time.monotonic() - begun)
        assert client.wait() == "done"
    return min(seconds)


def strike(each: Round, site: Site, intent: float, tally: Tally) -> None:
    """Kill a client that submits, at the instant that is aimed at, and count what it hit."""
    chance = each.chance
    there(each.run, "pauses").write_text(f"{chance.uniform(0, 0.1):.3f} {chance.uniform(0, 0.2):.3f}\n")
    hold = there(each.run, chance.choice((f"held-nexa-{each.run.id}-1", "mute")))
    if each.aim == "between":
        hold.touch()  # however late this machine wakes us, the id is not there
    client = site.client(submit, each.run)
    if each.aim == "before":
        time.sleep(chance.uniform(0, intent))
    else:
        wait(each.has_intent)
        if each.aim == "after":
            wait(lambda: each.phase == "after")
        time.sleep(chance.uniform(0, 0.25 if each.aim == "between" else 0.1))
    each.kill(client, site)
    phase = each.phase
    tally.killed[phase] += 1
    tally.unanswered += phase == "between" and bool(site.queued(each.run))
    hold.unlink(missing_ok=True)


def go_on(each: Round, site: Site, tally: Tally) -> None:
    """Let fresh clients go on until the run is done; some of them are killed, too."""
    chance = each.chance
    time.sleep(chance.uniform(0, 0.2))
    if chance.random() < 0.3:
        client = site.client(resume, each.run)
        time.sleep(chance.uniform(0, 1.0))
        each.kill(client, site)
        tally.resumed += 1
    # On the login node, a run that was started from afar is known by its directory.
    name = each.run.directory if chance.random() < 0.3 else each.run.id
    for _ in range(5):
        told = site.client(resume, name).wait()
        if not told.startswith(("ConnectionLostError", "UnreachableError")):  # another round has cut all connections
            break
    if told != "done":
        tally.told.append(f"{each.run.id}: {told}")


def judge(each: Round, arrays: dict[str, list[str]], tally: Tally) -> None:
    """Judge a run by Slurm's own words and by what its trials wrote."""
    run = each.run
    own, begun = ran(run), started(run)
    tally.lost += sum(not own[trial] for trial in once())
    tally.doubled += sum(max(own[trial], begun[trial]) > 1 for trial in once())
    at_work = {path.name.partition("_")[0] for path in there(run, "status").iterdir()}
    idle = [array for array in arrays if array.split()[1] not in at_work]
    tally.arrays += len(arrays)
    tally.void += len(idle)
    if own != once() or begun != once():
        tally.told.append(f"{run.id}: ran {own}, started {begun}, arrays {arrays}")
    if any(state != "COMPLETED" for states in arrays.values() for state in states):
        tally.told.append(f"{run.id}: {arrays}")
    voided = {link.name for link in there(run, "claims").iterdir() if link.readlink() == Path("void")}
    tally.given_up += len(voided)
    if twice := [array for array in idle if array.split()[0] not in voided]:
        tally.told.append(f"{run.id}: {twice} were submitted though their tokens were taken: {arrays}")


def test_of_clients_that_are_killed_as_they_submit_every_trial_runs_once(
    site: Site, capfd: pytest.CaptureFixture[str]
) -> None:
    begun = datetime.now(UTC)
    first = site.run()
    runs = [first, *(site.run(over_ssh=n % 3 == 0, snapshot=first) for n in range(1, ROUNDS + 4))]
    rounds = [Round(run, PHASES[n % 3], random.Random(f"{SEED} {n}")) for n, run in enumerate(runs)]
    connections.close_all()
    tried, rounds = rounds[:4], rounds[4:]
    intent = {far: until_intent([each for each in tried if each.over_ssh is far], site) for far in (False, True)}
    tally = Tally()

    def play(each: Round) -> None:
        strike(each, site, intent[each.over_ssh], tally)
        go_on(each, site, tally)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(play, rounds):
            pass
    wait(lambda: not site.slurm.run(["squeue", "-h"]).stdout)
    wait(lambda: sum(map(len, (said := accounted(site.slurm, begun)).values())) >= len(runs) and settled(said))
    said = accounted(site.slurm, begun)
    for each in rounds:
        judge(each, said.get(each.run.id, {}), tally)
    with capfd.disabled():
        sys.stderr.write(f"\nseed {SEED}: {tally}\n")
    assert not tally.told, "\n".join(tally.told)
    assert (tally.lost, tally.doubled) == (0, 0)
    assert sum(tally.killed.values()) == ROUNDS
    assert min(tally.killed[phase] for phase in PHASES) >= ROUNDS * 3 // 20, tally


# ---- late, and twice ----


def test_an_sbatch_that_comes_after_it_was_given_up_runs_nothing(site: Site) -> None:
    run = site.run()
    token = f"nexa-{run.id}-1"
    there(run, "unlocked").touch()
    held = there(run, f"held-{token}")
    held.touch()
    client = site.client(submit, run)
    wait(there(run, "argv").exists)
    client.kill()
    assert site.client(resume, run).wait() == "done", "looked for twice, it is given up, and submitted anew"
    assert there(run, f"claims/{token}").readlink() == Path("void")
    assert ran(run) == once() and len(site.queued(run)) == 1

    held.unlink()
    wait(lambda: len(site.queued(run)) == 2)
    wait(lambda: not site.slurm.run(["squeue", "-h"]).stdout)
    assert there(run, "job.log").read_text().count(f"{token} is owned by array void") == TRIALS
    assert ran(run) == started(run) == once()
    wait(lambda: sorted(site.arrays(run).values()) == [["COMPLETED"] * TRIALS] * 2)
    assert is_done_and_priced(run)


def test_of_two_arrays_of_one_submission_the_first_to_start_runs_the_trials(site: Site) -> None:
    run = site.run("job.extra.hold=true")
    assert site.client(submit, run).wait() == "done"
    argv = there(run, "argv").read_text().splitlines()
    again = site.slurm.run(["sbatch", *argv], cwd=Path(run.directory))
    assert again.returncode == 0, again.stderr
    arrays = site.queued(run)
    assert len(arrays) == 2
    site.slurm.run(["scontrol", "release", ",".join(arrays)])
    assert site.client(resume, run).wait() == "done"
    # Once the run is over, its claims are closed, with the name of who had them.
    owner = str(there(run, f"claims/nexa-{run.id}-1").readlink()).removeprefix("void-")
    assert owner in arrays
    assert there(run, "job.log").read_text().count(f"is owned by array {owner}") == TRIALS
    assert ran(run) == started(run) == once()
    wait(lambda: sorted(site.arrays(run).values()) == [["COMPLETED"] * TRIALS] * 2)
    assert is_done_and_priced(run)


def is_done_and_priced(run: Run) -> bool:
    """Whether a fresh look finds every trial completed, and what it cost."""
    trials = steps.look(run)
    return all(
        (each.state, each.reason, len(each.attempts)) == ("completed", "", 1) and each.usd is not None
        for each in trials
    )


def settled(said: dict[str, dict[str, list[str]]]) -> bool:
    """Whether accounting has caught up with the queue."""
    states = [state for arrays in said.values() for told in arrays.values() for state in told]
    return not {"PENDING", "RUNNING"} & set(states)
