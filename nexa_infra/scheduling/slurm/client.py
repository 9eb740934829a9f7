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
set -f
for nexa_name in $(export -p); do
  case ${nexa_name%%=*} in *[!A-Z0-9_]*|SLURM_CONF) ;; SLURM_*|SBATCH_*) unset "${nexa_name%%=*}" ;; esac
done
set +f
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


def queue_command(prefix: str, *, cache: str | None = None, age: float = 0.0) -> str:
    """Return shell that prints this user's jobs whose names begin with a prefix, ended ones that are known included.

    Before them come two lines: whether squeue was asked, or what it told another run is shared, and how many
    array tasks of this user wait or run in all. `cache` is a file in the run's workdir, there, for all runs to
    share; what is older than `age` seconds, or than the run's last submission, is asked again.
    """
    # One call for the whole run; SLURM_BITSTR_LEN=0 keeps long lists of array tasks whole.
    squeue = f'SLURM_BITSTR_LEN=0 squeue -h -u "$(id -un)" -t all -o {quote(QUEUE_FORMAT)}'
    return f"""nexa_ask() {{
  nexa_queue=$({squeue} 2>&1)
  nexa_code=$?
}}
nexa_said=asked
{_shared(cache, age) if cache else "nexa_ask"}
if [ $nexa_code -ne 0 ]; then printf '%s\n' "$nexa_queue"; else
printf '%s\n' "$nexa_said"
printf '%s\n' "$nexa_queue" | awk -F'|' '{_COUNT}'
printf '%s\n' "$nexa_queue" | grep -F -e {quote("|" + prefix)} -e {quote("|" + _lives(prefix))}; true; fi
(exit $nexa_code)"""


# Counts array tasks: `1-41:2%1,50` are 22.
_COUNT = r"""
$4 == "PENDING" || $4 == "RUNNING" || $4 == "CONFIGURING" || $4 == "COMPLETING" || $4 == "SUSPENDED" {
  text = $3; sub(/%.*/, "", text); gsub(/[][]/, "", text); pieces = split(text, piece, ",")
  for (i = 1; i <= pieces; i++) {
    step = 1; if (split(piece[i], part, ":") > 1) step = part[2]
    if (split(part[1], ends, "-") > 1) total += int((ends[2] - ends[1]) / step) + 1; else total++
  }
}
END { print total + 0 }"""


def _shared(cache: str, age: float) -> str:
    """Return shell that takes squeue's answer from another run's poll, or asks and leaves it for others."""
    return f"""nexa_cache={quote(cache)}-$(printf '%s' "${{SLURM_CONF-}}" | cksum | tr ' ' -)
nexa_young() {{
  [ -O "$nexa_cache" ] && [ {age:.3f} != 0.000 ] || return 1
  nexa_age=$(($(date +%s%N) / 1000000 - $(date -r "$nexa_cache" +%s%N) / 1000000))
  [ "$nexa_age" -ge 0 ] && [ "$nexa_age" -lt {1000 * age:.0f} ] || return 1
  [ -z "$(find submissions cancelled -newer "$nexa_cache" 2>/dev/null | head -n 1)" ]
}}
# While one asks, others wait for its answer.
command exec 8>>"$nexa_cache.lock" 2>/dev/null && flock -w 20 8
if nexa_young && nexa_queue=$(cat -- "$nexa_cache" 2>/dev/null); then nexa_said=shared nexa_code=0; else
  # It is as old as the question.
  true >"$nexa_cache.begun"
  nexa_ask
  if [ $nexa_code -eq 0 ]; then
    printf '%s\n' "$nexa_queue" >"$nexa_cache.new" && touch -r "$nexa_cache.begun" "$nexa_cache.new" &&
      mv -f -- "$nexa_cache.new" "$nexa_cache"
  fi 2>/dev/null
fi
exec 8>&-"""


@dataclass(frozen=True)
class QueueAnswer:
    """What `queue_command` has printed."""

    rows: tuple[QueueRow, ...]  # of the run
    queued: int  # array tasks of this user that wait or run
    shared: bool  # whether squeue was asked by another run
    steward: bool  # whether a steward of the run waits or runs


def read_answer(found: tuple[str, int], prefix: str) -> QueueAnswer:
    """Read what `queue_command` has printed.

    Raises:
        UnknownStateError: squeue could not say.
    """
    text, code = found
    if code:
        words = " ".join(text.split())[-300:] or f"it ended with {code}"
        raise UnknownStateError(f"squeue cannot say how the jobs stand: {words}")
    said, _, rest = text.partition("\n")
    total, _, lines = rest.partition("\n")
    every = read_queue(lines)
    rows = tuple(row for row in every if row.name.startswith(prefix))
    steward = any(row.name.startswith(_lives(prefix)) and row.state in {"PENDING", "RUNNING"} for row in every)
    return QueueAnswer(rows, int(total) if total.isdigit() else 0, said == "shared", steward)


def _lives(prefix: str) -> str:
    """Return how the names of a steward's arrays begin, for a run whose own begin with a prefix."""
    return f"steward-{prefix[len('nexa-') :]}"
