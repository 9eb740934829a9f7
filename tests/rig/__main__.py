"""`python -m tests.rig up|down|save`: the rig, for a person to try."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

from deployments.environment import SetupError
from deployments.services import Services
from tests.rig import accounts
from tests.rig.daemons import put
from tests.rig.fixtures import why_not
from tests.rig.slurm import SlurmRig
from tests.rig.ssh import SshRig

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".nexa" / "rig"
CLUSTER = FOLDER / "cluster.yaml"
BLOCK = "rig"


def rigs() -> tuple[SlurmRig, SshRig]:
    """Return the rig of this checkout, running or not."""
    slurm = SlurmRig(FOLDER / "slurm")
    return slurm, SshRig(FOLDER / "sshd", environment={"SLURM_CONF": str(slurm.conf)}, accounts=slurm.accounts)


def cluster(sshd: SshRig) -> dict[str, str | int]:
    """Return the rig as the fields of a cluster, whose polls are quick."""
    return {
        "workdir": str(FOLDER / "work"),
        "host": sshd.host,
        "port": sshd.port,
        "user": accounts.ROOT.name,
        "key_file": str(sshd.key),
        "known_hosts": str(sshd.known_hosts),
        "poll_floor": 1,
        "poll_ceiling": 10,
    }


def up() -> None:
    """Start what does not run, describe it to Nexa Infra and to the project's Prefect, and say how to use it.

    Raises:
        SetupError: there can be no rig here, or a part of it does not start.
    """
    if reason := why_not():
        raise SetupError(f"no rig: {reason}")
    begun = time.monotonic()
    slurm, sshd = rigs()
    slurm.start()
    sshd.start()
    keys = {"name": BLOCK, **cluster(sshd)}
    lines = [f"{key}: {json.dumps(value)}" for key, value in keys.items()]  # JSON is YAML, whatever the path
    put(CLUSTER, "\n".join(["# Written by `make rig`, removed by `make rig-down`.", *lines, ""]))
    saved = _services().run_python("-m", "tests.rig", "save")
    shown = ["sinfo -o %12P%12l%N", "sinfo -N -p cpu -o %12N%12c%12m%G"]
    partitions = "\n".join(slurm.run(words.split()).stdout for words in shown)
    people = ", ".join(account.name for account in accounts.ACCOUNTS)
    trials = [f"job.setup.venv={sys.prefix}", "job.memory=500M"]  # its nodes are this machine, and so is their Python
    print(
        f"Slurm and sshd are up ({time.monotonic() - begun:.1f} s), in {FOLDER}\n\n{partitions}\n"
        f"The example sweep on it:\n    {_verb(trials)}\n\n{_deployment(saved, trials)}\n\n"
        f"Slurm's commands, in this shell:\n    export SLURM_CONF={shlex.quote(str(slurm.conf))}\n\n"
        f"Over SSH (users: {people}):\n    {shlex.join(sshd.command())}\n\n"
        "make rig-down stops them and forgets their jobs."
    )


def _verb(trials: list[str]) -> str:
    sets = [word for each in trials for word in ("--set", each)]
    config = "deployments/configs/digits.yaml"
    return shlex.join([".venv/bin/nexa-infra", "sweep", config, "--cluster", str(CLUSTER.relative_to(ROOT)), *sets])


def _deployment(saved: bool, trials: list[str]) -> str:
    if not saved:
        return f"From Prefect: `make up`, then `make rig` again, which saves the rig as the block {BLOCK}."
    words = ["sweep/slurm", "-p", f"cluster={BLOCK}", "-p", f"overrides={json.dumps(trials)}", "--watch"]
    command = shlex.join([".venv/bin/prefect", "deployment", "run", *words])
    return f"From Prefect, where it is saved as the block {BLOCK}:\n    {command}"


def save() -> None:
    """Save the rig as a block on the Prefect server that PREFECT_API_URL names."""
    from nexa_infra.blocks import SlurmCluster

    SlurmCluster(**cluster(rigs()[1])).save(BLOCK, overwrite=True)


def _services() -> Services:
    return Services(ROOT, Path(sys.executable))


def down() -> None:
    """Stop both, and remove their folder and their block."""
    with suppress(SetupError):  # it was never saved
        _services().run_python("-m", "prefect", "--no-prompt", "block", "delete", f"slurm-cluster/{BLOCK}")
    if not FOLDER.exists():
        print("no rig is up")
        return
    slurm, sshd = rigs()
    sshd.stop()
    slurm.stop()
    shutil.rmtree(FOLDER)
    print("Slurm and sshd are down")


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(prog="python -m tests.rig", description=__doc__)
    parser.add_argument("verb", choices=["up", "down", "save"])
    try:
        {"up": up, "down": down, "save": save}[parser.parse_args().verb]()
    except SetupError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
