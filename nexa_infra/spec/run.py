"""Every key that a config file may hold."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from nexa_infra.spec.container import ContainerSpec
from nexa_infra.spec.fields import Count, KeyPath, Lines, Misfit, Spec, Truth, Variables, WholeNumber, Words
from nexa_infra.spec.job import SlurmJob
from nexa_infra.spec.launcher import Launcher, placeholders, processes_asked, unfilled
from nexa_infra.spec.policy import Budget, Checkpoint, Health, Objective, Retry
from nexa_infra.spec.sweep import PointValues, SweepDefinition
from nexa_infra.spec.torchrun import node_range, option_name
from nexa_infra.spec.tracking import Tracking, misfit_of_label


class SyncRules(Spec):
    """What code travels with a run."""

    include: Words = Field(default=(), description="patterns of files to bring although git ignores them")
    exclude: Words = Field(default=(), description="patterns of files to leave behind")
    untracked: Truth = Field(default=True, description="bring files that git neither tracks nor ignores")
    max_mib: Count = Field(default=512, description="refuse code that is larger than this, MiB")


class RunConfig(Spec):
    """What a sweep's and a training's config have in common."""

    job: SlurmJob = Field(default=SlurmJob(), description="what each trial asks of Slurm")
    launcher: Launcher = Field(description="how a trial's program is started")
    objective: Objective | None = Field(default=None, description="the metric that says which trial is best")
    sync: SyncRules = Field(default=SyncRules(), description="what code travels")
    container: ContainerSpec | None = Field(default=None, description="in which image a trial runs")
    retry: Retry = Field(default=Retry(), description="which trials are run again")
    checkpoint: Checkpoint = Field(default=Checkpoint(), description="how an interrupted trial goes on")
    budget: Budget = Field(default=Budget(), description="what the run may cost")
    tracking: Tracking | None = Field(default=None, description="which experiment trackers are told of the trials")
    unattended: Truth = Field(
        default=False, description="a steward on the cluster follows the run: no client is needed"
    )

    @property
    def trials(self) -> SweepDefinition:
        """The run's trials; a training has one."""
        raise NotImplementedError

    def _wrong_together(self, arguments: KeyPath) -> Iterator[tuple[KeyPath, str]]:
        """Yield what the config's parts get wrong between them; `arguments` is where the trials' arguments stand."""
        yield from self._wrong_gang()
        yield from self._wrong_interruption()
        yield from self._wrong_packs()
        yield from self._wrong_retry()
        yield from self._wrong_container()
        yield from self._wrong_placeholders(arguments)
        yield from self._wrong_labels(arguments[:1])

    def _wrong_labels(self, home: KeyPath) -> Iterator[tuple[KeyPath, str]]:
        """Yield the run's labels that a tracker would not take."""
        if self.tracking is not None and self.tracking.wandb is not None:
            for number, label in enumerate(self.trials.tags):
                if why := misfit_of_label(label):
                    yield (*home, "tags", number), why

    def _wrong_interruption(self) -> Iterator[tuple[KeyPath, str]]:
        """Yield what stands against a job that is warned, or puts itself back in the queue."""
        job, resumes = self.job, self.checkpoint.resumes
        if resumes and "no-requeue" in job.extra:
            yield ("job", "extra", "no-requeue"), "cannot be set beside checkpoint: checkpoint says it"
        limit = job.walltime
        if (resumes or job.warns) and limit is not None and limit.total_seconds() <= job.warning_seconds:
            least = f"job.time is {job.time}: the warning would come before the job"
            yield ("job", "signal_before_end"), f"is {job.warning_seconds}, but {least}"

    def _wrong_packs(self) -> Iterator[tuple[KeyPath, str]]:
        """Yield what several trials in one array task cannot do."""
        if not self.job.packs:
            return
        told = f"is {self.job.trials_per_task}, but "
        if self.launcher.type == "torchrun":
            yield ("job", "trials_per_task"), f"{told}the launcher is torchrun: it must be 1 there"
        if self.checkpoint.resumes:
            key = "requeue" if self.checkpoint.requeue else "chain_until_done"
            why = f"{told}a task of several trials does not put itself back: remove checkpoint.{key}, and use retry"
            yield ("job", "trials_per_task"), why

    def _wrong_retry(self) -> Iterator[tuple[KeyPath, str]]:
        """Yield what a retry would need to be told."""
        memory = self.job.memory
        if self.retry.memory_factor is not None and (memory is None or not int(re.sub(r"\D", "", memory))):
            held = "not set" if memory is None else f"{memory}, all that a node has"
            why = f"is a multiple of job.memory, which is {held}: set job.memory, such as 16G"
            yield ("retry", "memory_factor"), why

    def _wrong_container(self) -> Iterator[tuple[KeyPath, str]]:
        """Yield what a container is asked for that it cannot give."""
        asked = self.container
        if asked is None:
            return
        if asked.target is None and asked.image is None:
            yield ("container",), "names no image: set container.target to one of the catalog's, or container.image"
        if self.launcher.type == "torchrun" and self.job.nodes > 1 and asked.network == "none":
            why = f"is none, but the processes of {self.job.nodes} nodes must reach each other: write host"
            yield ("container", "network"), why

    def _wrong_gang(self) -> Iterator[tuple[KeyPath, str]]:
        """Yield what torchrun is asked for that the job cannot give."""
        launcher, job = self.launcher, self.job
        if launcher.type != "torchrun":
            return
        if job.signal in {"INT", "HUP"}:
            yield ("job", "signal"), f"is {job.signal}, by which torchrun itself ends: write USR1 or USR2"
        asked = processes_asked(launcher)
        key = "nproc_per_node" if "nproc_per_node" in launcher.model_fields_set else "extra_args"
        path: KeyPath = ("launcher", key)
        if isinstance(asked, int) and asked > job.gpus > 0:
            yield path, f"{asked} processes a node are more than its {job.gpus} GPUs (job.gpus_per_node): lower it"
        elif asked == "gpu" and not job.gpus:
            yield path, "is gpu, but the job asks for no GPU: set job.gpus_per_node, or write cpu or a number"
        if launcher.nnodes is not None and (most := node_range(launcher.nnodes)[1]) != job.nodes:
            yield ("launcher", "nnodes"), f"is {launcher.nnodes}, but job.nodes is {job.nodes}: set job.nodes: {most}"
        if job.nodes > 1:
            for number, word in enumerate(launcher.extra_args):
                if option_name(word) == "--standalone":
                    why = f"--standalone is for one node, but job.nodes is {job.nodes}: remove one of the two"
                    yield ("launcher", "extra_args", number), why

    def _wrong_placeholders(self, arguments: KeyPath) -> Iterator[tuple[KeyPath, str]]:
        """Yield the placeholders that some trial cannot fill; `arguments` is where the trials' arguments stand."""
        for path, word in self._template_words(arguments):
            for name in sorted(placeholders([word])):
                if complaint := unfilled([f"{{{name}}}"], self.trials.names):
                    yield path, complaint
                elif why := self._unfilled_by(name):
                    yield path, f"the placeholder {{{name}}} cannot be filled: {why}"

    def _template_words(self, arguments: KeyPath) -> Iterator[tuple[KeyPath, str]]:
        launcher = self.launcher
        if launcher.type == "command":
            yield from ((("launcher", "command", number), word) for number, word in enumerate(launcher.command))
        else:
            if launcher.type == "python":
                yield ("launcher", "python"), launcher.python
            yield from ((("launcher", "extra_args", number), word) for number, word in enumerate(launcher.extra_args))
            yield from ((("launcher", key), word) for key in ("script", "module") if (word := getattr(launcher, key)))
        yield from (((*arguments, number), word) for number, word in enumerate(self.trials.base_args))

    def _unfilled_by(self, name: str) -> str | None:
        """Say which trials have no value for a parameter that some trial has."""
        if name in self.trials.overrides:
            return f"overrides holds {name} at null" if self.trials.overrides[name] is None else None
        for axis in self.trials.axes:
            given = [dict(point) for point in axis]
            if any(name in point for point in given):
                for point in given:
                    if point.get(name) is None:
                        return f"{name} is null in a trial" if name in point else f"a trial has no {name}"
        return None


class SweepConfig(RunConfig):
    """A sweep: `job`, `launcher`, `sweep`, and what the run may do by itself."""

    kind: Literal["sweep"] = "sweep"
    sweep: SweepDefinition = Field(description="the trials")
    canary: WholeNumber = Field(
        default=0, description="how many trials run first, alone; the rest follow only where one of them completes"
    )

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if not self.sweep.axes:
            asked = self.sweep.parameters or self.sweep.zip
            why = "overrides holds every parameter at one value" if asked else "it has no parameters, zip or trials"
            raise Misfit((("sweep",), f"nothing varies, {why}: add one that does, or write training: for one run"))
        if wrong := list(self._wrong_together(("sweep", "base_args"))):
            raise Misfit(*wrong)
        return self

    @property
    def trials(self) -> SweepDefinition:
        """The run's trials."""
        return self.sweep


class Training(Spec):
    """One training run: its arguments, parameters and environment."""

    args: Words = Field(default=(), description="arguments of the program, before its parameters")
    parameters: PointValues = Field(default={}, description="name: value, in the launcher's argument style")
    env: Variables = Field(default={}, description="environment variables of the run")
    tags: Lines = Field(default=(), description="labels of the run")


class TrainingConfig(RunConfig):
    """A training: `job`, `launcher`, `training`, and what the run may do by itself."""

    kind: Literal["training"] = "training"
    training: Training = Field(default=Training(), description="the run's arguments")
    health: Health = Field(default=Health(), description="what to do where its metrics go wrong, or stand still")

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if wrong := list(self._wrong_together(("training", "args"))):
            raise Misfit(*wrong)
        return self

    @cached_property
    def trials(self) -> SweepDefinition:
        """The training as a sweep of one trial."""
        asked = self.training
        return SweepDefinition(trials=(asked.parameters,), base_args=asked.args, env=asked.env, tags=asked.tags)


def config_of(data: Any) -> SweepConfig | TrainingConfig:
    """Read a config's JSON form back, as `run.json` holds it."""
    return (TrainingConfig if data.get("kind") == "training" else SweepConfig).model_validate(data)
