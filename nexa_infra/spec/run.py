"""Every key that a config file may hold."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from nexa_infra.spec.fields import Count, KeyPath, Line, Lines, Misfit, Spec, Truth, Variables, Words
from nexa_infra.spec.job import SlurmJob
from nexa_infra.spec.launcher import Launcher, placeholders, unfilled
from nexa_infra.spec.policy import Budget, Objective, Retry
from nexa_infra.spec.sweep import PointValues, SweepDefinition


class SyncRules(Spec):
    """What code travels with a run."""

    include: Words = Field(default=(), description="patterns of files to bring although git ignores them")
    exclude: Words = Field(default=(), description="patterns of files to leave behind")
    untracked: Truth = Field(default=True, description="bring files that git neither tracks nor ignores")
    max_mib: Count = Field(default=512, description="refuse code that is larger than this, MiB")


class ContainerSpec(Spec):
    """In which image a trial runs."""

    target: Line | None = Field(default=None, description="a target of the image catalog")
    image: Line | None = Field(default=None, description="an image, in place of the target's")


class RunConfig(Spec):
    """What a sweep's and a training's config have in common."""

    job: SlurmJob = Field(default=SlurmJob(), description="what each trial asks of Slurm")
    launcher: Launcher = Field(description="how a trial's program is started")
    objective: Objective | None = Field(default=None, description="the metric that says which trial is best")
    sync: SyncRules = Field(default=SyncRules(), description="what code travels")
    container: ContainerSpec | None = Field(default=None, description="in which image a trial runs")
    retry: Retry = Field(default=Retry(), description="which trials are run again")
    budget: Budget = Field(default=Budget(), description="what the run may cost")

    @property
    def trials(self) -> SweepDefinition:
        """The run's trials; a training has one."""
        raise NotImplementedError

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

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if not self.sweep.axes:
            asked = self.sweep.parameters or self.sweep.zip
            why = "overrides holds every parameter at one value" if asked else "it has no parameters, zip or trials"
            raise Misfit((("sweep",), f"nothing varies, {why}: add one that does, or write training: for one run"))
        if wrong := list(self._wrong_placeholders(("sweep", "base_args"))):
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

    @model_validator(mode="after")
    def _checked(self) -> Self:
        if wrong := list(self._wrong_placeholders(("training", "args"))):
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
