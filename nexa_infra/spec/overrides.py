"""Overrides of a config, `dotted.key=YAML value`, put into its tree before it is checked."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel

from nexa_infra.spec.complaints import model_at
from nexa_infra.spec.compose import Finding, PlacedDict, Tree, compose
from nexa_infra.spec.fields import KeyPath, key_text, kind_of
from nexa_infra.spec.run import SweepConfig, TrainingConfig

_FORM = "an override is written key=value, such as job.time=00:10:00 or sweep.parameters.lr=[1e-3, 1e-4]"


def override(tree: Tree, texts: Iterable[str], source: str) -> Tree:
    """Return the tree with overrides applied, in their order; faults are added to its findings.

    Where a section's keys are free, as in `sweep.parameters`, what follows is one key, dots and all.

    Raises:
        ConfigError: a value is not YAML.
    """
    data, findings = tree.data, list(tree.findings)
    if not isinstance(data, PlacedDict):
        return tree
    for text in texts:
        place = _in_one_line(text)
        key, equals, value = text.partition("=")
        path = _path_of(key.strip())
        if not equals or not all(path):
            findings.append(Finding((), _FORM, place))
        elif "[" in key:
            findings.append(Finding(path, "an override sets a whole list, not one item: give all of its items", place))
        elif not value.strip():
            findings.append(Finding(path, "has no value: write null for none, or '' for an empty text", place))
        else:
            asked = compose(value, source, place)
            findings.extend(Finding((*path, *one.path), one.message, one.place) for one in asked.findings)
            try:
                data = _with(data, path, asked.data, place)
            except _NoKeysBelowError as error:
                findings.append(Finding(path, str(error), place))
    return Tree(data, tree.start, findings)


class _NoKeysBelowError(Exception):
    """An override's key goes on below something that has no keys."""


def _path_of(key: str) -> tuple[str, ...]:
    """Split a dotted key by the sections that a config has."""
    root: type[BaseModel] = TrainingConfig if key.partition(".")[0] == "training" else SweepConfig
    steps: list[str] = []
    rest, dot = key, "."
    while dot:
        if model_at(root, tuple(steps)) is None:
            return (*steps, rest)
        head, dot, rest = rest.partition(".")
        steps.append(head)
    return tuple(steps)


def _with(data: PlacedDict, path: tuple[str, ...], value: Any, place: str, done: KeyPath = ()) -> PlacedDict:
    """Return a copy with one value set; the original, which aliases may share, stays."""
    copy = PlacedDict()
    copy.update(data)
    copy.places.update(data.places)
    head, *rest = path
    if not rest:
        copy[head] = value
        copy.places[head] = place
        return copy
    below = data.get(head)
    if below is None:
        below = PlacedDict()
    if not isinstance(below, PlacedDict):
        key = key_text((*done, head))
        raise _NoKeysBelowError(f"{key} is {kind_of(below)}, which has no keys below it: set {key} itself")
    copy[head] = _with(below, tuple(rest), value, place, (*done, head))
    copy.places.setdefault(head, place)
    return copy


def _in_one_line(text: str) -> str:
    shown = text if text.isprintable() else repr(text)
    return shown if len(shown) <= 80 else f"{shown[:77]}…"
