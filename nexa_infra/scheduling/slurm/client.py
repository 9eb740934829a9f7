"""Slurm's commands, asked on a cluster's login node: each question one round trip."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from nexa_infra.errors import UnknownStateError
from nexa_infra.hosts.base import Completed, Host, retried
from nexa_infra.hosts.shell import join, quote
from nexa_infra.scheduling.slurm.text import (
    ACCOUNTING_FIELDS,
    QUEUE_FORMAT,
    QueueRow,
    read_queue,
)

# How long one question may take, seconds: squeue itself gives up after a minute or so.
ASK_SECONDS = 180.0

# A shell that nobody logs in to may lack the site's own paths; a job's variables must not reach another job.
PRELUDE = r"""
umask 077
command -v squeue >/dev/null 2>&1 || { [ -r /etc/profile ] && . /etc/profile >/dev/null 2>&1; }
command -v squeue >/dev/null 2>&1 || PATH=$PATH:/opt/slurm/bin:/usr/local/slurm/bin:/opt/slurm/current/bin
for nexa_name in $(env | sed -n 's/^\(S[LB][A-Z]*_[A-Z0-9_]*\)=.*/\1/p'); do
  case $nexa_name in SLURM_CONF) ;; SLURM_*|SBATCH_*) unset "$nexa_name" ;; esac
done
"""

_SECTION = re.compile(r"^==nexa (\w+) (\d+)==$", re.MULTILINE)


def section(name: str, command: str) -> str:
    """Return shell that runs a command and closes its output with a line of its name and exit code."""
    return f"{{ {command}\n}} 2>&1; printf '\\n==nexa %s %d==\\n' {name} $?\n"


def sections(text: str) -> dict[str, tuple[str, int]]:
    """Read what `section` has printed: name -> output, exit code."""
    found, start = {}, 0
    for mark in _SECTION.finditer(text):
        found[mark[1]] = (text[start : mark.start()].strip("\n"), int(mark[2]))
        start = mark.end()
    return found


@dataclass(frozen=True)
class SlurmClient:
    """Slurm, as its commands on one host tell it."""

    host: Host

    def script(self, text: str, *, timeout: float = ASK_SECONDS) -> Completed:
        """Run a script in which Slurm's commands are found."""
        return self.host.script(PRELUDE + text, timeout=timeout)

    def ask(self, text: str, *, timeout: float = ASK_SECONDS) -> Completed:
        """Run a script that is safe to run again; where its answer is lost, it is."""
        return retried(lambda: self.script(text, timeout=timeout))

    def accounting(self, ids: Sequence[str]) -> str | None:
        """Return sacct's lines on some arrays, every attempt; None where there is no accounting, or it refuses.

        Times are seconds since the epoch.
        """
        command = f"sacct -nP -X -D -j {quote(','.join(ids))} -o {ACCOUNTING_FIELDS}"
        done = self.ask(f"SLURM_BITSTR_LEN=0 SLURM_TIME_FORMAT=%s {command}")
        return done.stdout if done.returncode == 0 else None

    def cancel(self, ids: Sequence[str]) -> None:
        """End some jobs; those that have ended already are no error."""
        self.ask(f"scancel -- {join(ids)}" if ids else "true")


def queue_command(prefix: str) -> str:
    """Return shell that prints this user's jobs whose names begin with a prefix, ended ones that are known included."""
    # One call for the whole run; SLURM_BITSTR_LEN=0 keeps long lists of array tasks whole.
    return (
        f'nexa_queue=$(SLURM_BITSTR_LEN=0 squeue -h -u "$(id -un)" -t all -o {quote(QUEUE_FORMAT)} 2>&1)\n'
        "nexa_code=$?\n"
        "if [ $nexa_code -ne 0 ]; then printf '%s\\n' \"$nexa_queue\"; else\n"
        f"printf '%s\\n' \"$nexa_queue\" | grep -F -- {quote('|' + prefix)}; true; fi\n"
        "(exit $nexa_code)"
    )


def read_answer(found: tuple[str, int], prefix: str) -> list[QueueRow]:
    """Read what `queue_command` has printed.

    Raises:
        UnknownStateError: squeue could not say.
    """
    text, code = found
    if code:
        words = " ".join(text.split())[-300:] or f"it ended with {code}"
        raise UnknownStateError(f"squeue cannot say how the jobs stand: {words}")
    return [row for row in read_queue(text) if row.name.startswith(prefix)]
