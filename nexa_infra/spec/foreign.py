"""Configs of other tools, known by their keys: whose it is, and what to write here instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nexa_infra.spec.compose import Finding
from nexa_infra.spec.fields import flow_list


@dataclass(frozen=True)
class _Tool:
    """A tool's file: the keys that tell it (all of one set, the first of which is shown), and the way over."""

    name: str
    told_by: tuple[frozenset[str], ...]
    instead: str


def _keys(*names: str) -> frozenset[str]:
    return frozenset(names)


_TOOLS = (
    _Tool(
        "a Hydra config",
        (_keys("defaults"), _keys("hydra")),
        "write what hydra.sweeper.params sweeps as sweep: {parameters: {lr: [1e-3, 1e-4]}}, and the program, "
        "which may go on using Hydra, as launcher: {script: train.py, argument_style: name=value}",
    ),
    _Tool(
        "a Weights & Biases sweep file",
        (
            _keys("method", "parameters"),
            _keys("method", "program"),
            _keys("program", "parameters"),
            _keys("method", "metric"),
        ),
        "",
    ),
    _Tool(
        "a SkyPilot task",
        (_keys("resources", "run"), _keys("resources", "setup"), _keys("num_nodes", "run")),
        "write resources as job: {gpu_type: h100, gpus_per_node: 8}, setup as job: {setup: {lines: [...]}}, "
        "run as launcher: {script: train.py}",
    ),
    _Tool(
        "an Optuna study's config",
        (_keys("study_name"), _keys("search_space"), _keys("n_trials", "direction"), _keys("n_trials", "sampler")),
        "list the values to try under sweep: {parameters: {lr: [1e-3, 1e-4]}}, and write the goal as "
        "objective: {metric: accuracy, goal: max}",
    ),
    _Tool(
        "a Ray cluster or job file",
        (
            _keys("cluster_name", "provider"),
            _keys("available_node_types"),
            _keys("entrypoint", "runtime_env"),
            _keys("tune_config"),
            _keys("param_space"),
        ),
        "write the entry point as launcher: {script: train.py}, the search space as "
        "sweep: {parameters: {lr: [1e-3, 1e-4]}}",
    ),
    _Tool(
        "a Kubernetes manifest",
        (_keys("apiVersion", "kind"),),
        "write the command as launcher: {script: train.py}, the resources under job:, the points under sweep:",
    ),
    _Tool(
        "Prefect's own prefect.yaml",
        (_keys("deployments"), _keys("prefect-version")),
        "name the config that the deployment's config_file parameter holds",
    ),
)

SHELL_SCRIPT = (
    "is a shell script, not a config: what its #SBATCH lines ask goes under job: (--time under job: {time: …}), "
    "its command under launcher: {script: train.py}, its array under sweep: {parameters: …}"
)


def foreign(data: Mapping[str, Any]) -> Finding | None:
    """Say whose config this is, if it is another tool's; `None` for one of ours, right or wrong."""
    if "launcher" in data and data.keys() & {"sweep", "training"}:
        return None
    for tool in _TOOLS:
        for keys in tool.told_by:
            if keys <= data.keys():
                told = " and ".join(f"{key}:" for key in data if key in keys)
                instead = tool.instead or _from_wandb(data)
                first = next(key for key in data if key in keys)
                return Finding((first,), f"this is {tool.name} ({told}), which is not read here: {instead}")
    return None


def _from_wandb(data: Mapping[str, Any]) -> str:
    """Write a W&B sweep the way it is written here, as far as its values are listed."""
    program = data.get("program")
    parameters = data.get("parameters")
    axes = []
    for name, axis in parameters.items() if isinstance(parameters, Mapping) else ():
        values = axis.get("values", [axis.get("value")]) if isinstance(axis, Mapping) else None
        known = isinstance(values, list) and values and all(isinstance(value, str) for value in values)
        axes.append(f"{name}: {flow_list(values) if known and values else '[list, its, values]'}")
    metric = data.get("metric")
    name = metric.get("name") if isinstance(metric, Mapping) else None
    goal = str(metric.get("goal", "minimize"))[:3] if isinstance(metric, Mapping) else "min"
    objective = f", objective: {{metric: {name}, goal: {goal}}}" if isinstance(name, str) else ""
    told = ", ".join(axes[:6]) + ", …" * (len(axes) > 6)
    return (
        f"write launcher: {{script: {program if isinstance(program, str) else 'train.py'}}}, "
        f"sweep: {{parameters: {{{told or 'lr: [1e-3, 1e-4]'}}}}}{objective}"
    )
