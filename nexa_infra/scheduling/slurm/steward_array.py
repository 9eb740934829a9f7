"""The array of a steward's lives, submitted exactly once as a run's own are: the standard library alone."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from nexa_infra.errors import HostError, QueueFullError
from nexa_infra.hosts.framing import write_file
from nexa_infra.hosts.shell import quote
from nexa_infra.runs.submissions import Submission, to_json
from nexa_infra.scheduling.slurm.client import section, sections
from nexa_infra.scheduling.slurm.submission import Order, TakenError, submit_once

if TYPE_CHECKING:
    from nexa_infra.runs.record import Run
    from nexa_infra.scheduling.slurm.scheduler import SlurmScheduler

RECORDS = "steward"
# With fewer there is none to take over where one is killed.
LEAST_LIVES = 2


def token_of(run_id: str, number: int) -> str:
    """Return the name of a steward's array; it is none of those that a run's own arrays have."""
    return f"steward-{run_id}-{number}"


def submit_steward(
    scheduler: SlurmScheduler, run: Run, brief: dict[str, Any], *, after: str | None = None
) -> str | None:
    """Submit an array of lives, unless the run has one that waits or runs; return its id.

    `after` is the array of the life that asks: only others count, and it is theirs to take its place.

    Raises:
        SubmitError: it was refused.
    """
    alive, numbers = _known(scheduler, run)
    alive.pop(after or "", None)
    if alive:
        return next(iter(alive))
    # The life that follows a life may have been asked for by one that was killed before it heard the answer.
    number, lives = max(numbers, default=0) + 1, int(brief["lives"])
    for _ in range(8):
        intent = Submission(
            number=number,
            token=token_of(run.id, number),
            trials=lives,
            array=f"0-{lives - 1}%1",
            created_at=datetime.now(timezone.utc),
        )
        argv = ("sbatch", "--parsable", f"--job-name={intent.token}", f"--array={intent.array}", *brief["sbatch"],
                "steward/steward.sbatch")  # fmt: skip
        earlier = tuple(token_of(run.id, each) for each in numbers if after is None)
        order = Order(argv, RECORDS, earlier=earlier)
        try:
            job = submit_once(scheduler.client, run, intent, order, patience=scheduler.patience, grace=scheduler.grace)
        except TakenError:
            alive, _ = _known(scheduler, run)
            alive.pop(after or "", None)
            return next(iter(alive), None)
        except QueueFullError:
            # Lives that wait are jobs that are queued: fewer may fit.
            if lives <= LEAST_LIVES:
                raise
            number, lives = number + 1, max(LEAST_LIVES, lives // 2)
            continue
        if job is not None:
            record = to_json(Submission(**{**vars(intent), "job_id": job})).encode()
            try:
                place = write_file(f"{RECORDS}/{number}.json", record)
                scheduler.client.ask(f"cd -- {quote(run.directory)} && {place}")
            except HostError:
                pass  # it is known by its name
            return job
        number += 1
    return None


def _known(scheduler: SlurmScheduler, run: Run) -> tuple[dict[str, str], list[int]]:
    """Return the steward's arrays that wait or run, id -> name, and the numbers of all that were asked for."""
    prefix = token_of(run.id, 0).rpartition("-")[0]
    text = f"cd -- {quote(run.directory)} || exit 66\n"
    text += section("queue", "squeue -h -u \"$(id -un)\" -o '%F|%j'")
    text += section("records", f"ls {RECORDS}")
    done = scheduler.client.ask(text)
    found = sections(done.stdout)
    if "queue" not in found or found["queue"][1]:
        raise HostError(f"squeue cannot say whether run {run.id} has a steward: {done.stdout[-300:]}")
    rows = (line.partition("|") for line in found["queue"][0].splitlines())
    alive = {array: name for array, _, name in rows if name.startswith(f"{prefix}-")}
    names = (name.removesuffix(".json") for name in found["records"][0].split() if name.endswith(".json"))
    return alive, sorted(int(name) for name in names if name.isdigit())
