"""One array submitted exactly once: asked, looked up, asked again only where it is safe."""

from __future__ import annotations

import pkgutil
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING

from nexa_infra.errors import HostError, NexaError, QueueFullError, RunCancelledError, SubmitError
from nexa_infra.hosts.base import ConnectionLostError, UnreachableError
from nexa_infra.hosts.framing import write_file
from nexa_infra.hosts.shell import join, quote
from nexa_infra.runs.directory import RunDirectory
from nexa_infra.runs.submissions import Submission, read_submissions, to_json
from nexa_infra.scheduling.arguments import log_option, script_arguments
from nexa_infra.scheduling.slurm.client import SlurmClient
from nexa_infra.scheduling.slurm.text import explained, queue_full, read_job_id, refusal

if TYPE_CHECKING:
    from nexa_infra.hosts.base import Completed
    from nexa_infra.runs.record import Run

# How long a script waits for another client's sbatch, and for its own, seconds.
_LOCK_SECONDS = 20
_SBATCH_SECONDS = 40
# How long a script may be silent, seconds: squeue itself gives up after a minute or so.
_SILENCE = 180.0
_WAITS = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class TakenError(NexaError):
    """Another client has submitted under this number."""


def submit_once(
    client: SlurmClient, run: Run, intent: Submission, order: Order, *, patience: float, grace: float
) -> str | None:
    """Submit an intent's array unless that was done before, and return its id; None where it will never run.

    Every question is safe to ask again: a lost answer is looked for in the run directory, in squeue and in
    the claims, twice and a grace period apart, before the token is claimed by nobody and given up. `patience` is
    how long a scheduler that does not say is asked again, `grace` the time between the two, both in seconds.

    Raises:
        QueueFullError: nothing was taken, for the queue takes no more of this size now.
        SubmitError: the scheduler refused, in its own words; or patience has ended and nothing is known.
        TakenError: another client has this number.
        RunCancelledError: a person has ended the run.
    """
    limit = time.monotonic() + patience
    left = _left.setdefault(run.id, threading.Event())
    left.clear()
    again: str | None = None
    doubt = void = False
    said = "nothing was heard of it"
    for wait in chain(_WAITS, repeat(_WAITS[-1])):
        text = _script(run, intent, order, again=again, doubt=doubt, void=void)
        again = None
        try:
            done = client.script(text, timeout=_SILENCE)
        except HostError as error:
            if client.host.remote and not isinstance(error, (ConnectionLostError, UnreachableError)):
                raise
            said = str(error)
        else:
            word, _, rest = done.stdout.partition("\n")[0].partition(" ")
            if word == "owned":
                # An array that started trials before its token was claimed for nobody has been taken all the same.
                owner = rest.removeprefix("void-")
                return owner if owner.isdigit() else None
            if word == "queued":
                return rest
            if word in {"answered", "recorded"}:
                answer = _answer(done, rest)
                if isinstance(answer, str):
                    return answer
                if word == "answered" and queue_full(done.stderr, beside=not intent.alone):
                    raise QueueFullError(f"run {run.id}: sbatch has no room: {explained(done.stderr)}")
                if word == "answered" and answer is _Answer.NO:
                    raise SubmitError(
                        f"run {run.id}: sbatch refused the array: {explained(done.stderr)}. "
                        f"`nexa-infra resume {run.id}` submits it once that is mended"
                    )
                said = explained(done.stderr) if done.stderr.strip() else "sbatch gave no id"
                if answer is _Answer.UNKNOWN:
                    doubt = True
                else:
                    again = rest
            elif word == "missing":
                said = "it is nowhere to be found"
                if left.wait(grace):
                    break
                void = True
                continue
            elif word == "taken":
                raise TakenError(f"run {run.id}: another client has made submission {intent.number}")
            elif word == "cancelled":
                raise RunCancelledError(f"run {run.id} was cancelled, so nothing more of it is submitted")
            elif word == "gone":
                words = f": {done.stderr.strip()[-300:]}" if done.stderr.strip() else ""
                raise SubmitError(f"the run directory {run.directory} is not there, or cannot be written{words}")
            elif word == "busy":
                said = "another client's sbatch is still trying"
            else:
                said = done.stderr.strip()[-300:] or "the scheduler does not say whether it took it"
        if time.monotonic() > limit or left.wait(wait):
            break
    raise SubmitError(
        f"whether run {run.id} was submitted is not known: {said}. It is left as it is; "
        f"`nexa-infra resume {run.id}` looks again, and submits nothing twice"
    )


_NEXT = "==nexa next=="


def submit_together(client: SlurmClient, run: Run, intents: Sequence[Submission], orders: Sequence[Order]) -> list[str]:
    """Submit arrays in one script, one after the other, up to the first that is not taken at once; return their ids.

    Whatever the script could not tell, `submit_once` finds out.
    """
    lines = [_CLEAN, "nexa_clean=1"]
    for intent, order in zip(intents, orders):
        lines.append(f"nexa_said=$(\n{_script(run, intent, order, again=None, doubt=False, void=False)})")
        lines.append(f"printf '%s\\n%s\\n' \"$nexa_said\" {quote(_NEXT)}")
        lines.append("case $nexa_said in 'answered 0 '*) ;; *) exit 0 ;; esac")
    try:
        told = client.script("\n".join(lines), timeout=_SILENCE).stdout
    except HostError as error:
        if client.host.remote and not isinstance(error, (ConnectionLostError, UnreachableError)):
            raise
        return []
    ids = []
    for piece in told.split(f"{_NEXT}\n")[:-1]:
        word, _, rest = piece.partition("\n")
        job = read_job_id(rest) if word.startswith("answered 0 ") else None
        if job is None:
            break
        ids.append(job)
    return ids


# Set for a run whose client no longer waits to hear whether it was submitted.
_left: dict[str, threading.Event] = {}


def leave(run: Run) -> None:
    """Stop waiting for a submission's answer, in whatever thread that is: it is looked for another time."""
    _left.setdefault(run.id, threading.Event()).set()


class _Answer(Enum):
    """What sbatch said, where it gave no id."""

    NO = auto()
    NOT_NOW = auto()
    UNKNOWN = auto()  # it may have been taken all the same


def _answer(done: Completed, told: str) -> str | _Answer:
    """Return the id that sbatch gave, or how what it said is to be taken; `told` is its exit code, and when."""
    if told.partition(" ")[0] == "0":
        return read_job_id(done.stdout.partition("\n")[2]) or _Answer.UNKNOWN
    return {"transient": _Answer.NOT_NOW, "ambiguous": _Answer.UNKNOWN, "permanent": _Answer.NO}[refusal(done.stderr)]


# Claims a token for nobody. An array that has it keeps its name in it: its trials have started, and count.
VOID = """void() {
  ln -sT -- void "claims/$1" 2>/dev/null && return
  nexa_owner=$(readlink -- "claims/$1") || return
  case $nexa_owner in void*) return 0 ;; esac
  ln -sfT -- "void-$nexa_owner" "claims/.void-$1" && mv -fT -- "claims/.void-$1" "claims/$1"
}
"""


@dataclass(frozen=True)
class Order:
    """How an array is asked for, besides its intent."""

    sbatch: tuple[str, ...]  # the command
    records: str = "submissions"  # the folder of the intents, in the run directory
    files: str = "true"  # shell that writes what the array reads
    earlier: tuple[str, ...] = ()  # tokens that may start nothing more


def order_of(run: Run, intent: Submission) -> Order:
    """Return how some trials of a run are asked for."""
    files = "true"
    if intent.listed is not None:
        files = write_file(intent.listed, (run.files.path / intent.listed).read_bytes())
    log = log_option(RunDirectory(Path(run.directory)).log)
    argv = ("sbatch", "--parsable", f"--job-name={intent.token}", f"--array={intent.array}",
            f"--output={log}", f"--error={log}", "--open-mode=append",
            *intent.options, "job.sbatch", *script_arguments(intent))  # fmt: skip
    earlier = [each.token for each in read_submissions(run.files) if each.number < intent.number]
    return Order(argv, files=files, earlier=tuple(earlier) if intent.alone else ())


def _script(run: Run, intent: Submission, order: Order, *, again: str | None, doubt: bool, void: bool) -> str:
    record = to_json(intent)
    values = {
        "run_dir": run.directory,
        "records": order.records,
        "token": intent.token,
        "number": str(intent.number),
        "lock_seconds": str(_LOCK_SECONDS),
        "sbatch_seconds": str(_SBATCH_SECONDS),
        # A line that no other intent has.
        "created": next(line.strip() for line in record.splitlines() if "created_at" in line),
        "again": again or "",
        "doubt": "yes" if doubt else "",
        "void": "yes" if void else "",
        "earlier": " ".join(order.earlier),
    }
    lines = [f"{name}={quote(value)}" for name, value in values.items()]
    write_intent = write_file(f"{order.records}/{intent.number}.json", record.encode())
    lines += [f"write_trials() {{\n{order.files}\n}}", f"write_intent() {{\n{write_intent}\n}}"]
    return "\n".join([*lines, VOID, f"set -- {join(order.sbatch)}", _text()])


# A client's own settings, or those of the trial that it runs in, are not for the jobs.
_CLEAN = r"""for nexa_name in $(env | sed -n 's/^\(NEXA_[A-Z_]*\)=.*/\1/p'); do unset "$nexa_name"; done"""


@cache
def _text() -> str:
    found = pkgutil.get_data("nexa_infra.scheduling.slurm", "submit.sh")
    if found is None:
        raise SubmitError("this installation lacks nexa_infra/scheduling/slurm/submit.sh")
    return found.decode()
