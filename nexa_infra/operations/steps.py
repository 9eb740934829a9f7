"""One function a step of the road: called in order by `launch`, wrapped by the Prefect tasks."""

from __future__ import annotations

import asyncio
import os
import platform
import re
import secrets
import threading
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from nexa_infra.containers.catalog import Catalog
from nexa_infra.containers.chosen import container_of
from nexa_infra.errors import (
    BudgetError,
    ConfigError,
    HostError,
    NexaError,
    PriceError,
    Problem,
    RunCancelledError,
    RunFailedError,
)
from nexa_infra.hosts.base import retried
from nexa_infra.hosts.connections import host_of
from nexa_infra.monitoring.estimates import CostEstimate, estimate_run
from nexa_infra.monitoring.prices import PriceBook, price_for
from nexa_infra.monitoring.report import CostReport, to_json, to_markdown
from nexa_infra.monitoring.report_text import money
from nexa_infra.monitoring.spending import price_trials
from nexa_infra.operations.containers import bring_image
from nexa_infra.operations.endings import failure
from nexa_infra.operations.measured import measured_of, write_plots
from nexa_infra.operations.sync import repository_of, sync_repository
from nexa_infra.operations.tracking import Tracked, log_to_mlflow
from nexa_infra.operations.unattended import check_nodes, hold_budget, refuse_here, write_steward
from nexa_infra.runs.artifact import write_artifact
from nexa_infra.runs.directory import RunDirectory, write_atomically
from nexa_infra.runs.endings import ending, explained, failed
from nexa_infra.runs.index import register
from nexa_infra.runs.record import Run, write_run
from nexa_infra.runs.results import Trial, read_trials, write_results
from nexa_infra.runs.submissions import Submission, read_submissions
from nexa_infra.scheduling.act import stop
from nexa_infra.scheduling.base import Admission, Scheduler
from nexa_infra.scheduling.local import LocalScheduler
from nexa_infra.scheduling.policies import write_limits
from nexa_infra.scheduling.reported import MOST_TAILS, built
from nexa_infra.scheduling.script import script_of, write_script
from nexa_infra.scheduling.slurm.scheduler import SlurmScheduler
from nexa_infra.scheduling.slurm.seen import charges_of
from nexa_infra.scheduling.submit import submit_run
from nexa_infra.scheduling.watch import Poll, follow
from nexa_infra.settings import settings
from nexa_infra.spec.cluster import Cluster
from nexa_infra.spec.launcher import Launcher
from nexa_infra.spec.load import code_root, load_cluster, problem_at, read_config
from nexa_infra.spec.policy import Budget
from nexa_infra.spec.run import SweepConfig, TrainingConfig


def plan(
    config: str | Path | SweepConfig | TrainingConfig,
    *,
    cluster: AnyCluster | None = None,
    overrides: Sequence[str] = (),
    budget_usd: float | Decimal | None = None,
    book: PriceBook | None = None,
    labels: Mapping[str, str] | None = None,
    distributed: bool | None = None,
    catalog: Catalog | None = None,
    moment: datetime | None = None,
    token: str | None = None,
    narrowed: Callable[[SweepConfig | TrainingConfig], SweepConfig] | None = None,
) -> Run:
    """Read and check what is asked, price it, and give it an id; nothing is written.

    `cluster` may be a cluster file's path, or a saved block.
    `overrides` are `key.path=value`, as a config file would hold them; `budget_usd` stands over the
    config's own limit. `distributed` starts the script by torchrun, one process a GPU, or plainly;
    unset, as the launcher says. `catalog` stands in for the file that the config's container names.
    `moment` and `token` make the run's id, for a caller that may have to
    plan the same run again; unset, now and four random digits. `narrowed` may make of what was read a
    sweep of fewer trials, before anything is asked about it.

    Raises:
        ConfigError: the config, or its GPU type, is not understood.
        ContainerError: the image cannot be had, or nothing runs it.
    """
    where = as_cluster(cluster)
    if isinstance(config, (str, Path)):
        file: Path | None = Path(config)
        loaded = read_config(config, overrides)
    elif overrides:
        raise ConfigError(Problem("overrides", "work on a config file: change the config object itself"))
    else:
        file, loaded = None, config
    if budget_usd is not None:
        loaded = loaded.model_copy(update={"budget": Budget(limit_usd=_usd("budget_usd", budget_usd))})
    if distributed is not None:
        loaded = _distributed(loaded, distributed, file)
    if narrowed is not None:
        loaded = narrowed(loaded)
    now = moment or datetime.now(UTC)
    try:
        price = price_for(loaded.job, where, book)
    except PriceError as error:
        key = "job.gpu_type" if loaded.job.gpu_type else "job.gres" if loaded.job.gres else "job.gpus_per_node"
        raise ConfigError(problem_at(file, key, str(error), overrides)) from error
    workdir = Path(where.workdir) if where else home()
    folder = _folder(loaded.job.output_dir, workdir, where)
    slug = re.sub(r"[^a-z0-9]+", "-", loaded.job.name.lower()).strip("-")[:32] or "run"
    run_id = f"{now:%Y%m%d-%H%M%S}-{slug}-{token or secrets.token_hex(2)}"
    run = Run(
        id=run_id,
        config=loaded,
        config_file=os.path.abspath(file) if file else None,  # noqa: PTH100 - links stay as they were named
        directory=str(folder / run_id),
        mirror=str(home() / "runs" / run_id) if where and where.host else None,
        workdir=str(workdir),
        cluster=where,
        container=container_of(loaded, file, where, catalog=catalog, overrides=overrides),
        price=price,
        created_at=now,
        versions={"nexa-infra": version("nexa-infra"), "python": platform.python_version()},
        labels=dict(labels or {}),
    )
    refuse_here(run)
    if price.unit == "billing-hour":
        # What is billed is the cluster's to say, and frozen with the price.
        return run.model_copy(update={"price": replace(price, units=check(run).billing)})
    return run


class HasCluster(Protocol):
    """What makes a cluster, as a saved block does."""

    def to_cluster(self) -> Cluster:
        """Return it."""


AnyCluster = Cluster | str | Path | HasCluster


def as_cluster(cluster: AnyCluster | None) -> Cluster | None:
    """Return the cluster that is meant: itself, a cluster file's, or a saved block's."""
    if isinstance(cluster, (str, Path)):
        return load_cluster(cluster)
    return cluster if cluster is None or isinstance(cluster, Cluster) else cluster.to_cluster()


def _folder(output_dir: str | None, workdir: Path, cluster: Cluster | None) -> Path:
    """Return where run directories are made; a path on a cluster is taken as it is, links there are not followed."""
    if output_dir is None:
        return workdir / "runs"
    if cluster is None:
        return Path(output_dir).expanduser().resolve()
    return workdir / output_dir  # an absolute one stands for itself


def home() -> Path:
    """Return where this machine keeps its runs, and its copies of those on clusters."""
    return settings().home.expanduser().resolve()


def estimate_cost(run: Run) -> CostEstimate:
    """Project what the run will cost."""
    return estimate_run(run)


def admit(run: Run, estimate: CostEstimate) -> Admission:
    """Refuse a run whose projected ceiling is over its budget, or that its cluster cannot run.

    One that is over its budget has a directory and a report, here; of one that cannot run, nothing is left.

    Raises:
        BudgetError: it is over its budget.
        SubmitError: the cluster cannot run it.
        HostError: the cluster cannot be reached.
    """
    if run.config.unattended:
        said = check(run)
        hold_budget(run, said)
        check_nodes(run)
        return said
    _hold_budget(run, estimate)
    return check(run)


def check(run: Run) -> Admission:
    """Ask where the run would execute whether it can; once a process, for `render` needs the answer, too."""
    if run.id not in _admissions:
        _admissions[run.id] = scheduler_of(run).check(run)
    return _admissions[run.id]


_admissions: dict[str, Admission] = {}


def _hold_budget(run: Run, estimate: CostEstimate) -> None:
    limit = run.config.budget.limit_usd
    if limit is None:
        return
    if estimate.ceiling_usd is None and run.config.checkpoint.most_requeues is None:
        reason = f"chain_until_done has no end, so no ceiling can be held against the budget of {money(limit)}"
        remedy = "set checkpoint.requeue to the most links of the chain"
    elif estimate.ceiling_usd is None:
        reason = f"job.time is {run.config.job.time}, so no ceiling can be held against the budget of {money(limit)}"
        remedy = "set job.time to a walltime"
    elif estimate.ceiling_usd > limit:
        reason = f"the projected cost is up to {money(estimate.ceiling_usd)}, over the budget of {money(limit)}"
        remedy = "shorten job.time, run fewer trials, or raise budget.limit_usd"
    else:
        return
    _make_directory(run)
    write_atomically(run.files.refused, reason + "\n")
    write_run(run)
    register(home(), run)
    trials = price_trials(run, read_trials(run.files, run.config.trials, {}))
    write(run, trials, build(run, trials))
    message = f"run {run.id} was refused, nothing was started: {reason}; {remedy}"
    raise BudgetError(f"{message}. Report: {run.files.report_markdown}")


def sync(run: Run) -> Run:
    """Bring the code over, and return the run with its snapshot."""
    root = code_root(Path(run.config_file)) if run.config_file else repository_of(Path.cwd())
    host = host_of(run.cluster)
    snapshot = retried(lambda: sync_repository(run.workdir, root=root, rules=run.config.sync, host=host))
    script = run.config.launcher.script
    if script and not Path(script).is_absolute() and host.run(["test", "-f", f"{snapshot.path}/{script}"]).returncode:
        raise ConfigError(
            problem_at(
                Path(run.config_file) if run.config_file else None,
                "launcher.script",
                f"{script} is not among the code that travels from {root}: git ignores it, or sync leaves it "
                "behind; name it in sync.include",
            )
        )
    return run.model_copy(update={"snapshot": snapshot})


def render(run: Run) -> Run:
    """Make the run directory: the array script, what it reads, a link to the code, and run.json last."""
    if run.files.record.exists():
        if not read_submissions(run.files):
            # A client may have been killed before the directory came to its cluster.
            scheduler_of(run).prepare(run)
        return run
    if run.snapshot is None:
        raise NexaError(f"run {run.id} has no snapshot of its code yet: sync it first")
    _make_directory(run)
    said = check(run)
    script = script_of(run, gpu=said.gpu, walltime=said.walltime)
    write_script(run.files, script)
    if not run.files.code.is_symlink():
        run.files.code.symlink_to(run.snapshot.path, target_is_directory=True)
    write_limits(run, said)
    if run.config.unattended:
        write_steward(run, said)
    write_run(run)
    scheduler_of(run).prepare(run)
    register(home(), run)
    return run


async def fetch_image(run: Run, tell: Callable[[str], None] | None = None) -> None:
    """Bring the image of the run's trials, where they run here, or where only this process may pull it.

    `tell` hears how far it is. Cancelled, it gives a pull up.

    Raises:
        ContainerError: it cannot be had; the message holds the runtime's words.
    """
    stop = threading.Event()
    try:
        await asyncio.to_thread(bring_image, run, host_of(run.cluster), tell, stop)
    finally:
        stop.set()


def submit(run: Run) -> Submission:
    """Submit the run's trials, exactly once; called again, it submits only what is unfinished."""
    return submit_run(run, scheduler_of(run))


async def watch(run: Run) -> AsyncGenerator[Poll, None]:
    """Yield polls until the run is over; cancelled, it detaches, which ends a local run."""
    floor, ceiling = poll_periods(run)
    async with aclosing(follow(run, scheduler_of(run), period=floor, ceiling=ceiling)) as polls:
        async for poll in polls:
            yield poll


def look(run: Run) -> tuple[Trial, ...]:
    """Read what became of every trial, and price it; a copy of what is on a cluster is brought up to date."""
    scheduler = scheduler_of(run)
    scheduler.bring(run)
    tasks = scheduler.tasks(run)
    trials = price_trials(run, read_trials(run.files, run.config.trials, tasks), charges_of(run))
    if run.config.launcher.type == "torchrun" and (bad := failed(trials)[:MOST_TAILS]):
        scheduler.bring_ranks(run, [(trial.index, trial.attempt) for trial in bad])
        return explained(run, trials)
    return trials


def collect(run: Run) -> tuple[Trial, ...]:
    """Read what became of every trial, price it, and write results.csv."""
    trials = look(run)
    write_results(run.files.results, trials)
    return trials


def build(run: Run, trials: Sequence[Trial]) -> CostReport:
    """Build the cost report; nothing is written."""
    return built(run, trials, scheduler_of(run), measured=measured_of(run, trials))


def report(run: Run, trials: Sequence[Trial]) -> CostReport:
    """Write the cost report, as JSON and Markdown, and return it."""
    found = build(run, trials)
    _write_report(run, found)
    return found


def write(run: Run, trials: Sequence[Trial], found: CostReport) -> None:
    """Write what was read and built: results.csv, and the cost report."""
    write_results(run.files.results, trials)
    _write_report(run, found)


def _write_report(run: Run, found: CostReport) -> None:
    write_plots(run, found)
    write_atomically(run.files.report_markdown, to_markdown(found))
    write_atomically(run.files.report_json, to_json(found))
    if not run.files.refused.exists():
        # A cluster that cannot be reached now gets it another time: it is here.
        with suppress(HostError):
            scheduler_of(run).publish(run)


async def track(run: Run, trials: Sequence[Trial], found: CostReport) -> Tracked | None:
    """Log the run's trials to MLflow, where its config asks for it; what ails the tracker is told, and ends nothing."""
    stop = threading.Event()
    try:
        return await asyncio.to_thread(log_to_mlflow, run, trials, found, stop)
    finally:
        stop.set()


def conclude(run: Run, trials: Sequence[Trial]) -> None:
    """Return where the run is done, what a training made described beside its report; raise what else it ended as.

    Raises:
        RunFailedError: trials failed; it says which, with their last words.
        RunCancelledError: a person ended it.
    """
    end, reason = ending(run, trials)
    match end:
        case "done":
            if run.kind == "training":
                write_artifact(run, host_of(run.cluster))
                scheduler_of(run).publish(run)
        case "failed":
            raise RunFailedError(failure(run, trials, reason))
        case "cancelled":
            raise RunCancelledError(
                f"run {run.id} was cancelled ({reason}): `nexa-infra resume {run.id}` goes on with it"
            )
        case "unfinished":
            raise RunFailedError(f"run {run.id} is unfinished: `nexa-infra resume {run.id}` runs what is left of it")


def cancel(run: Run, reason: str) -> None:
    """End a run by a person's word, wait until it has ended, and write its report."""
    stop(run, scheduler_of(run), reason, by="person")
    report(run, collect(run))


def scheduler_of(run: Run) -> Scheduler:
    """Return what runs the run's arrays."""
    if run.cluster is not None:
        return SlurmScheduler(host_of(run.cluster), settings().patience, settings().grace_seconds)
    return LocalScheduler(settings().kill_wait, settings().patience)


def ends_with_client(run: Run) -> bool:
    """Say whether what runs of the run ends with this process, as it does on the local default."""
    return run.cluster is None and scheduler_of(run).ends_with_client(run)


def poll_periods(run: Run) -> tuple[float, float]:
    """Return the shortest and the longest time between two polls of a run, in seconds."""
    if run.cluster is None:
        return settings().poll_seconds, settings().poll_seconds
    return run.cluster.poll_floor, run.cluster.poll_ceiling


def _make_directory(run: Run) -> None:
    files: RunDirectory = run.files
    files.path.parent.mkdir(parents=True, exist_ok=True)
    _keep_out_of_git(home() if run.mirror else Path(run.workdir))
    files.path.mkdir(mode=0o700, exist_ok=True)
    for folder in (files.submissions, files.claims, files.status, files.trials):
        folder.mkdir(exist_ok=True)


def _keep_out_of_git(workdir: Path) -> None:
    """Runs and snapshots are no code, whatever repository they lie in."""
    workdir.mkdir(parents=True, exist_ok=True, mode=0o700)
    ignore = workdir / ".gitignore"
    if not ignore.exists():
        ignore.write_text("*\n", encoding="utf-8")


def _usd(name: str, amount: float | Decimal) -> Decimal:
    exact = Decimal(str(amount))
    if not exact.is_finite() or exact < 0:
        raise ConfigError(Problem(name, f"must be an amount of USD, 0 or more, not {amount}"))
    return exact


def _distributed(
    config: SweepConfig | TrainingConfig, distributed: bool, file: Path | None
) -> SweepConfig | TrainingConfig:
    """Start the config's script by torchrun, one process a GPU, or plainly."""
    launcher = config.launcher
    if distributed and launcher.type == "command":
        message = "distributed needs a Python script or module, not a command"
        raise ConfigError(problem_at(file, "launcher.type", message))
    if distributed and launcher.type == "python":
        if launcher.extra_args:
            message = "are the interpreter's own, which torchrun does not take: remove them, or write type: torchrun"
            raise ConfigError(problem_at(file, "launcher.extra_args", message))
        launcher = launcher.model_copy(update={"type": "torchrun", "extra_args": ()})
    elif not distributed and launcher.type == "torchrun":
        kept = launcher.model_dump(include={"script", "module", "argument_style"})
        launcher = Launcher(type="python", **kept)
    return config.model_copy(update={"launcher": launcher})
