"""One trial's argv: the launcher, the arguments that stay, and the trial's own values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from nexa_infra.spec.fields import Count, KeyPath, Line, Misfit, Spec, WholeNumber, Words, suggestion
from nexa_infra.spec.points import Value, written
from nexa_infra.spec.torchrun import (
    OPTIONS_OWNED,
    as_endpoint,
    as_nodes,
    as_processes,
    node_range,
    option_name,
)

__all__ = [
    "PLACEHOLDER",
    "TORCHRUN_KEYS",
    "ArgumentStyle",
    "Launcher",
    "argument",
    "fill",
    "pieces",
    "placeholders",
    "processes_asked",
    "unfilled",
    "written",
]

# What only torchrun takes.
TORCHRUN_KEYS = (
    "nproc_per_node",
    "nnodes",
    "max_restarts",
    "rdzv_backend",
    "rdzv_endpoint",
    "rdzv_timeout",
    "interface",
)

ArgumentStyle = Literal["--name value", "--name=value", "name=value"]

# `{name}` is filled with a trial's value; `{{name}}` is the text `{name}`.
PLACEHOLDER = re.compile(r"\{\{([A-Za-z_][\w./+-]*)\}\}|\{([A-Za-z_][\w./+-]*)\}")


class Launcher(Spec):
    """How a trial's program is started."""

    type: Literal["python", "torchrun", "command"] = Field(default="python", description="what starts the program")
    script: Line | None = Field(default=None, description="a script, from the top of the code or beside the config")
    module: Line | None = Field(default=None, description="a module, as python -m takes it, in place of a script")
    command: Words = Field(default=(), description="the program and its first arguments, for type: command")
    extra_args: Words = Field(default=(), description="arguments of python or torchrun itself, before the script")
    python: Line = Field(default="python3", description="the interpreter, for type: python")
    nproc_per_node: Annotated[str | int, BeforeValidator(as_processes)] = Field(
        default="auto",
        description="torchrun: processes a node: a number, gpu (one a GPU granted), cpu (one a core), or auto: one a "
        "GPU, without GPUs one a task",
    )
    nnodes: Annotated[str | None, BeforeValidator(as_nodes)] = Field(
        default=None, description="torchrun: MIN:MAX lets the run go on with fewer nodes; unset, all of job.nodes"
    )
    max_restarts: WholeNumber = Field(
        default=0, description="torchrun: how often the processes start again after one failed"
    )
    rdzv_backend: Literal["c10d", "static"] = Field(
        default="c10d", description="torchrun: how the nodes find each other"
    )
    rdzv_endpoint: Annotated[str | None, BeforeValidator(as_endpoint)] = Field(
        default=None, description="torchrun: HOST:PORT where they meet; unset, a free port of the job's first node"
    )
    rdzv_timeout: Count = Field(default=600, description="torchrun: seconds until nodes that do not come are given up")
    interface: Line | None = Field(
        default=None, description="torchrun: the network interface of NCCL and Gloo, such as ib0"
    )
    argument_style: ArgumentStyle = Field(default="--name value", description="how a parameter is written in argv")

    @model_validator(mode="after")
    def _one_program(self) -> Self:
        wrong = list(self._wrong_for_command() if self.type == "command" else self._wrong_for_python())
        wrong += self._wrong_for_torchrun() if self.type == "torchrun" else self._torchrun_only()
        if wrong:
            raise Misfit(*wrong)
        return self

    def _wrong_for_command(self) -> Iterator[tuple[KeyPath, str]]:
        for key in ("script", "module", "extra_args"):
            if getattr(self, key):
                yield (key,), "goes with type: python or torchrun: put all of it in command, or change type"
        if not self.command:
            yield ("command",), "is missing: type: command needs the program to run, such as [./run.sh, --fast]"
        elif not self.command[0]:
            yield ("command", 0), "is empty: the first word is the program to run"

    def _wrong_for_python(self) -> Iterator[tuple[KeyPath, str]]:
        if self.command:
            yield ("command",), f"goes with type: command, but type is {self.type}: write type: command"
        elif self.script and self.module:
            yield ("module",), f"stands beside script: {self.script}: keep one of the two"
        elif not self.script and not self.module:
            yield (), f"type: {self.type} needs a program: add script: train.py, or module: package.train"

    def _wrong_for_torchrun(self) -> Iterator[tuple[KeyPath, str]]:
        for number, word in enumerate(self.extra_args):
            if why := OPTIONS_OWNED.get(option_name(word)):
                yield ("extra_args", number), f"{option_name(word)} cannot be set here: {why}"
        if self.rdzv_backend == "static" and self.max_restarts:
            yield ("max_restarts",), "goes with rdzv_backend: c10d: a static rendezvous is held once"
        least, most = node_range(self.nnodes) if self.nnodes else (0, 0)
        if self.rdzv_backend == "static" and least < most:
            yield ("nnodes",), f"is {self.nnodes}, but a static rendezvous takes a fixed number of nodes: use c10d"

    def _torchrun_only(self) -> Iterator[tuple[KeyPath, str]]:
        for key in TORCHRUN_KEYS:
            if getattr(self, key) != type(self).model_fields[key].default:
                yield (key,), f"goes with type: torchrun, but type is {self.type}: write type: torchrun"

    def template(self, base_args: Iterable[str]) -> tuple[str, ...]:
        """Return the words of argv before a trial's own, placeholders unfilled."""
        match self.type:
            case "command":
                start: tuple[str, ...] = self.command
            case "python":
                start = (self.python, *self.extra_args)
            case "torchrun":
                start = ("torchrun", *self.extra_args)
        program = ("-m", self.module) if self.module else (self.script,) if self.script else ()
        return (*start, *program, *base_args)

    def argv(self, base_args: Iterable[str], parameters: Mapping[str, Value]) -> list[str]:
        """Return one trial's argv.

        A parameter that a placeholder names goes there; the others follow the template, in their
        order, in the launcher's argument style.
        """
        template = self.template(base_args)
        placed = placeholders(template)
        words = [fill(word, parameters) for word in template]
        for name, value in parameters.items():
            if name not in placed:
                words.extend(argument(name, value, self.argument_style))
        return words


def processes_asked(launcher: Launcher) -> str | int:
    """Return torchrun's processes a node: by its own option among extra_args, where that is understood, or the key."""
    found: str | int = launcher.nproc_per_node
    words = launcher.extra_args
    for number, word in enumerate(words):
        if option_name(word) == "--nproc-per-node":
            text = word.partition("=")[2] or (words[number + 1] if number + 1 < len(words) else "")
            with suppress(ValueError):
                found = as_processes(text)
    return found


def placeholders(words: Iterable[str]) -> frozenset[str]:
    """Return the names that `{name}` placeholders in `words` ask for."""
    return frozenset(found[2] for word in words for found in PLACEHOLDER.finditer(word) if found[2])


def pieces(word: str) -> list[tuple[str, bool]]:
    """Split a word into texts and placeholder names: `[(text, False), (name, True), …]`."""
    parts: list[tuple[str, bool]] = []
    last = 0
    for found in PLACEHOLDER.finditer(word):
        literal, name = found.groups()
        parts.append((word[last : found.start()] + (f"{{{literal}}}" if literal else ""), False))
        if name:
            parts.append((name, True))
        last = found.end()
    parts.append((word[last:], False))
    return [(text, is_name) for text, is_name in parts if text]


def fill(word: str, parameters: Mapping[str, Value]) -> str:
    """Fill a word's placeholders."""
    return "".join(written(parameters[text]) if is_name else text for text, is_name in pieces(word))


def argument(name: str, value: Value, style: ArgumentStyle) -> list[str]:
    """Return the words that pass one parameter; none for null.

    A boolean is `--name` or `--no-name`, and `name=true` in the style that has no dashes.
    """
    if value is None:
        return []
    if style == "name=value":
        return [f"{name}={written(value)}"]
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}={value}"] if style == "--name=value" else [f"--{name}", value]


def unfilled(words: Iterable[str], names: Iterable[str]) -> str | None:
    """Say which placeholder no parameter fills, and what to do; `None` if all are filled."""
    known = list(names)
    for name in sorted(placeholders(words)):
        if name not in known:
            return (
                f"the placeholder {{{name}}} is filled by no parameter{suggestion(name, known)}: "
                f"add the parameter, or write {{{{{name}}}}} for the text itself"
            )
    return None
