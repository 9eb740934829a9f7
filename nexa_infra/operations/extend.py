"""Extending a sweep: a new run of what an earlier one has not finished."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from nexa_infra.errors import ConfigError, NexaError, Problem
from nexa_infra.hosts.connections import kept_open
from nexa_infra.monitoring.report import EXTENDS
from nexa_infra.monitoring.report_text import counted, ranges
from nexa_infra.operations import launch, manage, steps
from nexa_infra.operations.logs import about_to_start
from nexa_infra.operations.progress import Tell
from nexa_infra.operations.steps import AnyCluster
from nexa_infra.runs.attempts import read_states
from nexa_infra.runs.record import Run
from nexa_infra.scheduling.slurm import SlurmBatchArtifacts
from nexa_infra.spec.fields import Value
from nexa_infra.spec.run import SweepConfig, TrainingConfig
from nexa_infra.spec.sweep import MOST_WITH_EXCLUSIONS, SweepDefinition, spans_of, trial_hash


def extend_sweep(
    run: str | Run,
    config: str | Path | SweepConfig,
    submit: bool = False,
    *,
    cluster: AnyCluster | None = None,
    overrides: Sequence[str] = (),
    budget_usd: float | Decimal | None = None,
    tell: Tell | None = None,
) -> SlurmBatchArtifacts:
    """Run the trials of a sweep that an earlier run has not finished, as a new run; `submit=False` is the preview.

    `run` is the earlier run: its id, a part of it, `latest`, its directory, or itself. Trials are known by
    their parameters, so that the sweep may be a larger one, or its axes in another order. What the earlier
    run left out itself, because a run before it had finished it, is finished too.
    The rest is as in `launch_slurm_sweep`.

    Raises:
        NexaError: the earlier run has not ended, or has finished all of the sweep's trials; nothing was written.
        ConfigError: one of the two is a training, or the config is not understood; nothing was written.
    """
    planned = plan_extension(run, config, cluster=cluster, overrides=overrides, budget_usd=budget_usd)
    return launch.follow_run(planned, tell=tell) if submit else launch.preview(planned)


def plan_extension(
    run: str | Run,
    config: str | Path | SweepConfig,
    *,
    cluster: AnyCluster | None = None,
    overrides: Sequence[str] = (),
    budget_usd: float | Decimal | None = None,
) -> Run:
    """Plan the run that extends another, for a caller that wants to know it before `follow_run`; nothing is written."""
    before = finished_in(manage.find(run) if isinstance(run, str) else run)
    file = str(config) if isinstance(config, (str, Path)) else None
    return steps.plan(
        config,
        cluster=cluster,
        overrides=overrides,
        budget_usd=budget_usd,
        labels=before.labels,
        narrowed=lambda read: before.left_of(read, file),
    )


@dataclass(frozen=True)
class Finished:
    """The trials that a run, or one that it extends, has finished."""

    run_id: str
    hashes: Counter[str]  # how often each; a sweep may hold a point several times

    @property
    def labels(self) -> Mapping[str, str]:
        """What ties a new run to it."""
        return {EXTENDS: self.run_id}

    def left_of(self, config: SweepConfig | TrainingConfig, file: str | None = None) -> SweepConfig:
        """Return a sweep without what is finished of it; where it has a point several times, the first are.

        Raises:
            ConfigError: it is a training, or too large to be thinned.
            NexaError: nothing is left.
        """
        if isinstance(config, TrainingConfig):
            message = f"this is a training, not a sweep: only a sweep extends another; use `nexa-infra train {file}`"
            raise ConfigError(Problem("", message, file=file))
        sweep = config.sweep
        if sweep.grid_size > MOST_WITH_EXCLUSIONS:
            message = f"has {sweep.grid_size:,} points, and up to {MOST_WITH_EXCLUSIONS:,} can be told apart from those"
            raise ConfigError(Problem("sweep", f"{message} of another run: shorten an axis", file=file))
        known = Counter(self.hashes)
        points = []
        for point, parameters in _points(sweep):
            if known and known[key := trial_hash(parameters)]:
                known[key] -= 1
                points.append(point)
        if len(points) == len(sweep):
            all_of_them = "the only trial" if len(points) == 1 else f"all {counted(len(points), 'trial')}"
            what = f" of {file}" if file else " of the sweep"
            told = f"{all_of_them}{what} finished in run {self.run_id}: there is nothing left to run"
            raise NexaError(f"{told}. `nexa-infra report {self.run_id}` shows them")
        # Made anew: what a copy has worked out about the whole would stand in it.
        return config.model_copy(update={"sweep": _with_finished(sweep, ranges(points))})


def finished_in(run: Run) -> Finished:
    """Read what a run, which has ended, and those that it extends have finished.

    Raises:
        ConfigError: it is a training.
        NexaError: it has not ended.
        HostError: its cluster cannot be reached.
    """
    if isinstance(run.config, TrainingConfig):
        message = f"run {run.id} is a training: only a sweep can be extended; `nexa-infra resume` goes on with a run"
        raise ConfigError(Problem("", message, file="extend"))
    with kept_open(run.cluster):
        scheduler = steps.scheduler_of(run)
        if scheduler.poll(run).active or about_to_start(run):
            raise NexaError(f"run {run.id} is still running: wait for its end, or `nexa-infra cancel {run.id}`")
        states, _ = read_states(run.files, run.trials, scheduler.tasks(run))
    sweep = run.config.sweep
    before = {point for first, last in spans_of(sweep.finished) for point in range(first, last + 1)}
    own = iter(states)
    hashes: Counter[str] = Counter()
    for point, parameters in _points(_with_finished(sweep, "")):
        if point in before or next(own) == "completed":
            hashes[trial_hash(parameters)] += 1
    return Finished(run.id, hashes)


def _points(sweep: SweepDefinition) -> Iterator[tuple[int, Mapping[str, Value]]]:
    """Yield a sweep's trials: which point of its grid each is, and its parameters."""
    points = sweep.survivors if sweep.survivors is not None else range(len(sweep))
    for trial, point in enumerate(points):
        yield point, sweep.parameters_of(trial)


def _with_finished(sweep: SweepDefinition, points: str) -> SweepDefinition:
    known = {name: getattr(sweep, name) for name in SweepDefinition.model_fields}
    return SweepDefinition(**{**known, "finished": points})
