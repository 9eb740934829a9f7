"""One array submitted exactly once: asked, looked up, asked again only where it is safe."""

from __future__ import annotations

import re
import threading
import time
from enum import Enum, auto
from functools import cache
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING

from nexa_infra.errors import HostError, NexaError, RunCancelledError, SubmitError
from nexa_infra.hosts.base import ConnectionLostError
from nexa_infra.hosts.framing import write_file
from nexa_infra.hosts.login import UnreachableError
from nexa_infra.hosts.shell import join
from nexa_infra.runs.directory import RunDirectory
from nexa_infra.runs.record import Run, Submission, read_submissions
from nexa_infra.scheduling.script import environment, log_option
from nexa_infra.scheduling.slurm.client import SlurmClient
from nexa_infra.scheduling.slurm.text import explained, read_job_id, refusal
from nexa_infra.settings import settings

if TYPE_CHECKING:
    import jinja2

    from nexa_infra.hosts.base import Completed

# How long a script waits for another client's sbatch, and for its own, seconds.
_LOCK_SECONDS = 20
_TRIES = 300
# How long a script may be silent, seconds: squeue itself gives up after a minute or so.
_SILENCE = 180.0
_WAITS = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class TakenError(NexaError):
    """Another client has submitted under this number."""


def submit_once(client: SlurmClient, run: Run, intent: Submission) -> str | None:
    """Submit an intent's array unless that was done before, and return its id; None where it will never run.

    Every question is safe to ask again: a lost answer is looked for in the run directory, in squeue and in
    the claims, twice and a grace period apart, before the token is claimed by nobody and given up.

    Raises:
        SubmitError: the scheduler refused, in its own words; or patience has ended and nothing is known.
        TakenError: another client has this number.
        RunCancelledError: a person has ended the run.
    """
    limit = time.monotonic() + settings().patience
    left = _left.setdefault(run.id, threading.Event())
    left.clear()
    again: str | None = None
    doubt = void = False
    said = "nothing was heard of it"
    for wait in chain(_WAITS, repeat(_WAITS[-1])):
        text = _script(run, intent, again=again, doubt=doubt, void=void)
        again = None
        try:
            done = client.script(text, timeout=_SILENCE)
        except HostError as error:
            if client.host.remote and not isinstance(error, (ConnectionLostError, UnreachableError)):
                raise
            said = str(error)
        else:
            word, _, rest = done.stdout.partition("\n")[0].partition(" ")
            match word:
                case "owned":
                    return rest if rest.isdigit() else None
                case "queued":
                    return rest
                case "answered" | "recorded":
                    answer = _answer(done, rest)
                    if isinstance(answer, str):
                        return answer
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
                case "missing":
                    said = "it is nowhere to be found"
                    if left.wait(settings().grace_seconds):
                        break
                    void = True
                    continue
                case "taken":
                    raise TakenError(f"run {run.id}: another client has made submission {intent.number}")
                case "cancelled":
                    raise RunCancelledError(f"run {run.id} was cancelled, so nothing more of it is submitted")
                case "gone":
                    words = f": {done.stderr.strip()[-300:]}" if done.stderr.strip() else ""
                    raise SubmitError(f"the run directory {run.directory} is not there, or cannot be written{words}")
                case "busy":
                    said = "another client's sbatch is still trying"
                case _:
                    said = done.stderr.strip()[-300:] or "the scheduler does not say whether it took it"
        if time.monotonic() > limit or left.wait(wait):
            break
    raise SubmitError(
        f"whether run {run.id} was submitted is not known: {said}. It is left as it is; "
        f"`nexa-infra resume {run.id}` looks again, and submits nothing twice"
    )


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


def _script(run: Run, intent: Submission, *, again: str | None, doubt: bool, void: bool) -> str:
    number = intent.number
    trials = ""
    if intent.listed is not None:
        listed = (run.files.path / intent.listed).read_bytes()
        trials = write_file(intent.listed, listed)
    arguments = [str(intent.chunk), str(intent.chunks), *([intent.listed] if intent.listed else [])]
    log = log_option(RunDirectory(Path(run.directory)).log)
    argv = ["sbatch", "--parsable", f"--job-name={intent.token}", f"--array={intent.array}",
            f"--output={log}", f"--error={log}", "--open-mode=append", "job.sbatch", *arguments]  # fmt: skip
    record = intent.model_dump_json(indent=2).encode() + b"\n"
    created = re.search(rb'"created_at": "[^"]*"', record)
    return _template().render(
        run_dir=run.directory,
        token=intent.token,
        number=number,
        lock_seconds=_LOCK_SECONDS,
        tries=_TRIES,
        created=created[0].decode() if created else intent.token,
        write_trials=trials,
        write_intent=write_file(f"submissions/{number}.json", record),
        earlier=[each.token for each in read_submissions(run.files) if each.number < number],
        sbatch=join(argv),
        again=again,
        doubt=doubt,
        void=void,
    )


@cache
def _template() -> jinja2.Template:
    return environment().get_template("submit.sh.j2")
