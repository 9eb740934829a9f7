"""A bad night of clients and connections: no trial is lost, none runs twice, nothing is left behind.

`make chaos` runs all of it; without, some cases are left out and the others are short.
"""

from __future__ import annotations

import json
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pytest

from nexa_infra.hosts import connections
from nexa_infra.operations import launch, manage, steps
from nexa_infra.runs.record import Run
from nexa_infra.spec.cluster import Cluster
from tests.chaos.bad_night import PATIENCE, SHORT, TRIALS, begun, finish, prepared, tally
from tests.chaos.tally import FULL, SEED, Tally, only_in_full, starts, sweep
from tests.chaos.test_submission import Client, Site, resume, site, submit, there, wait
from tests.rig.proxy import Proxy

__all__ = ["site", "tally"]

# ---- clients ----

# What a client is killed at: a name, and the phase of its submission that this is.
STEPS = ("planned", "made", "recorded", "held", "mute", "answered", "running", "ended", "told")
FEW = 4


def ended(tally: Tally, run: Run) -> bool:
    return len(starts(tally.words, run, "ended")) >= run.trials


def road(order: str) -> None:
    """Take a run along the whole road, from its config, or along what is left of it."""
    told = json.loads(order)
    run = steps.plan(
        told["config"],
        cluster=Cluster.model_validate(told["cluster"]),
        overrides=told["overrides"],
        moment=datetime.fromisoformat(told["moment"]),
        token=told["token"],
    )
    if run.files.record.exists():
        resume(run.id)
    else:
        launch.follow_run(run)


@dataclass
class Round:
    """A client that is killed at a step, and those that go on."""

    run: Run
    step: str
    order: str
    chance: random.Random

    def has_intent(self) -> bool:
        return there(self.run, "submissions/1.json").exists()

    def has_id(self) -> bool:
        return there(self.run, "submissions/1.answer").exists()

    @property
    def phase(self) -> str:
        return "after" if self.has_id() else "between" if self.has_intent() else "before"

    def reached(self, tally: Tally) -> Callable[[], object]:
        """Whether the client has come to the step."""
        run = self.run
        found: dict[str, Callable[[], object]] = {
            "planned": lambda: True,
            "made": Path(run.directory).exists,
            "recorded": run.files.record.exists,
            "held": self.has_intent,
            "mute": self.has_intent,
            "answered": self.has_id,
            "running": begun(tally, run),
            "ended": lambda: ended(tally, run),
            "told": run.files.results.exists,
        }
        return found[self.step]


def killed_and_gone_on(each: Round, site: Site, tally: Tally) -> None:
    run, chance = each.run, each.chance
    hold = {"held": f"held-nexa-{run.id}-1", "mute": "mute"}.get(each.step)
    if hold:
        there(run, hold).touch()
    client = site.client(road, each.order)
    wait(each.reached(tally), 90.0)
    time.sleep(chance.uniform(0, {"planned": 0.4, "held": 0.25, "mute": 0.25, "ended": 0.6}.get(each.step, 0.001)))
    client.kill()
    if chance.random() < 0.5:
        client.kill_all(run)
    tally.killed[each.phase] += 1
    if hold:
        time.sleep(chance.uniform(0, 0.3))
        there(run, hold).unlink()
    for _ in range(2 if chance.random() < 0.3 else 0):
        client = site.client(road, each.order)
        time.sleep(chance.uniform(0, 1.5))
        client.kill()
    told = site.client(road, each.order).wait(PATIENCE)
    if told != "done":
        tally.told.append(f"{run.id}, killed when {each.step}: {told}")


def planned(site: Site, tally: Tally, number: int, step: str, snapshot: Run | None) -> Round:
    """A run that is known, and is made only where its client is killed later than that."""
    cluster = site.cluster(over_ssh=number % 2 == 1)
    overrides = sweep(tally.words, FEW, "true")
    moment, token = datetime.now(UTC), f"{number:04x}"
    run = steps.plan(site.config, cluster=cluster, overrides=overrides, moment=moment, token=token)
    if step in {"held", "mute", "answered", "running", "ended", "told"}:
        run = run.model_copy(update={"snapshot": snapshot.snapshot}) if snapshot else steps.sync(run)
        run = steps.render(run)
    order = {
        "config": str(site.config),
        "cluster": cluster.model_dump(mode="json"),
        "overrides": overrides,
        "moment": moment.isoformat(),
        "token": token,
    }
    return Round(run, step, json.dumps(order), random.Random(f"{SEED} step {number}"))


def test_client_killed_at_every_step_and_resumed(site: Site, tally: Tally, capfd: pytest.CaptureFixture[str]) -> None:
    # Twice as often, and more, where it matters most.
    aims = list(STEPS) + [each for each in STEPS for _ in range(17 if each in {"held", "mute"} else 2) if FULL]
    first = prepared(site, tally, trials=1)
    rounds = [planned(site, tally, number, step, first) for number, step in enumerate(aims)]
    connections.close_all()
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(lambda each: killed_and_gone_on(each, site, tally), rounds):
            pass
    for each in rounds:
        tally.add(site.slurm, manage.find(each.run.id))
    tally.close(capfd)
    # A kill between an intent and its id is forced; how often the others hit is the machine's to say.
    assert tally.killed["between"] >= (30 if FULL else 2)
    assert not FULL or min(tally.killed.values()) >= 2


@only_in_full
def test_two_clients_submit_one_run(
    site: Site, tally: Tally, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arrays = 0
    elsewhere = {"NEXA_HOME": str(tmp_path / "other")}
    first: Run | None = None
    for number in range(8):
        run = prepared(site, tally, "job.array_parallelism=6", work="sleep 0.2", over_ssh=True, snapshot=first)
        first = first or run
        chance = random.Random(f"{SEED} two {number}")
        there(run, "pauses").write_text(f"{chance.uniform(0, 0.3):.3f} {chance.uniform(0, 0.3):.3f}\n")
        clients = [site.client(resume, run)]
        time.sleep(chance.uniform(0, 0.5))
        clients.append(site.client(resume, run.directory, **elsewhere))
        assert [client.wait(PATIENCE) for client in clients] == ["done", "done"]
        arrays += len(site.queued(run))
        tally.add(site.slurm, run)
    tally.notes.append(f"runs {number + 1}, arrays {arrays}")
    tally.close(capfd)
    assert arrays == number + 1


@only_in_full
def test_a_late_sbatch_makes_a_second_array(site: Site, tally: Tally, capfd: pytest.CaptureFixture[str]) -> None:
    seen = []
    for far in (False, True):
        run = prepared(site, tally, work="true", over_ssh=far)
        token = f"nexa-{run.id}-1"
        there(run, "unlocked").touch()  # a file system without locks: nobody waits for an orphan
        held = there(run, f"held-{token}")
        held.touch()
        client = site.client(submit, run)
        wait(there(run, "argv").exists)
        client.kill()
        tally.killed["between"] += 1
        finish(site, run)
        held.unlink()
        wait(lambda run=run: len(site.queued(run)) == 2)  # type: ignore[misc]
        seen.append(len(site.queued(run)))
        wait(lambda: not site.slurm.run(["squeue", "-h"]).stdout, 90.0)
        assert there(run, "job.log").read_text().count(f"{token} is owned by array void") == TRIALS
        assert site.client(resume, run).wait(PATIENCE) == "done"
        tally.add(site.slurm, run)
    tally.notes.append(f"arrays seen {seen}, the second one void")
    tally.close(capfd)


# ---- the network's ----


@contextmanager
def meanwhile(act: Callable[[], None], pause: Callable[[], float]) -> Iterator[list[int]]:
    """Do something again and again, beside what the test does; count how often."""
    over, done = threading.Event(), [0]

    def go() -> None:
        while not over.wait(pause()):
            act()
            done[0] += 1

    thread = threading.Thread(target=go)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()


@only_in_full
def test_sshd_killed_every_5_s(site: Site, tally: Tally, capfd: pytest.CaptureFixture[str]) -> None:
    sshd, every = site.sshd, 5.0
    # It takes about 50 seconds.
    run = prepared(site, tally, "job.array_parallelism=4", work="sleep 8",
                   over_ssh=True)  # fmt: skip
    connections.close_all()

    def strike() -> None:
        sshd.kill()
        time.sleep(0.5)
        sshd.start()

    with meanwhile(strike, lambda: every) as done:
        told = site.client(resume, run).wait(PATIENCE)
    if told != "done":
        tally.notes.append(told)
        finish(site, run)
    tally.add(site.slurm, run)
    tally.notes.append(f"killed {done[0]} times, every {every:.0f} s")
    tally.close(capfd)
    assert done[0] >= 2


def test_a_connection_that_delays_stalls_and_cuts(
    site: Site, tally: Tally, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(f"{SEED} proxy")
    counted = {"delay": 0, "stall": 0, "cut": 0, "half": 0}
    with Proxy(site.sshd.port) as proxy:
        known = tmp_path / "known_hosts"
        known.write_text(site.sshd.known_hosts.read_text().replace(f"]:{site.sshd.port}", f"]:{proxy.port}"))
        near = site.cluster(over_ssh=True)
        cluster = near.model_copy(update={"port": proxy.port, "known_hosts": str(known)})
        overrides = [
            *sweep(tally.words, TRIALS, "sleep 3" if FULL else SHORT),
            f"job.array_parallelism={4 if FULL else 8}",
        ]
        run = steps.render(steps.sync(steps.plan(site.config, cluster=cluster, overrides=overrides)))
        connections.close_all()

        def strike() -> None:
            if not FULL and sum(counted.values()) == 8:
                proxy.delay = 0.0
                return
            what = chance.choice(list(counted))
            counted[what] += 1
            if what == "delay":
                proxy.delay = chance.uniform(0.02, 0.2)
            elif what == "stall":
                proxy.stall()
                time.sleep(chance.uniform(0.5, 3.0 if FULL else 1.5))
                proxy.flow()
            elif what == "cut":
                proxy.cut()
            else:
                proxy.cut_after(chance.randrange(20_000))

        with meanwhile(strike, lambda: chance.uniform(0.2, 1.5)):
            told = site.client(resume, run).wait(PATIENCE)
        if told != "done":
            tally.notes.append(told)
        proxy.delay = 0.0
        proxy.cut()
        finish(site, run)
        tally.notes.append(f"{counted}, connections {proxy.connections}")
        tally.add(site.slurm, run)
    tally.close(capfd)


# ---- nobody comes back ----


@pytest.mark.parametrize("over_ssh", [False, True] if FULL else [True], ids=lambda far: "from afar" if far else "here")
def test_the_client_gone_for_good(site: Site, tally: Tally, over_ssh: bool, capfd: pytest.CaptureFixture[str]) -> None:
    # Every third fails at first.
    work = f"{SHORT}; [ $NEXA_ATTEMPT = 2 ] || [ $((NEXA_TRIAL % 3)) != 0 ]"
    run = prepared(site, tally, "unattended=true", "retry.times=1", work=work, over_ssh=over_ssh)
    client: Client = site.client(submit, run)
    wait(there(run, "steward/1.answer").exists, 60.0)
    client.kill_all(run)
    tally.killed["after"] += 1
    if over_ssh:
        site.sshd.sshd.send(signal.SIGSTOP)  # nor could anybody come
    try:
        wait(there(run, "steward/over").exists, 180.0)
    finally:
        site.sshd.sshd.send(signal.SIGCONT)
    tally.add(site.slurm, run, results=there(run, "results.csv"))
    tally.notes.append(f"starts {len(starts(tally.words, run))}")
    tally.close(capfd)
