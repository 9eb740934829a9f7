"""A real Slurm of the rig's own: accounting, two nodes, typed GPUs; everything in one folder."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from deployments.environment import SetupError
from deployments.processes import MARK, Process
from tests.rig import slurm_files as files
from tests.rig.accounts import Account
from tests.rig.daemons import command_of, end, environments, listens, put, sweep
from tests.rig.slurm_parts import SlurmParts


class SlurmRig(SlurmParts):
    """Starts, finds and stops a Slurm in a folder, which may have been started by another process."""

    # -- up and down

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Start whatever does not run, and wait until the nodes take jobs.

        Raises:
            SetupError: a part does not start; the message ends with its last words.
        """
        self.write()
        self.munged.start()
        if self.accounting:
            self._start_database()
        self.munged.await_ready((self.folder / "munge" / "socket").exists)
        if self.accounting:
            self.start_dbd()
            self._add_accounts()
        for name in files.NODES:
            self.node(name).start()
        self.start_controller()
        for name in files.NODES:
            self.node_up(name)

    def _start_database(self) -> None:
        place = self.folder / "mariadb"
        if not (place / "data").exists():
            password = self.password.read_text()
            user = f"CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY '{password}';\n"
            put(place / "init.sql", f"{user}GRANT ALL ON slurm_rig.* TO 'slurm'@'127.0.0.1';\n", mode=0o600)
            shutil.rmtree(place / "draft", ignore_errors=True)
            self._must(
                ["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={place / 'draft'}",
                 "--auth-root-authentication-method=socket", "--skip-test-db", "--innodb-log-file-size=16M",
                 f"--tmpdir={place}"]  # of two at once, one would take the other's tables away
            )  # fmt: skip
            (place / "draft").rename(place / "data")
        self.database.start()
        self.database.await_ready(lambda: listens(self.ports.database))

    def _add_accounts(self) -> None:
        done = self.folder / "accounts.done"
        if not done.exists():
            for words in files.ACCOUNTING:
                self._must(self.accounts.enter(["sacctmgr", "-i", *words.split()]))
            done.touch()

    def _takes_jobs(self, node: str) -> bool:
        state = self.run(["sinfo", "-h", "-n", node, "-p", "cpu", "-o", "%T"]).stdout.strip()
        return state in {"idle", "mixed", "allocated", "completing"}

    def stop(self) -> None:
        """End the jobs, the daemons and whatever they left; the folder stays, without its device files."""
        if self.controller.process:
            self.controller.send(signal.SIGCONT)
            self._cancel_all()
        for daemon in (*map(self.node, files.NODES), self.controller, self.dbd, self.database, self.munged):
            daemon.stop()
        marks = str(self.folder / "daemons") + "/"
        sweep(lambda environment: environment.get(MARK, "").startswith(marks) or self._is_of_a_job(environment))
        shutil.rmtree(self.folder / "dev", ignore_errors=True)
        if self.memory_limits and self.memory_group.exists():
            for group, _, _ in os.walk(self.memory_group, topdown=False):
                with suppress(OSError):  # its last process has not quite gone; an empty group costs nothing
                    Path(group).rmdir()

    def _cancel_all(self) -> None:
        """Let Slurm end the jobs itself, for which it has a few seconds."""
        try:
            self.run(["scancel", "--quiet", "--state=PENDING"], timeout=5)
            self.run(["scancel", "--quiet", "--full", "--signal=KILL", "--state=RUNNING"], timeout=5)
            ask = ["squeue", "--noheader", "--states=RUNNING,COMPLETING"]
            self.wait_until(lambda: not self.run(ask, timeout=5).stdout.strip(), 5.0, "jobs are left")
        except (SetupError, subprocess.TimeoutExpired):
            return  # what is left ends with its environment

    def _is_of_a_job(self, environment: Mapping[str, str], node: str | None = None) -> bool:
        return (
            environment.get("SLURM_CONF") == str(self.conf)
            and "SLURM_JOB_ID" in environment
            and node in {None, environment.get("SLURMD_NODENAME")}
        )

    # -- bad days

    def start_controller(self) -> None:
        """Start slurmctld, and wait until it answers."""
        self.controller.start()
        self.controller.await_ready(lambda: "UP" in self.run(["scontrol", "ping"]).stdout)

    def stop_controller(self) -> None:
        """End slurmctld in order: it saves its state."""
        self.controller.stop()

    def kill_controller(self) -> None:
        """End slurmctld by SIGKILL, and with it what it had not saved."""
        self.controller.kill()
        sweep(lambda environment: environment.get(MARK) == self.controller.mark)

    def start_dbd(self) -> None:
        """Start slurmdbd, and wait until sacctmgr gets an answer."""
        self.dbd.start()
        self.dbd.await_ready(lambda: listens(self.ports.dbd))

    def stop_dbd(self) -> None:
        """End slurmdbd: sacct fails, and slurmctld keeps what it has to tell."""
        self.dbd.stop()

    def node_down(self, name: str) -> None:
        """Crash a node: its slurmd and its jobs' processes end by SIGKILL, and Slurm is told."""
        daemon = self.node(name)
        daemon.kill()
        end(self._stepds(name))
        sweep(lambda environment: environment.get(MARK) == daemon.mark or self._is_of_a_job(environment, name))
        self._must(["scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=rig"])

    def _stepds(self, node: str) -> list[Process]:
        """Return those who would tell slurmctld that a node's jobs were killed; they hide their environment."""
        of_jobs = [process for process, environment in environments() if self._is_of_a_job(environment, node)]
        parents = {process.parent: Process.of(process.parent) for process in of_jobs}.values()
        return [parent for parent in parents if parent and command_of(parent) == "slurmstepd"]

    def node_up(self, name: str) -> None:
        """Start a node again, unless it runs, and wait until it takes jobs."""
        daemon = self.node(name)
        daemon.start()
        daemon.await_ready(lambda: listens(self.ports.of(name)))
        if not self._takes_jobs(name):
            self.run(["scontrol", "update", f"NodeName={name}", "State=RESUME"])  # refused to a node that is coming up
            self.wait_until(lambda: self._takes_jobs(name), 30.0, f"{name} does not come up")

    def reset(self) -> None:
        """Cancel every job and start what a test has stopped."""
        self.controller.send(signal.SIGCONT)
        self.dbd.send(signal.SIGCONT)
        self.start()
        self._cancel_all()

    # -- use

    def run(
        self, argv: Sequence[str], *, user: Account | None = None, cwd: Path | None = None,
        script: str | None = None, timeout: float = 60.0,
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """Run a command with `script` on its standard input, as root or as one of the rig's users.

        Raises:
            subprocess.TimeoutExpired: it took longer than `timeout` seconds.
        """
        environment = self.environment()
        if user:
            argv = self.accounts.enter(
                ["setpriv", f"--reuid={user.uid}", f"--regid={user.uid}", "--init-groups", *argv]
            )
            environment |= {"HOME": str(self.accounts.home(user)), "USER": user.name, "LOGNAME": user.name}
        where = cwd or self.accounts.home(user) if user else cwd or self.folder / "home"
        return subprocess.run(
            list(argv), cwd=where, env=environment, input=script or "",
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip

    @property
    def version(self) -> str:
        """Which Slurm this is, such as `22.05.8`."""
        return self._must(["sbatch", "--version"]).split()[-1]

    def submit(self, *options: str, script: str = "true", user: Account | None = None) -> str:
        """Submit a bash script, and return the job's id.

        Raises:
            SetupError: sbatch refuses; the message holds its words.
        """
        argv = ["sbatch", "--parsable", "--output=/dev/null", *options]
        return self._must(argv, script=f"#!/bin/bash\n{script}\n", user=user).strip().partition(";")[0]

    def states(self, job: str) -> list[str]:
        """Return what squeue says of a job's tasks, in order: `RUNNING`, `PENDING`, … Purged ones are left out."""
        return self.run(["squeue", "-h", "-r", "-t", "all", "-o", "%T", "-j", job]).stdout.split()

    def wait_until(self, true: Callable[[], bool], within: float, otherwise: str) -> None:
        """Ask until it is true.

        Raises:
            SetupError: `within` seconds went by; the message is `otherwise`.
        """
        deadline = time.monotonic() + within
        while not true():
            if time.monotonic() > deadline:
                raise SetupError(f"{otherwise}, after {within:g} s; see {self.folder / 'log'}")
            time.sleep(0.1)

    def _must(self, argv: Sequence[str], *, script: str | None = None, user: Account | None = None) -> str:
        done = self.run(argv, script=script, user=user)
        if done.returncode:
            raise SetupError(f"{' '.join(argv)} failed (exit code {done.returncode}):\n{done.stdout}{done.stderr}")
        return done.stdout
