"""A run's report, built from what is recorded of it: by clients and stewards alike. The standard library alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from nexa_infra.monitoring.estimates import estimate_run
from nexa_infra.monitoring.report import CostReport, build_report, to_json, to_markdown
from nexa_infra.monitoring.report_model import Measured, Polling, StewardCost
from nexa_infra.monitoring.spending import price_trials
from nexa_infra.runs.directory import write_atomically
from nexa_infra.runs.endings import ending, explained, failed, last_words
from nexa_infra.runs.plain import PlainRun
from nexa_infra.runs.prices import Price
from nexa_infra.runs.results import Trial, read_trials, write_results
from nexa_infra.runs.submissions import read_submissions
from nexa_infra.scheduling.base import Scheduler
from nexa_infra.scheduling.budget import stewarded
from nexa_infra.scheduling.counts import polls_of
from nexa_infra.scheduling.history import ends_of
from nexa_infra.scheduling.slurm.scheduler import SlurmScheduler
from nexa_infra.scheduling.slurm.seen import charges_of
from nexa_infra.spec.points import Points

if TYPE_CHECKING:
    from nexa_infra.runs.record import Run

# Failed trials whose last words are shown.
MOST_TAILS = 20


def built(run: Run, trials: Sequence[Trial], scheduler: Scheduler, *, measured: Measured | None = None) -> CostReport:
    """Build a run's cost report from its trials, priced; nothing is written, but last words are brought."""
    end, reason = ending(run, trials)
    bad = failed(trials)[:MOST_TAILS]
    if bad:
        scheduler.bring_words(run, [(trial.index, trial.attempt) for trial in bad])
    spent, polls = stewarded(run), polls_of(run)
    return build_report(
        run,
        trials,
        estimate_run(run),
        end=end,
        reason=reason,
        stderr_tails={trial.index: last_words(run, trial.index, trial.attempt) for trial in bad},
        job_ids=[each.job_id for each in read_submissions(run.files) if each.job_id],
        accounted=bool(charges_of(run)),
        measured=measured,
        ends=_bad_ends(run, trials, scheduler),
        steward=StewardCost(spent.lives, spent.usd) if spent is not None else None,
        polls=Polling(polls.period, polls.calls) if polls is not None else None,
    )


def finish(plain: PlainRun, brief: dict[str, Any], scheduler: SlurmScheduler) -> None:
    """Write results.csv and the cost report, as a client does; a training's curves are left to the next client."""
    data: Any = plain
    data.price = Price(**vars(data.price))
    data.config.checkpoint.most_requeues = brief["most_requeues"]
    run = cast("Run", plain)
    scheduler.bring(run)
    trials = tuple(read_trials(run.files, Points.from_json(brief["points"]), scheduler.tasks(run)))
    trials = price_trials(run, trials, charges_of(run))
    if run.config.launcher.type == "torchrun" and failed(trials):
        trials = explained(run, trials)
    write_results(run.files.results, trials)
    report = built(run, trials, scheduler)
    write_atomically(run.files.report_markdown, to_markdown(report))
    write_atomically(run.files.report_json, to_json(report))


def _bad_ends(run: Run, trials: Sequence[Trial], scheduler: Scheduler) -> Mapping[str, int]:
    """Count the attempts that ended badly, by how."""
    attempts = {trial.index: trial.attempts for trial in trials}
    found: Counter[str] = Counter()
    for each in ends_of([trial.state for trial in trials], attempts, scheduler.ends(run)).values():
        found.update(each)
    if run.cluster is None:
        # Here nothing gives way to others, and no node goes: an end like that is the client's own.
        for kind in ("node_fail", "preempted"):
            found["interrupted"] += found.pop(kind, 0)
    return +found
