"""Configs that work, and what reaches the models from them."""

from __future__ import annotations

import time
from decimal import Decimal
from pathlib import Path

import pytest

from nexa_infra.spec.load import load_config, read_config
from nexa_infra.spec.run import SweepConfig, TrainingConfig, config_of

# The config of the design, as it stands there.
SAMPLE = """\
job: {name: t, partition: gpu, time: "08:00:00", gpus_per_node: 4, array_parallelism: 2, gpu_type: rtx_5090, cost_per_gpu_hour: 3.25}
sweep: {base_args: [--epochs, "2"], parameters: {learning_rate: [2e-5, 1e-5], batch_size: [8, 16]}}
launcher: {type: torchrun, script: train.py, extra_args: [--standalone]}
objective: {metric: accuracy, goal: max}
"""  # noqa: E501


@pytest.fixture(autouse=True)
def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.py").touch()
    monkeypatch.chdir(tmp_path)


def sweep_of(text: str) -> SweepConfig:
    Path("c.yaml").write_text(text)
    config = load_config("c.yaml")
    assert isinstance(config, SweepConfig)
    return config


def values_of(yaml: str) -> tuple[object, ...]:
    return sweep_of(f"launcher: {{script: train.py}}\nsweep:\n  parameters:\n    x: {yaml}\n").sweep.parameters["x"]


def test_the_sample_of_the_design_works_as_it_stands() -> None:
    config = sweep_of(SAMPLE)
    assert config.job.time == "08:00:00"
    assert config.job.gpus == 4
    assert config.job.gpu == "rtx_5090"
    assert config.job.cost_per_gpu_hour == Decimal("3.25")
    assert len(config.sweep) == 4
    assert config.launcher.argv(config.sweep.base_args, config.sweep.parameters_of(1)) == [
        "torchrun", "--standalone", "train.py", "--epochs", "2", "--learning_rate", "2e-5", "--batch_size", "16",
    ]  # fmt: skip
    assert config.objective is not None
    assert config.objective.goal == "max"


def test_a_training_is_one_trial() -> None:
    Path("c.yaml").write_text(
        "launcher: {script: train.py}\ntraining: {args: [-v], parameters: {lr: 1e-3, fast: true}}\n"
    )
    config = load_config("c.yaml")
    assert isinstance(config, TrainingConfig)
    assert config.launcher.argv(config.trials.base_args, config.trials.parameters_of(0)) == [
        "python3", "train.py", "-v", "--lr", "1e-3", "--fast",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["training: {}", "training: {tags: [a]}"])
def test_a_training_needs_no_arguments(text: str) -> None:
    Path("c.yaml").write_text(f"launcher: {{script: train.py}}\n{text}\n")
    assert len(load_config("c.yaml").trials) == 1


@pytest.mark.parametrize(
    "written",
    ["1e-4", "010", "yes", "No", "on", "0x1F", "0o17", "1_000", "+1", ".5", "1.", ".inf", ".NaN", "2024-01-01",
     "12:30:45", "1.10", "é", "nullish", "truely", "=", "--x"],
)  # fmt: skip
def test_a_value_stays_as_it_is_written(written: str) -> None:
    assert values_of(f"[{written}]") == (written,)
    assert values_of(f"\n      - {written}") == (written,)


@pytest.mark.parametrize(
    ("yaml", "value"),
    [
        ("true", True), ("True", True), ("TRUE", True), ("false", False), ("FALSE", False),
        ('"true"', "true"), ("'false'", "false"), ("tRUE", "tRUE"),
        ("null", None), ("~", None), ("Null", None), ('"null"', "null"), ('""', ""), ("'~'", "~"),
        ('"a\\nb\\t\\u00e9"', "a\nb\té"), ("'it''s'", "it's"), ("\"1e-4\"", "1e-4"),
    ],
)  # fmt: skip
def test_only_true_false_and_null_are_more_than_text(yaml: str, value: object) -> None:
    (found,) = values_of(f"[{yaml}]")
    assert found == value
    assert type(found) is type(value)


def test_an_empty_item_is_null_and_a_block_keeps_its_lines() -> None:
    assert values_of("\n      -\n      - |\n        a\n         b\n      - >-\n        c\n        d") == (
        None,
        "a\n b\n",
        "c d",
    )


def test_a_word_in_a_list_of_arguments_stays_the_word() -> None:
    config = sweep_of(
        "launcher: {script: train.py, extra_args: [-X, true]}\n"
        "sweep: {base_args: [--flag, True, 010], parameters: {x: [1]}}\n"
        "job: {env: {A: true, B: 1e-3, C: '', D: no}}\n"
    )
    assert config.launcher.extra_args == ("-X", "true")
    assert config.sweep.base_args == ("--flag", "True", "010")
    assert config.job.env == {"A": "true", "B": "1e-3", "C": "", "D": "no"}


def test_numbers_of_the_job_are_numbers() -> None:
    config = sweep_of(
        "job: {nodes: 2, cpus_per_task: '4', gpus_per_node: 0, cost_per_core_hour: 0.05}\nsync: {untracked: false}\n"
        "launcher: {script: train.py}\nsweep: {parameters: {x: [1]}}\n"
        "budget: {limit_usd: 10}\nretry: {times: 1, on: [oom]}\n"
    )
    assert (config.job.nodes, config.job.cpus_per_task, config.job.gpus_per_node) == (2, 4, 0)
    assert config.job.cost_per_core_hour == Decimal("0.05")
    assert config.budget.limit_usd == Decimal(10)
    assert config.sync.untracked is False
    assert config.retry.on == ("oom",)


def test_colons_inside_flow_collections_are_text() -> None:
    config = sweep_of(
        "job: {time: 08:00:00, extra: {licenses: fluent:2}}\ncontainer: {image: repo/img:tag}\n"
        "launcher: {script: train.py}\nsweep: {parameters: {x: [a:b, 1:2]}}\n"
    )
    assert config.job.time == "08:00:00"
    assert config.job.extra == {"licenses": "fluent:2"}
    assert config.container is not None
    assert config.container.image == "repo/img:tag"
    assert config.sweep.parameters["x"] == ("a:b", "1:2")


def test_anchors_and_aliases_are_followed() -> None:
    config = sweep_of(
        "launcher: {script: train.py}\n"
        "job: {name: &n shared, env: &e {A: b}}\n"
        "sweep:\n  tags: [*n]\n  env: *e\n  parameters:\n    lr: &axis [1e-3, 1e-4]\n    wd: *axis\n"
    )
    assert config.sweep.tags == ("shared",)
    assert config.sweep.env == config.job.env == {"A": "b"}
    assert config.sweep.parameters["wd"] == ("1e-3", "1e-4")


def test_a_byte_order_mark_line_ends_of_windows_and_comments_do_no_harm() -> None:
    text = "# réglage\r\nlauncher: {script: train.py} # here\r\n\r\nsweep: {parameters: {x: [é]}}\r\n"
    Path("c.yaml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_config("c.yaml").trials.parameters_of(0) == {"x": "é"}


def test_json_is_yaml() -> None:
    config = sweep_of('{"launcher": {"script": "train.py"}, "sweep": {"parameters": {"x": ["1", 2, true, null]}}}')
    assert config.sweep.parameters["x"] == ("1", "2", True, None)


def test_the_order_of_the_axes_is_that_of_the_file() -> None:
    config = sweep_of("launcher: {script: train.py}\nsweep: {parameters: {z: [1, 2], a: [3, 4]}}\n")
    assert [config.sweep.parameters_of(trial) for trial in range(4)] == [
        {"z": "1", "a": "3"}, {"z": "1", "a": "4"}, {"z": "2", "a": "3"}, {"z": "2", "a": "4"},
    ]  # fmt: skip


def test_a_config_survives_its_record() -> None:
    Path("c.yaml").write_text(SAMPLE)
    for config in (load_config("c.yaml"), read_config("c.yaml", ["job.extra.exclusive=true", "sweep.tags=[a, b]"])):
        assert type(config).model_validate_json(config.model_dump_json()) == config
        assert config_of(config.model_dump(mode="json")) == config


def test_ten_thousand_listed_trials_load_soon() -> None:
    rows = "".join(f"    - {{lr: {number}e-4, wd: 0.1, bs: 16, opt: adam}}\n" for number in range(10_000))
    started = time.monotonic()
    config = sweep_of(f"launcher: {{script: train.py}}\nsweep:\n  trials:\n{rows}")
    assert time.monotonic() - started < 5  # 0.4 s on an idle core
    assert len(config.sweep) == 10_000
    assert config.sweep.parameters_of(9_999)["lr"] == "9999e-4"


def test_a_character_in_two_halves_as_json_writes_it_is_one_character() -> None:
    asked = sweep_of('launcher: {type: command, command: [echo, "\\ud834\\udd1e"]}\nsweep: {parameters: {n: [1, 2]}}\n')
    assert asked.launcher.command == ("echo", "\U0001d11e")
