"""What pydantic finds in a config, said as a person would: which key, what is wrong, what to write."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from nexa_infra.spec.compose import Finding
from nexa_infra.spec.fields import KeyPath, Misfit, key_text, kind_of, shown, suggestion

# Set by the loader, to tell the two kinds of config apart in run.json: no key of a file.
HIDDEN = frozenset({"kind"})

# What people write first, and the key that holds it here.
_ALSO_KNOWN = {
    "args": "sweep.base_args",
    "cpus": "job.cpus_per_task",
    "cpu": "job.cpus_per_task",
    "gpu": "job.gpus_per_node",
    "gpus": "job.gpus_per_node",
    "grid": "sweep.parameters",
    "image": "container.image",
    "max_parallel": "job.array_parallelism",
    "mem": "job.memory",
    "metric": "objective.metric",
    "modules": "job.setup.modules",
    "num_gpus": "job.gpus_per_node",
    "num_nodes": "job.nodes",
    "params": "sweep.parameters",
    "program": "launcher.script",
    "timeout": "job.time",
    "walltime": "job.time",
    "warning_seconds": "job.signal_before_end",
}

# Where a required key is missing: what to write.
_MISSING = {
    "launcher": "is missing: say how a trial's program is started, such as launcher: {script: train.py}",
    "sweep": "is missing: a config has sweep: (trials to run) or training: (one run)",
    "source": "is missing: say which folder or file it is where the trials run, such as source: /data",
    "target": "is missing: say where the container sees it, such as target: /data",
    "metric": "is missing: name the key of metrics.json that says which trial is best, such as metric: accuracy",
}

# Where a section that cannot be left out is empty: what to write.
_EMPTY = {
    "launcher": "is empty: say how a trial's program is started, such as launcher: {script: train.py}",
    "sweep": "is empty: say what varies, such as sweep: {parameters: {lr: [1e-3, 1e-4]}}",
    "training": "is empty: write training: {} for a run without arguments, or give it keys",
}


def findings_of(error: ValidationError, root: type[BaseModel]) -> Iterator[Finding]:
    """Yield every complaint of a config that failed against the model `root`."""
    for detail in error.errors(include_url=False):
        path = tuple(detail["loc"])
        if path and path[-1] == "[key]":
            path = path[:-1]
        cause = detail.get("ctx", {}).get("error")
        if isinstance(cause, Misfit):
            yield from (Finding((*path, *below), message) for below, message in cause.complaints)
        else:
            yield Finding(path, _message(detail, path, root), kind=detail["type"])


def unknown_key(path: KeyPath, root: type[BaseModel]) -> str:
    """Say that a key is not known, and where it belongs or how it is spelled."""
    parent = path[:-1]
    key = str(path[-1])
    model = model_at(root, parent)
    known = _keys(model) if model else []
    every = list(_every_key(root))
    if close := difflib.get_close_matches(key, known, n=1, cutoff=0.8):
        return f"there is no such key (did you mean '{close[0]}'?)"
    if parent and isinstance(parent[-1], int):
        return f"there is no such key{suggestion(key, known)}: {key_text(parent)} has {', '.join(known)}"
    if homes := [".".join(home) + ":" if home else "the top level" for home, name in every if name == key]:
        return f"there is no such key here: it belongs under {_either(homes)}"
    if also := _ALSO_KNOWN.get(key.lower().replace("-", "_")):
        home, _, name = also.rpartition(".")
        return f"there is no such key: write {name if home == key_text(parent) else also}"
    if hint := suggestion(key, known):
        return f"there is no such key{hint}"
    if close := difflib.get_close_matches(key.lower(), [name for _, name in every], n=1, cutoff=0.75):
        meant = next(".".join((*home, name)) for home, name in every if name == close[0])
        return f"there is no such key (did you mean '{meant}'?)"
    more = "; any other option of sbatch goes under job.extra" if parent == ("job",) else ""
    return f"there is no such key: {key_text(parent) or 'a config'} has {', '.join(known)}{more}"


def model_at(root: type[BaseModel], path: KeyPath) -> type[BaseModel] | None:
    """Return the model that reads the mapping at `path`; `None` where its keys are free."""
    model: type[BaseModel] | None = root
    rows: type[BaseModel] | None = None  # of a list that is stepped into next
    for step in path:
        field = model.model_fields.get(str(step)) if model and not isinstance(step, int) else None
        model, rows = (rows if isinstance(step, int) else None), None
        if field is not None:
            model, rows = _model_in(field.annotation), _model_in_rows(field.annotation)
    return model


def _message(detail: ErrorDetails, path: KeyPath, root: type[BaseModel]) -> str:
    kind, value, context = detail["type"], detail.get("input"), detail.get("ctx", {})
    match kind:
        case "extra_forbidden":
            return unknown_key(path, root)
        case "missing":
            return _MISSING.get(str(path[-1]), "is missing")
        case "value_error" if path[:2] == ("training", "parameters") and isinstance(value, (list, tuple)):
            return "a training has one value for each parameter: write sweep: in place of training: to try several"
        case "value_error":
            return str(context["error"])
        case "greater_than_equal":
            return f"must be {context['ge']} or more, not {value}"
        case "greater_than":
            return f"must be more than {context['gt']}, not {value}"
        case "string_too_short":
            return "is an empty text: give it a value, or remove it"
        case "dict_type":
            if value is None and path and isinstance(path[-1], str):
                return "is empty: give it keys, or remove it"
            return f"a mapping is meant here, not {kind_of(value)}: write {{name: value}}"
        case _ if value is None:
            return _null(path, root)
        case "tuple_type" | "list_type":
            return f"a list is meant here, not {kind_of(value)}: {_rows_of(path, root)}"
        case "literal_error":
            return _not_one_of(str(context["expected"]), value)
        case "int_parsing" | "int_type" | "int_from_float":
            return f"a whole number is meant here, not {_given(value)}"
        case "int_parsing_size":
            return f"the number is too long to be meant: {_given(value)}"
        case "decimal_parsing" | "decimal_type" | "float_parsing" | "float_type" | "finite_number":
            return f"a number such as 3.25 is meant here, not {_given(value)}"
        case "string_type":
            return f"one value is meant here, not {kind_of(value)}"
        case "model_type" | "model_attributes_type":
            return f"a mapping of keys is meant here, not {kind_of(value)}: {_keys_of(path, root)}"
        case _:
            return f"{detail['msg'][:1].lower()}{detail['msg'][1:]}; it is {kind_of(value)}"


def _given(value: object) -> str:
    return shown(value) if isinstance(value, str) else kind_of(value)


def _keys_of(path: KeyPath, root: type[BaseModel]) -> str:
    model = model_at(root, path)
    if model is None or not path:
        return "write key: value"
    if isinstance(path[-1], int):
        return f"write {{{', '.join(f'{name}: …' for name in model.model_fields if _needed(model, name))}}}"
    first = "image" if path == ("container",) else _keys(model)[0]
    return f"write {path[-1]}: {{{first}: …}}"


def _rows_of(path: KeyPath, root: type[BaseModel]) -> str:
    row = _keys_of((*path, 0), root).removeprefix("write ")
    return f"write {path[-1]}: [{row if row.startswith('{') else '…'}]"


def _needed(model: type[BaseModel], name: str) -> bool:
    return model.model_fields[name].is_required()


def _not_one_of(expected: str, value: object) -> str:
    if not isinstance(value, str):
        return f"one of {expected} is meant here, not {kind_of(value)}"
    choices = [part.strip(" '") for part in expected.replace(" or ", ", ").split(",")]
    return f"{shown(value)} is not one of {_either(choices)}{suggestion(value, choices)}"


def _null(path: KeyPath, root: type[BaseModel]) -> str:
    """Say what to do about a null: a section left empty, or a value that is not there."""
    if len(path) == 1 and path[0] in _EMPTY:
        return _EMPTY[str(path[0])]
    if model_at(root, path) is not None:
        return "is empty: give it keys, or remove it"
    if path and isinstance(path[-1], int):
        return "is null, which is no text: quote it ('null') for the word, write '' for nothing, or remove it"
    home = path[:-1]
    if home and model_at(root, home) is None:
        return "is null, which is no text: quote it ('null') for the word, write '' for nothing, or remove it"
    return "is empty (null): give it a value, or remove it"


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the model in an annotation such as `Model | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return next((found for part in get_args(annotation) if (found := _model_in(part))), None)
    return None


def _model_in_rows(annotation: Any) -> type[BaseModel] | None:
    """Return the model of each row in an annotation such as `tuple[Model, ...]`."""
    if get_origin(annotation) is tuple:
        return _model_in(get_args(annotation)[0])
    return None


def _keys(model: type[BaseModel]) -> list[str]:
    return [name for name in model.model_fields if name not in HIDDEN]


def _every_key(model: type[BaseModel], home: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield each key of a config with the section that it stands in, outer sections first."""
    for name in _keys(model):
        yield home, name
    for name in _keys(model):
        if inner := _model_in(model.model_fields[name].annotation):
            yield from _every_key(inner, (*home, name))


def _either(words: Iterable[str]) -> str:
    listed = list(words)
    return f"{', '.join(listed[:-1])} or {listed[-1]}" if len(listed) > 1 else listed[0]
