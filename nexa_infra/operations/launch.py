"""The road, without Prefect: for scripts, notebooks and the command line."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

from nexa_infra.errors import ConfigError, DetachedError, NexaError, Problem, SubmitError
from nexa_infra.hosts.connections import host_of, kept_open
from nexa_infra.monitoring import report_words as words
from nexa_infra.monitoring.report import extended
from nexa_infra.operations import steps
from nexa_infra.operations.endings import ending
from nexa_infra.operations.fetch import fetch
from nexa_infra.operations.manage import prepare_resume
from nexa_infra.operations.progress import Tell
from nexa_infra.operations.steps import AnyCluster
from nexa_infra.operations.voice import heard, speaker
from nexa_infra.runs.artifact import ArtifactMeta, read_artifact
from nexa_infra.runs.directory import mark_cancelled
from nexa_infra.runs.record import Run
from nexa_infra.runs.submissions import Submission
from nexa_infra.scheduling.base import Admission
from nexa_infra.scheduling.slurm import SlurmBatchArtifacts, preview_batch, submitted_batch
from nexa_infra.spec.run import SweepConfig, TrainingConfig

if TYPE_CHECKING:
    from nexa_infra.monitoring.report import CostReport

_logger = logging.getLogger(__name__)
# How long after a first Ctrl-C a second one cancels what runs on a cluster, seconds.
SECOND_WORD = 3.0


def launch_slurm_sweep(
    config: str | Path | SweepConfig | None,
    submit: bool = False,
    *,
    cluster: AnyCluster | None = None,
    resume: str | None = None,
    overrides: Sequence[str] = (),
    budget_usd: float | Decimal | None = None,
    tell: Tell | None = None,
) -> SlurmBatchArtifacts:
    """Run a sweep to its end, on this machine where no cluster is given; `submit=False` is the preview.

    `cluster` may be a `Cluster`, a cluster file's path, or a saved block.
    `resume` is a run's id (or a part of it, or `latest`): its unfinished trials are run, and
    `config` is not read. `tell` is called with each poll. Works in a notebook's event loop too.

    Raises:
        ConfigError: the config is not understood; nothing was written.
        BudgetError: the projected cost is over the budget; nothing was started.
        RunFailedError: trials failed; the report says which.
    """
    if resume is not None:
        run = prepare_resume(resume)
    elif config is None:
        raise ConfigError(Problem("config", "give a config file, or the run to resume"))
    else:
        run = plan_sweep(config, cluster=cluster, overrides=overrides, budget_usd=budget_usd)
    _expect(run, "sweep")
    if not submit and resume is None:
        return preview(run)
    return _drive(run, tell)


def launch_training_job(
    config_path: str | Path | TrainingConfig | None,
    distributed: bool = False,
    *,
    overrides: Sequence[str] | None = None,
    cluster: AnyCluster | None = None,
    resume: str | None = None,
    budget_usd: float | Decimal | None = None,
    tell: Tell | None = None,
    fetch_to: str | Path | None = None,
) -> ArtifactMeta:
    """Run one training to its end and return what it made, verified.

    `fetch_to` is a folder on this machine: what the run has written is copied into it, under the run's id.
    `distributed=True` starts the script by torchrun, one process a GPU; `distributed=False` starts
    a torchrun config's script plainly. The rest is as in `launch_slurm_sweep`.

    Raises:
        ArtifactError: what it made is not, or no longer, what was written.
    """
    if resume is not None:
        run = prepare_resume(resume)
    elif config_path is None:
        raise ConfigError(Problem("config_path", "give a config file, or the run to resume"))
    else:
        run = plan_training(config_path, distributed, cluster=cluster, overrides=overrides or (), budget_usd=budget_usd)
    _expect(run, "training")
    with kept_open(run.cluster):
        _drive(run, tell)
        if fetch_to is not None:
            return read_artifact(run, host_of(run.cluster), copy=fetch(run, to=Path(fetch_to)))
        return read_artifact(run, host_of(run.cluster))


def plan_sweep(
    config: str | Path | SweepConfig,
    *,
    cluster: AnyCluster | None = None,
    overrides: Sequence[str] = (),
    budget_usd: float | Decimal | None = None,
) -> Run:
    """Plan a sweep, for a caller that wants to know its run before `follow_run`; nothing is written."""
    run = steps.plan(config, cluster=cluster, overrides=overrides, budget_usd=budget_usd)
    _expect(run, "sweep")
    return run


def plan_training(
    config: str | Path | TrainingConfig,
    distributed: bool | None = None,
    *,
    cluster: AnyCluster | None = None,
    overrides: Sequence[str] = (),
    budget_usd: float | Decimal | None = None,
) -> Run:
    """Plan a training, for a caller that wants to know its run before `follow_run`; nothing is written.

    `distributed=None` starts it as its launcher says.
    """
    run = steps.plan(config, cluster=cluster, overrides=overrides, budget_usd=budget_usd, distributed=distributed)
    _expect(run, "training")
    return run


def preview(run: Run) -> SlurmBatchArtifacts:
    """Show what a run would submit, for how much, and what its cluster says to it; nothing is changed anywhere."""
    with kept_open(run.cluster):
        try:
            said = steps.check(run)
        except SubmitError as error:
            if run.cluster is not None:
                raise
            said = Admission(notes=(str(error),))  # it may be meant for another machine
        if told := extended(run):
            said = replace(said, notes=(f"extends {words.extended(told)}", *said.notes))
        return preview_batch(run, steps.estimate_cost(run), said)


def follow_run(run: Run, *, tell: Tell | None = None) -> SlurmBatchArtifacts:
    """Take a run to its end: a planned one, or one that `prepare_resume` or `prepare_retry` has made ready."""
    return _drive(run, tell)


async def take_the_road(run: Run, tell: Tell | None = None) -> SlurmBatchArtifacts:
    """Take a planned run along the road, or an earlier one along what is left of it."""
    with kept_open(run.cluster):
        return await _along_the_road(run, tell)


async def _along_the_road(run: Run, tell: Tell | None) -> SlurmBatchArtifacts:
    async with reported(run):
        estimate = steps.estimate_cost(run)
        if not run.files.record.exists():
            await asyncio.to_thread(steps.admit, run, estimate)
            run = await asyncio.to_thread(steps.sync, run)
        run = await asyncio.to_thread(steps.render, run)
        await steps.fetch_image(run, _told)
        for own in (False, True):
            submission = await _submitted(run)
            own = own or steps.ends_with_client(run)  # noqa: PLW2901
            async with heard(run, speaker.get()), aclosing(steps.watch(run)) as polls:
                async for poll in polls:
                    if tell is not None:
                        tell(poll)
            trials = await asyncio.to_thread(steps.collect, run)
            # Another client's trials were followed, and that client has ended: what it left is for this one to run.
            if own or ending(run, trials)[0] != "unfinished":
                break
    report = await asyncio.to_thread(steps.report, run, trials)
    tracked = await steps.track(run, trials, report)
    if tracked is not None and tracked.warning:
        _logger.warning("%s", tracked.warning)
    await asyncio.to_thread(steps.conclude, run, trials)
    return submitted_batch(run, estimate, submission, report)


def _told(line: str) -> None:
    """Tell how far an image is, where somebody listens to lines."""
    if (say := speaker.get()) is not None:
        say([line])


async def _submitted(run: Run) -> Submission:
    """Submit, in a thread; one who is cancelled meanwhile still ends what would end with this process."""
    submitting = asyncio.ensure_future(asyncio.to_thread(steps.submit, run))
    try:
        return await asyncio.shield(submitting)
    except asyncio.CancelledError:
        steps.scheduler_of(run).leave(run)
        with suppress(NexaError, OSError):
            await submitting
            if steps.ends_with_client(run):
                await asyncio.to_thread(steps.scheduler_of(run).cancel, run)
        raise


async def _hear_again(run: Run, second: asyncio.Event) -> None:
    """Wait a moment for a second Ctrl-C, which cancels what runs on a cluster."""
    sys.stderr.write("detached: its jobs go on. Ctrl-C again, now, cancels them\n")
    try:
        await asyncio.wait_for(second.wait(), SECOND_WORD)
    except TimeoutError:
        raise DetachedError(
            f"run {run.id} goes on without this client: `nexa-infra resume {run.id}` follows it, "
            f"`nexa-infra cancel {run.id}` ends it"
        ) from None
    sys.stderr.write("cancelling\n")
    with kept_open(run.cluster):
        await asyncio.to_thread(steps.cancel, run, "Ctrl-C, twice")


@asynccontextmanager
async def reported(run: Run) -> AsyncIterator[None]:
    """Write the run's report where the road ends early: cancelled, interrupted, or by an error."""
    try:
        yield
    except BaseException:
        if run.files.record.exists() and not run.files.refused.exists():
            with suppress(NexaError, OSError):
                write_report(run)
        raise


def write_report(run: Run) -> CostReport:
    """Collect a run's results as they stand, and write its report."""
    return steps.report(run, steps.collect(run))


def _expect(run: Run, kind: str) -> None:
    if run.kind == kind:
        return
    call = "launch_training_job" if run.kind == "training" else "launch_slurm_sweep"
    verb = "train" if run.kind == "training" else "sweep"
    file = run.config_file or "FILE"
    message = f"this is a {run.kind}, not a {kind}: use {call}, or `nexa-infra {verb} {file}`"
    raise ConfigError(Problem("", message, file=run.config_file))


def _drive(run: Run, tell: Tell | None) -> SlurmBatchArtifacts:
    """Take the road to its end: here, or, inside a notebook's loop, in a thread of its own."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(_interruptible(run, tell))
    return _drive_beside(run, tell)


def _drive_beside(run: Run, tell: Tell | None) -> SlurmBatchArtifacts:
    """Take the road in a thread, and wait for it; Ctrl-C is a person's word and cancels the run here too."""
    loop = asyncio.new_event_loop()
    road = loop.create_task(take_the_road(run, tell))

    def take() -> SlurmBatchArtifacts:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            return runner.run(_awaited(road))

    with ThreadPoolExecutor(1, thread_name_prefix="nexa-road") as pool:
        going = pool.submit(take)
        try:
            return going.result()
        except KeyboardInterrupt:
            _give_word(run)
            loop.call_soon_threadsafe(road.cancel)
            with suppress(asyncio.CancelledError, CancelledError, NexaError):
                going.result()
            raise


async def _awaited(road: asyncio.Task[SlurmBatchArtifacts]) -> SlurmBatchArtifacts:
    return await road


def _give_word(run: Run) -> None:
    """Record that a person has cancelled a run with Ctrl-C, before anything of it ends."""
    if run.cluster is None and steps.ends_with_client(run):
        mark_cancelled(run.files, "Ctrl-C", by="person")


async def _interruptible(run: Run, tell: Tell | None) -> SlurmBatchArtifacts:
    """Take the road; Ctrl-C is a person's word and cancels the run, SIGTERM only ends this client.

    On a cluster the first Ctrl-C only detaches: its jobs go on. A second one, within `SECOND_WORD`
    seconds, cancels them.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once nothing of the run is left running here.
        DetachedError: after one Ctrl-C on a cluster.
        SystemExit: likewise after SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread():
        return await take_the_road(run, tell)
    loop = asyncio.get_running_loop()
    road = asyncio.ensure_future(take_the_road(run, tell))
    heard: list[signal.Signals] = []

    second = asyncio.Event()

    def hear(number: signal.Signals) -> None:
        if heard and heard[0] == number == signal.SIGINT:
            second.set()
        if road.done():
            return
        heard.append(number)
        if number == signal.SIGINT:
            _give_word(run)
        road.cancel()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        loop.add_signal_handler(number, hear, number)
    try:
        return await road
    except asyncio.CancelledError:
        if not heard:
            raise
        if heard[0] == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM) from None
        if run.cluster is not None and run.files.record.exists():
            await _hear_again(run, second)
        raise KeyboardInterrupt from None
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
