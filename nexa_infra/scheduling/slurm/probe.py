"""Whether a steward can live on a cluster's compute nodes: asked from inside a test job of a second."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from nexa_infra.errors import HostError
from nexa_infra.hosts.shell import join
from nexa_infra.runs.directory import write_atomically
from nexa_infra.scheduling.script import environment
from nexa_infra.scheduling.slurm.client import PRELUDE, SlurmClient, sections
from nexa_infra.scheduling.slurm.text import explained, read_records, refusal
from nexa_infra.scheduling.slurm.words import over_limit
from nexa_infra.spec.cluster import Cluster
from nexa_infra.spec.job import SlurmJob

if TYPE_CHECKING:
    import jinja2

# How long the test job may wait for its start, and how long a good answer is believed, seconds.
START_SECONDS = 60
REMEMBER_SECONDS = 86400.0
# How long the script may be silent beyond the job's wait, seconds: sbatch's own time, the job's minute, scancel's.
_SILENCE = 150.0
# Slurm ends a test job that nobody waits for any more, should it not have started till then.
_DEADLINE = "now+5minutes"

OLDEST_PYTHON = (3, 9)
# RHEL 8 and 9 have one for their own tools which need not be in PATH.
_PYTHONS = ("python3.13", "python3.12", "python3.11", "python3.10", "python3.9", "python3",
            "/usr/libexec/platform-python")  # fmt: skip
# Any Python reads this; one that lacks a part of its standard library fails. Its isolated mode (-I) is the steward's.
_PROGRAM = (
    f"import sys; sys.version_info >= {OLDEST_PYTHON} or sys.exit(1); "
    "import argparse, dataclasses, datetime, decimal, fcntl, hashlib, json, pathlib, re, subprocess, typing; "
    "print('%d.%d.%d' % sys.version_info[:3], sys.executable)"
)
_TOOLS = ("sbatch", "squeue", "scontrol", "scancel", "flock", "setsid", "readlink", "base64", "awk", "timeout")
# The exit codes by which a job says that its folder is not seen on its node, or cannot be written there.
_UNSEEN, _UNWRITTEN = 61, 62
_CUT = {124, 137}  # timeout's own, and that of a command which it had to kill

_ADMINISTRATORS = "ask its administrators"
_AGAIN = "ask again later (`nexa-infra doctor CLUSTER`), or leave `unattended` out and have a client follow the run"
# What sbatch says on a node -> what to do.
_REMEDIES = {
    "Access/permission denied": f"{_ADMINISTRATORS} to let the partition take jobs from its nodes (AllocNodes)",
    "Invalid user id": "root may not submit there: use an account of your own",
}


@dataclass(frozen=True)
class NodeAbilities:
    """What a job on a compute node may do, and has; None is not known."""

    may_submit: bool | None
    why: str = ""  # where it is not True: what was said
    remedy: str = ""  # and what to do
    node: str = ""  # where it was asked
    partition: str = ""
    python: str | None = None  # the path of one that is new enough; its version is `3.11.2`
    version: str | None = None
    shared: bool | None = None  # whether what a node writes into the workdir is seen on the login node
    lacking: tuple[str, ...] = ()  # what else a steward needs and does not find there, each with what to do
    accounting: bool | None = None  # whether sacct answers there: without, the status files do

    @property
    def able(self) -> bool | None:
        """Whether a steward can live there."""
        return None if self.may_submit is None else not self.problems

    @property
    def problems(self) -> tuple[str, ...]:
        """What keeps a steward from living there, or from being known to, each with what to do."""
        found = [] if self.may_submit else [f"{self.why}: {self.remedy}"]
        if self.may_submit is not None and self.python is None:
            found.append(f"{self.no_python}: {_ADMINISTRATORS} for one")
        return (*found, *self.lacking)

    @property
    def no_python(self) -> str:
        """Say that there is no Python."""
        return f"there is no Python {'.'.join(map(str, OLDEST_PYTHON))} or newer on {self.node}"


def probe_steward(
    client: SlurmClient, cluster: Cluster, job: SlurmJob, *, seconds: int = START_SECONDS
) -> NodeAbilities:
    """Say whether a steward can live where a job runs; a yes is remembered for `REMEMBER_SECONDS`.

    Raises:
        HostError: the cluster cannot be reached, or the answer was lost.
    """
    return _remembered(cluster, job) or probe(client, cluster, job, seconds=seconds)


def probe(client: SlurmClient, cluster: Cluster, job: SlurmJob, *, seconds: int = START_SECONDS) -> NodeAbilities:
    """Ask from inside a test job, which has `seconds` to start; nothing of it is left.

    It takes one round trip, and on an idle cluster two or three seconds.

    Raises:
        HostError: the cluster cannot be reached, or the answer was lost.
    """
    text = probe_script(cluster, job, name=f"nexa-probe-{secrets.token_hex(6)}", seconds=seconds)
    done = client.script(text, timeout=seconds + _SILENCE)
    found = sections(done.stdout)
    if "place" not in found:
        words = done.stderr.strip()[-300:] or done.stdout.strip()[-300:] or "it said nothing"
        raise HostError(f"{client.host.name} did not answer as it should: {words}")
    abilities = read_abilities(found, cluster.workdir, seconds)
    _remember(cluster, job, abilities)
    return abilities


def probe_script(cluster: Cluster, job: SlurmJob, *, name: str, seconds: int) -> str:
    """Return the script that submits a test job under a name, and waits for its answer."""
    asked = {
        "partition": job.partition or cluster.partition,
        "account": job.account or cluster.account,
        "qos": job.qos,
        "time": "1",
        "nodes": "1",
        "ntasks": "1",
        "cpus-per-task": "1",
        "mem": "256M",
    }
    options = [f"--{option}={value}" for option, value in asked.items() if value]
    alone = [f"--job-name={name}", "--output=/dev/null", "--no-requeue", f"--deadline={_DEADLINE}"]
    return _template().render(
        workdir=cluster.workdir,
        name=name,
        seconds=seconds,
        prelude=PRELUDE.strip(),
        options=join(options),
        sbatch=join([*options, *alone]),
        tools=join(_TOOLS),
        pythons=join(_PYTHONS),
        program=_PROGRAM,
        unseen=_UNSEEN,
        unwritten=_UNWRITTEN,
    )


@cache
def _template() -> jinja2.Template:
    return environment().get_template("probe.sh.j2")


def read_abilities(found: Mapping[str, tuple[str, int]], workdir: str, seconds: int) -> NodeAbilities:
    """Read what the script has printed: a section's name -> its output and exit code."""
    if found["place"][1]:
        why = f"no folder can be made in the workdir: {_words(found['place'][0])}"
        return NodeAbilities(None, why, "name another `workdir` in the cluster's block")
    said, code = found.get("submitted", ("", 1))
    if code in _CUT:
        return NodeAbilities(None, "sbatch gave no answer", _AGAIN)
    if code:
        remedy = _AGAIN if _may_change(said) else "a steward would be refused as well: leave `unattended` out till then"
        return NodeAbilities(None, f"sbatch refuses a test job: {explained(said)}", remedy)
    if "python" not in found:  # the last that is asked
        return _unanswered(found.get("job", ("", 0))[0], workdir, seconds)
    node, partition = (found[name][0].strip() for name in ("node", "partition"))
    version, _, python = found["python"][0].strip().partition(" ")
    may_submit, why, remedy = _submits(found, node)
    return NodeAbilities(
        may_submit,
        why,
        remedy,
        node=node,
        partition=partition,
        python=python or None,
        version=version if python else None,
        shared=True,
        lacking=tuple(_lacking(found, node, workdir)),
        accounting=found["sacct"][1] == 0,
    )


def _unanswered(told: str, workdir: str, seconds: int) -> NodeAbilities:
    """Read `scontrol show job -o` of a test job that gave no answer."""
    record = next(iter(read_records(told)), {})
    state, code = record.get("JobState", ""), record.get("ExitCode", "").partition(":")[0]
    node = record.get("BatchHost", "a compute node")
    if code in {str(_UNSEEN), str(_UNWRITTEN)}:
        trouble = "not seen" if code == str(_UNSEEN) else "not to be written"
        why = f"the workdir {workdir} is {trouble} on {node}"
        return NodeAbilities(None, why, "name one that the compute nodes share", node=node, shared=False)
    if state == "PENDING":
        reason = record.get("Reason", "None")
        because = "" if reason == "None" else f" ({reason})"
        return NodeAbilities(None, f"the test job did not start within {seconds} s{because}", _AGAIN)
    if state == "RUNNING":
        return NodeAbilities(None, f"the test job runs on {node} and gives no answer", _AGAIN, node=node)
    if state:
        ended = f"{state}, exit code {code}" if code not in {"", "0"} else state
        return NodeAbilities(None, f"the test job ended on {node} without an answer ({ended})", _AGAIN, node=node)
    return NodeAbilities(None, f"nothing is heard of the test job: {_words(told) or 'scontrol said nothing'}", _AGAIN)


def _submits(found: Mapping[str, tuple[str, int]], node: str) -> tuple[bool | None, str, str]:
    """Say whether jobs may be submitted from a node, why not, and what to do."""
    for command in ("squeue", "scontrol", "sbatch"):
        if found[command][1] in _CUT:
            return None, f"{command} gave no answer on {node}", _AGAIN
    said, code = found["sbatch"]
    words = _words(said)
    if code == 0:
        return True, "", ""
    if code == 127:
        return False, f"sbatch is not installed on {node}", f"{_ADMINISTRATORS} for Slurm's commands on the nodes"
    if _may_change(said):
        return None, f"sbatch on {node} takes no job now: {words}", _AGAIN
    remedy = next((remedy for refused, remedy in _REMEDIES.items() if refused in said), _ADMINISTRATORS)
    return False, f"jobs may not be submitted from {node}: sbatch says {words}", remedy


def _may_change(said: str) -> bool:
    """Say whether sbatch may say otherwise in a while: the controller is away, or one's limits are reached."""
    full = "job submit limit" in said or any(over_limit(_words(line)) for line in said.splitlines())
    return full or refusal(said) != "permanent"


def _lacking(found: Mapping[str, tuple[str, int]], node: str, workdir: str) -> list[str]:
    lacking = []
    tools = found["lacking"][0].split()
    if missing := [tool for tool in tools if tool != "sbatch"]:
        lacking.append(f"not installed on {node}: {', '.join(missing)}: {_ADMINISTRATORS} for them")
    for command in ("squeue", "scontrol"):
        said, code = found[command]
        if code and code not in _CUT and command not in tools:
            lacking.append(f"{command} does not answer on {node}: {_words(said)}: {_ADMINISTRATORS}")
    said, code = found["writes"]
    if code and "flock" not in tools:
        why = _words(said) or "links, or locks, do not work"
        lacking.append(f"the workdir {workdir} does not do on {node}: {why}: name another")
    return lacking


def _words(said: str) -> str:
    """Return a command's last words, without its name."""
    line = next((line.strip() for line in reversed(said.splitlines()) if line.strip()), "")
    line = re.sub(r"^[\w./-]+(?: error)?: (?:error: |fatal: )?", "", line)
    return line.removeprefix("allocation failure: ")[-200:]


# -- what is remembered


def _memory(cluster: Cluster, job: SlurmJob) -> Path:
    """Return the file that holds what is known of the nodes that a job of its user's runs on."""
    who = (cluster.host, cluster.user, cluster.port, cluster.jump_host) if cluster.host else ("here",)
    where = (cluster.workdir, job.partition or cluster.partition, job.account or cluster.account, job.qos)
    key = hashlib.sha256(repr((*who, os.environ.get("SLURM_CONF"), *where)).encode()).hexdigest()[:16]
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(caches).expanduser() / "nexa-infra" / "nodes" / f"{key}.json"


def _remembered(cluster: Cluster, job: SlurmJob) -> NodeAbilities | None:
    path = _memory(cluster, job)
    try:
        if time.time() - path.stat().st_mtime > REMEMBER_SECONDS:
            return None
        known = json.loads(path.read_bytes())
        abilities = NodeAbilities(**{**known, "lacking": tuple(known["lacking"])})
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return abilities if abilities.able else None


def _remember(cluster: Cluster, job: SlurmJob, abilities: NodeAbilities) -> None:
    path = _memory(cluster, job)
    with suppress(OSError):  # a disk that is full forgets
        if abilities.able:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_atomically(path, json.dumps(asdict(abilities)))
        elif abilities.able is False:
            path.unlink(missing_ok=True)
