"""`python -m tests.rig up|down`: the rig, for a person to try."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import time
from pathlib import Path

from deployments.environment import SetupError
from tests.rig import accounts
from tests.rig.fixtures import why_not
from tests.rig.slurm import SlurmRig
from tests.rig.ssh import SshRig

FOLDER = Path(__file__).resolve().parents[2] / ".nexa" / "rig"


def rigs() -> tuple[SlurmRig, SshRig]:
    """Return the rig of this checkout, running or not."""
    slurm = SlurmRig(FOLDER / "slurm")
    return slurm, SshRig(FOLDER / "sshd", environment={"SLURM_CONF": str(slurm.conf)}, accounts=slurm.accounts)


def up() -> None:
    """Start what does not run, and say how to use it.

    Raises:
        SetupError: there can be no rig here, or a part of it does not start.
    """
    if reason := why_not():
        raise SetupError(f"no rig: {reason}")
    begun = time.monotonic()
    slurm, sshd = rigs()
    slurm.start()
    sshd.start()
    shown = ["sinfo -o %12P%12l%N", "sinfo -N -p cpu -o %12N%12c%12m%G"]
    partitions = "\n".join(slurm.run(words.split()).stdout for words in shown)
    people = ", ".join(account.name for account in accounts.ACCOUNTS)
    print(
        f"Slurm and sshd are up ({time.monotonic() - begun:.1f} s), in {FOLDER}\n\n{partitions}\n"
        f"Slurm's commands, in this shell:\n    export SLURM_CONF={shlex.quote(str(slurm.conf))}\n\n"
        f"Over SSH (users: {people}):\n    {shlex.join(sshd.command())}\n\n"
        f"    host 127.0.0.1, port {sshd.port}, key {sshd.key}, known hosts {sshd.known_hosts}\n\n"
        "make rig-down stops them and forgets their jobs."
    )


def down() -> None:
    """Stop both, and remove their folder."""
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
    parser.add_argument("verb", choices=["up", "down"])
    try:
        (up if parser.parse_args().verb == "up" else down)()
    except SetupError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
