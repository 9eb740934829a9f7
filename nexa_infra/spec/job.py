"""The job that each array task asks Slurm for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from nexa_infra.spec.fields import (
    Boolean,
    Count,
    KeyPath,
    Line,
    Lines,
    Misfit,
    Spec,
    Usd,
    Variables,
    WholeNumber,
    kind_of,
    one_line,
    shown,
)
from nexa_infra.spec.walltime import parse_walltime

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_GPU_GRES = re.compile(r"(?:gres/)?gpu(?::(?P<type>[A-Za-z][\w.-]*))?(?:[:=](?P<count>\d+))?")

# Options that the run sets by itself, and what to write instead of those that have a key of their own.
_OWNED = {
    "array": "the run makes its own arrays; job.array_parallelism sets how many run at once",
    "output": "the run keeps one log a trial",
    "error": "the run keeps one log a trial",
    "open-mode": "the run keeps one log a trial",
    "parsable": "the run reads sbatch's answer itself",
    "wrap": "the run makes its own script",
    "chdir": "trials start in the snapshot of the code",
    "export": "job.env holds variables",
    "test-only": "submit=False is the preview",
    "wait": "the run is followed by its client",
    "requeue": "retry: says what is run again",
    "signal": "use job.signal and job.signal_before_end",
    "job-name": "use job.name",
    "gpus-per-node": "use job.gpus_per_node",
    "ntasks-per-node": "use job.ntasks_per_node",
    "cpus-per-task": "use job.cpus_per_task",
    "mem": "use job.memory",
    "mail-type": "use job.mail_type",
    "mail-user": "use job.mail_user",
}
_KEYS = ("partition", "account", "qos", "time", "nodes", "constraint", "gres", "nodelist", "exclude", "reservation",
         "dependency")  # fmt: skip


# The least that a log is worth keeping of.
_LEAST_LOG = 4096
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

WarningSignal = Literal["USR1", "USR2", "INT", "HUP"]


def bytes_of(text: str) -> int:
    """Read an amount such as 100M or 2G; one without a unit is bytes.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"([0-9]{1,18})([KMGTkmgt]?)[Bb]?", text)
    if found is None:
        raise ValueError(f"{shown(text)} is no amount of bytes: write 100M, 2G, or 0 for no limit")
    return int(found[1]) * _UNITS[found[2].upper()]


def _signal(name: Any) -> Any:
    """Refuse what cannot be told from an end, and read SIGUSR1 as USR1."""
    if not isinstance(name, str):
        return name
    word = name.upper().removeprefix("SIG")
    if word == "TERM":
        raise ValueError("is TERM, which scancel and preemption send as well: write USR1, USR2, INT or HUP")
    return word if name.isupper() else name


def _number_or_auto(value: Any) -> Any:
    """Read a number of trials, or auto: a union would complain once for each of the two."""
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
        return value
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value) and int(value):
        return int(value)
    raise ValueError(f"a number of trials from 1 on, or auto, is meant here, not {kind_of(value)}")


def _name(text: str) -> str:
    if not _NAME.fullmatch(text):
        raise ValueError(
            f"{shown(text)} is no job name: use letters, digits, '.', '_' and '-', the first a letter or a digit"
        )
    if len(text) > 64:
        raise ValueError(f"{shown(text)} is too long for a job name: keep it to 64 characters")
    return text


def _options(options: object) -> object:
    """Check every option and its value at once, so that all complaints are told."""
    if not isinstance(options, Mapping):
        return options
    wrong: list[tuple[KeyPath, str]] = []
    read: dict[object, str | bool] = {}
    for option, value in options.items():
        try:
            _check_option(str(option))
            read[option] = _option_value(value)
        except ValueError as error:
            wrong.append(((str(option),), str(error)))
    if wrong:
        raise Misfit(*wrong)
    return read


def _check_option(option: str) -> None:
    word = option.lstrip("-").replace("_", "-")
    if not re.fullmatch(r"[a-z][a-z0-9-]*", word):
        raise ValueError("is no sbatch option: write its long name in small letters, such as licenses")
    if word in _OWNED:
        raise ValueError(f"cannot be set here: {_OWNED[word]}")
    if word in _KEYS:
        raise ValueError(f"has a key of its own: use job.{word}")
    if word != option:
        raise ValueError(f"write the option without dashes in front and with '-' inside: {word}")


def _option_value(value: object) -> str | bool:
    if isinstance(value, Boolean):
        return value.value
    if isinstance(value, bool):
        return value
    if isinstance(value, (str, int, float)) and str(value):
        return one_line(str(value))
    what = "an empty text" if value == "" else kind_of(value)
    raise ValueError(f"an option's value is text, or true for an option without one, not {what}")


class Setup(Spec):
    """What makes a trial's environment, in this order: modules, conda, venv, uv, lines."""

    modules: Lines = Field(default=(), description="environment modules to load")
    conda: Line | None = Field(default=None, description="a conda environment's name or path, activated")
    venv: Line | None = Field(default=None, description="a virtual environment's directory, activated")
    uv: Line | None = Field(default=None, description="a uv project's directory, whose .venv is used")
    lines: Lines = Field(default=(), description="lines of bash, run as they are")


class SlurmJob(Spec):
    """One array task's resources and policy, by the names that sbatch(1) has for them."""

    name: Annotated[Line, AfterValidator(_name)] = Field(default="nexa", description="the job's name")
    partition: Line | None = Field(default=None, description="sbatch --partition")
    account: Line | None = Field(default=None, description="sbatch --account")
    qos: Line | None = Field(default=None, description="sbatch --qos")
    time: Line = Field(default="01:00:00", description="walltime of one trial: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S")
    nodes: Count = Field(default=1, description="nodes a trial")
    ntasks_per_node: Count = Field(default=1, description="tasks a node")
    gpus_per_node: WholeNumber = Field(default=0, description="GPUs a node")
    gpu_type: Line | None = Field(default=None, description="the GPU's type, as the price book knows it")
    cpus_per_task: Count = Field(default=1, description="cores a task")
    memory: Line | None = Field(default=None, description="memory a node: 16G, 512M, 0 for all of it")
    constraint: Line | None = Field(default=None, description="sbatch --constraint")
    gres: Line | None = Field(default=None, description="sbatch --gres, where gpus_per_node does not say it")
    nodelist: Line | None = Field(default=None, description="sbatch --nodelist")
    exclude: Line | None = Field(default=None, description="sbatch --exclude")
    reservation: Line | None = Field(default=None, description="sbatch --reservation")
    dependency: Line | None = Field(default=None, description="sbatch --dependency")
    mail_type: Line | None = Field(default=None, description="sbatch --mail-type")
    mail_user: Line | None = Field(default=None, description="sbatch --mail-user")
    array_parallelism: Count | None = Field(default=None, description="trials that run at once; unset, as many as fit")
    trials_per_task: Annotated[int | Literal["auto"], BeforeValidator(_number_or_auto)] = Field(
        default=1, description="trials that one array task runs in turn; auto packs short ones, by how long they take"
    )
    trials_at_once: Count = Field(
        default=1, description="trials that run side by side in one array task, each on its share of GPUs and cores"
    )
    # Unset, and not a default: what is set asks for a warning, and run.json must not forget which it was.
    signal: Annotated[WarningSignal | None, BeforeValidator(_signal)] = Field(
        default=None, description="what warns a trial's processes before its walltime; unset, USR1, if anything does"
    )
    signal_before_end: Annotated[int, Field(ge=10, le=65535)] | None = Field(
        default=None, description="how long before the walltime they are warned, seconds; unset, 90, if they are"
    )
    log_limit: Line | None = Field(
        default="1G",
        description="the most that is kept of a trial's output, and of its errors: the beginning and the end; 0 is all",
    )
    output_dir: Line | None = Field(
        default=None, description="where run directories are made; unset, the workdir's runs/"
    )
    setup: Setup = Field(default=Setup(), description="what makes the environment of a trial")
    env: Variables = Field(default={}, description="plain environment variables; secrets belong in env_file")
    env_file: Line | None = Field(default=None, description="a file of NAME=VALUE lines on the cluster, mode 0600")
    cost_per_gpu_hour: Usd | None = Field(default=None, description="USD a GPU-hour, in place of the price book's")
    cost_per_core_hour: Usd | None = Field(default=None, description="USD a core-hour of a job without GPUs")
    extra: Annotated[dict[str, str | bool], BeforeValidator(_options)] = Field(
        default={}, description="any other sbatch option: name: value, or name: true"
    )

    @field_validator("time")
    @classmethod
    def _time(cls, text: str) -> str:
        parse_walltime(text)
        return text.strip()  # sbatch takes no space around it

    @field_validator("memory")
    @classmethod
    def _memory(cls, text: str | None) -> str | None:
        if text is not None and not re.fullmatch(r"[0-9]+[KMGTkmgt]?[Bb]?", text):
            raise ValueError(f"{shown(text)} is no amount of memory: write 16G, 512M, or 0 for all of a node's")
        return text

    @field_validator("log_limit")
    @classmethod
    def _log_limit(cls, text: str | None) -> str | None:
        if text is not None and 0 < bytes_of(text) < _LEAST_LOG:
            raise ValueError(f"{shown(text)} keeps next to nothing: write 4K or more, or 0 for no limit")
        return text

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        wrong: list[tuple[KeyPath, str]] = []
        gres = self.gres if self.gres is not None and "gpu" in self.gres else None
        if gres is not None and self.gpus_per_node:
            told = f"{gres} and gpus_per_node: {self.gpus_per_node} both ask for GPUs: keep one of the two"
            wrong.append((("gres",), told))
        found = _GPU_GRES.search(gres) if gres is not None else None
        if found and found["type"] and self.gpu_type and found["type"].lower() != self.gpu_type.lower():
            wrong.append((("gpu_type",), f"is {self.gpu_type}, but gres asks for {found['type']}: keep one of the two"))
        if self.gpu_type is not None and not self.gpus:
            wrong.append((("gpu_type",), f"is {self.gpu_type}, but no GPU is asked for: set gpus_per_node"))
        if self.cost_per_gpu_hour is not None and not self.gpus:
            wrong.append((("cost_per_gpu_hour",), "is set, but no GPU is asked for: set gpus_per_node"))
        if self.cost_per_core_hour is not None and self.gpus:
            wrong.append((("cost_per_core_hour",), "prices jobs without GPUs: use cost_per_gpu_hour"))
        if self.mail_user is not None and self.mail_type is None:
            wrong.append((("mail_user",), "is set without mail_type: say when to write, such as mail_type: END,FAIL"))
        wrong.extend(self._wrong_packs())
        if wrong:
            raise Misfit(*wrong)
        return self

    def _wrong_packs(self) -> Iterator[tuple[KeyPath, str]]:
        """Yield what stands against several trials in one array task."""
        at_once, per_task = self.trials_at_once, self.trials_per_task
        if per_task != 1:
            if self.nodes > 1:
                yield ("trials_per_task",), f"is {per_task}, but a trial takes {self.nodes} nodes: it must be 1 there"
            if self.ntasks_per_node > 1:
                why = f"is {per_task}, but ntasks_per_node is {self.ntasks_per_node}: it must be 1 there"
                yield ("trials_per_task",), why
        if per_task != "auto" and at_once > per_task:
            why = f"is {at_once}, but a task has {per_task}: raise trials_per_task, or lower it"
            yield ("trials_at_once",), why
        elif at_once > 1:
            if self.gpus % at_once:
                yield ("trials_at_once",), f"is {at_once}, but the task's {self.gpus} GPUs are no multiple of it"
            if self.cpus_per_task % at_once:
                cores = f"{self.cpus_per_task} cores" if self.cpus_per_task > 1 else "1 core"
                why = f"is {at_once}, but a task has {cores}: set cpus_per_task to {at_once}, or a multiple of it"
                yield ("trials_at_once",), why

    @property
    def warns(self) -> bool:
        """Whether the job asks for a warning by itself: a checkpoint that resumes asks for one as well."""
        return self.signal is not None or self.signal_before_end is not None

    @property
    def warning_signal(self) -> WarningSignal:
        """What warns a trial's processes, where they are warned."""
        return self.signal or "USR1"

    @property
    def warning_seconds(self) -> int:
        """How long before the walltime that is."""
        return 90 if self.signal_before_end is None else self.signal_before_end

    @property
    def packs(self) -> bool:
        """Whether an array task may run more than one trial."""
        return self.trials_per_task != 1

    @property
    def log_bytes(self) -> int | None:
        """The most that is kept of what a trial prints; None is all of it."""
        return bytes_of(self.log_limit) or None if self.log_limit is not None else None

    @property
    def walltime(self) -> timedelta | None:
        """The limit of one trial; `None` is no limit."""
        return parse_walltime(self.time)

    @property
    def gpus(self) -> int:
        """GPUs a node, from `gpus_per_node` or from `gres`."""
        if self.gpus_per_node or self.gres is None:
            return self.gpus_per_node
        found = [match for part in self.gres.split(",") if (match := _GPU_GRES.fullmatch(part.strip()))]
        return sum(int(match["count"] or 1) for match in found)

    @property
    def gpu(self) -> str | None:
        """The GPU's type, from `gpu_type` or from `gres`."""
        if self.gpu_type is not None or self.gres is None:
            return self.gpu_type
        found = _GPU_GRES.search(self.gres)
        return found["type"] if found else None

    @property
    def cores(self) -> int:
        """Cores a node that are asked for."""
        return self.ntasks_per_node * self.cpus_per_task
