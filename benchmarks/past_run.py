"""Makes a large run that has ended, as script and supervisor leave one: python -m benchmarks.past_run FILE.

Really run, 10,000 trials of `true` take minutes on a small machine. The run's directory, script and record are
made by the engine's own steps; only what the trials and the supervisor would append is written here.
"""

from __future__ import annotations

import socket
import sys
from datetime import UTC, datetime

from nexa_infra.operations import steps
from nexa_infra.runs.record import Run
from nexa_infra.runs.submissions import Submission, write_submission
from nexa_infra.scheduling.arguments import array_spec

STARTED = 1_750_000_000.0  # seconds since the epoch
SECONDS = 0.005
ARRAY = 1_750_000_000_000_000


def make(config: str) -> Run:
    """Make a run of a config's trials, each completed at its first attempt."""
    run = steps.render(steps.sync(steps.plan(config)))
    count = run.trials
    (run.files.submissions / "supervisor.lock").touch()
    submission = Submission(
        number=1,
        token=f"nexa-{run.id}-1",
        trials=count,
        array=array_spec(count, run.config.job.array_parallelism),
        created_at=datetime.now(UTC),
        job_id=str(ARRAY),
    )
    write_submission(run.files, submission)
    node = socket.gethostname()
    journal = [f"array\t{ARRAY}\t{count}"]
    for trial in range(count):
        begun = STARTED + trial * SECONDS
        start, end = f"{begun:.6f}", f"{begun + SECONDS:.6f}"
        journal += [f"start\t{trial}\t{start}", f"end\t{trial}\tCOMPLETED\t0\t{end}"]
        lines = f"start\t{trial}\t1\t{start}\t{node}\nend\t{trial}\t1\t{end}\t0\t\n"
        (run.files.status / f"{ARRAY}_{trial}").write_text(lines)
        run.files.trial(trial).mkdir()
    journal.append("over\n")
    (run.files.submissions / "1.journal").write_text("\n".join(journal))
    return run


if __name__ == "__main__":
    make(sys.argv[1])
