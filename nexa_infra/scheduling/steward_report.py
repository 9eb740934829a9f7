"""The report of a run that its steward has followed to its end: the standard library alone."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, cast

from nexa_infra.monitoring.estimates import estimate_run
from nexa_infra.monitoring.report import build_report, to_json, to_markdown
from nexa_infra.monitoring.report_model import Polling, StewardCost
from nexa_infra.monitoring.spending import price_trials
from nexa_infra.runs.directory import write_atomically
from nexa_infra.runs.endings import ending, explained, failed, last_words
from nexa_infra.runs.plain import PlainRun
from nexa_infra.runs.prices import Price
from nexa_infra.runs.results import read_trials, write_results
from nexa_infra.runs.submissions import read_submissions
from nexa_infra.scheduling.budget import stewarded
from nexa_infra.scheduling.counts import polls_of
from nexa_infra.scheduling.history import ends_of
from nexa_infra.scheduling.slurm.scheduler import SlurmScheduler, charges_of
from nexa_infra.spec.points import Points

if TYPE_CHECKING:
    from nexa_infra.runs.record import Run

# Failed trials whose last words are shown, as a client shows them.
MOST_TAILS = 20


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
    end, reason = ending(run, trials)
    tails = {each.index: last_words(run, each.index, each.attempt) for each in failed(trials)[:MOST_TAILS]}
    counts: Counter[str] = Counter()
    attempts = {each.index: each.attempts for each in trials}
    for kinds in ends_of([each.state for each in trials], attempts, scheduler.ends(run)).values():
        counts.update(kinds)
    spent, polls = stewarded(run), polls_of(run)
    report = build_report(
        run,
        trials,
        estimate_run(run),
        end=end,
        reason=reason,
        stderr_tails=tails,
        job_ids=[each.job_id for each in read_submissions(run.files) if each.job_id],
        accounted=bool(charges_of(run)),
        ends=counts,
        steward=StewardCost(spent.lives, spent.usd) if spent is not None else None,
        polls=Polling(polls.period, polls.calls) if polls is not None else None,
    )
    write_atomically(run.files.report_markdown, to_markdown(report))
    write_atomically(run.files.report_json, to_json(report))
