"""What MLflow's and W&B's libraries read from a trial's environment, as bash of the array script.

MLflow: `mlflow.environment_variables`, and `mlflow.tracking.context.system_environment_context` for
MLFLOW_RUN_CONTEXT, whose tags a run gets that the program starts. W&B: `wandb.env` and `wandb.sdk.wandb_settings`;
its config comes in the file that WANDB_SWEEP_PARAM_PATH names, as from W&B's own agents, because WANDB_CONFIG_PATHS
ends every program under the library's releases with pydantic ("not allowed as a Sequence value").
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from nexa_infra.hosts.shell import quote_line

if TYPE_CHECKING:
    from nexa_infra.spec.fields import Value
    from nexa_infra.spec.run import SweepConfig, TrainingConfig
    from nexa_infra.spec.sweep import Point
    from nexa_infra.spec.tracking import MlflowTracking, WandbTracking

# A run's id in W&B has 64 characters at the most; a trial's number and a dash need these.
_FOR_TRIAL = 8
_INTEGER = re.compile(r"-?(?:0|[1-9][0-9]*)")
_FLOAT = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?")

# The script's own variables.
_TRIAL, _ATTEMPT, _FOLDER = "$nexa_trial", "$nexa_attempt", "$nexa_trial_dir"


def tracking_lines(config: SweepConfig | TrainingConfig, run_id: str) -> Iterator[str]:
    """Yield the lines of bash that tell a trial's program where to log, and as what."""
    tracking = config.tracking
    if tracking is None:
        return
    if tracking.mlflow is not None:
        yield from _mlflow(tracking.mlflow, config, run_id)
    if tracking.wandb is not None:
        yield from _wandb(tracking.wandb, config, run_id)


def trial_name(config: SweepConfig | TrainingConfig, trial: int) -> str:
    """Return what a trial's run is called in a tracker."""
    return config.job.name if config.kind == "training" else f"{config.job.name}-{trial}"


def experiment_name(config: SweepConfig | TrainingConfig, mlflow: MlflowTracking) -> str:
    """Return the name of the experiment that holds a run's trials."""
    return mlflow.experiment or config.job.name


def tags_of(config: SweepConfig | TrainingConfig) -> dict[str, str]:
    """Return MLflow's tags of each of a run's trials, as far as they are asked for."""
    labels = {"nexa.tags": ", ".join(config.trials.tags)} if config.trials.tags else {}
    return {**(config.tracking.tags if config.tracking else {}), **labels}


def store_variables(uri: str) -> dict[str, str]:
    """Return what MLflow has to be told of a store of one's own, here as in a trial."""
    if uri.startswith("file:"):
        # Without it MLflow 3 refuses a store of files, which somebody has asked for here.
        return {"MLFLOW_ALLOW_FILE_STORE": "true"}
    if uri.startswith("sqlite:"):
        # Artifacts go beside the database: by itself MLflow puts them into the folder that a program is in.
        folder = PurePosixPath(urlsplit(uri).path[1:]).parent / "mlruns"
        return {"_MLFLOW_SERVER_ARTIFACT_ROOT": folder.as_uri()}
    return {}


def config_entries(point: Point) -> str:
    """Return bash that adds a point to `nexa_config`, the entries of W&B's config."""
    entries = [f', {_yaml_text(name)}: {{"value": {_yaml(value)}}}' for name, value in point]
    return f"nexa_config+=({' '.join(map(quote_line, entries))})" if entries else ""


def _mlflow(mlflow: MlflowTracking, config: SweepConfig | TrainingConfig, run_id: str) -> Iterator[str]:
    yield _export("MLFLOW_TRACKING_URI", mlflow.uri)
    yield from (_export(name, value) for name, value in store_variables(mlflow.uri).items())
    yield _export("MLFLOW_EXPERIMENT_NAME", experiment_name(config, mlflow))
    tags = json.dumps({**tags_of(config), "nexa.run": run_id})[:-1]
    name = (f'"{config.job.name}-', _TRIAL, '"') if config.kind == "sweep" else (json.dumps(config.job.name),)
    own = ('"nexa.trial": "', _TRIAL, '", "nexa.attempt": "', _ATTEMPT, '", "mlflow.runName": ', *name)
    yield _export("MLFLOW_RUN_CONTEXT", f"{tags}, ", *own, "}")


def _wandb(wandb: WandbTracking, config: SweepConfig | TrainingConfig, run_id: str) -> Iterator[str]:
    labels = [*config.trials.tags, *(config.tracking.labels if config.tracking else ())]
    asked = {
        "WANDB_PROJECT": wandb.project,
        "WANDB_ENTITY": wandb.entity,
        "WANDB_MODE": wandb.mode,
        "WANDB_RUN_GROUP": wandb.group or run_id,
        "WANDB_JOB_TYPE": config.kind,
        "WANDB_TAGS": ",".join(labels) or None,
    }
    yield from (_export(name, value) for name, value in asked.items() if value is not None)
    yield _export("WANDB_NAME", *((f"{config.job.name}-", _TRIAL) if config.kind == "sweep" else (config.job.name,)))
    # A later attempt goes on in the same run of W&B's.
    yield _export("WANDB_RUN_ID", f"{run_id[_FOR_TRIAL - 64 :].lstrip('-')}-", _TRIAL)
    yield _export("WANDB_RESUME", "allow")
    yield _export("WANDB_DIR", _FOLDER)
    yield _export("WANDB_SWEEP_PARAM_PATH", _FOLDER, "/wandb-config.yaml")
    yield 'printf \'{"wandb_version": 1%s}\\n\' "${nexa_config[*]-}" >"$WANDB_SWEEP_PARAM_PATH" || return'


def _export(name: str, *parts: str) -> str:
    words = [f'"{part}"' if part in {_TRIAL, _ATTEMPT, _FOLDER} else quote_line(part) for part in parts]
    return f"export {name}={''.join(words)}"


def _yaml(value: Value) -> str:
    """Return a value that a reader of YAML 1.1 takes for what it is: to it `1e-4` is a text, and `1.0e-4` a number."""
    if not isinstance(value, str):
        return json.dumps(value)
    if _INTEGER.fullmatch(value):
        return value
    digits, e, exponent = repr(float(value)).partition("e") if _FLOAT.fullmatch(value) else ("inf", "", "")
    if digits.endswith("inf"):
        return _yaml_text(value)
    return f"{digits}{'' if '.' in digits else '.0'}{e}{exponent}"


def _yaml_text(text: str) -> str:
    # As JSON, but that YAML joins no surrogate pairs.
    return '"' + "".join(rf"\U{ord(c):08x}" if ord(c) > 0xFFFF else json.dumps(c)[1:-1] for c in text) + '"'
