"""What becomes of a training's metrics: figures, pictures, warnings, and a client's copy of them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from nexa_infra.errors import ConfigError
from nexa_infra.hosts.local import LocalHost
from nexa_infra.monitoring.costs import estimate_run
from nexa_infra.monitoring.measured import measure, plot_files
from nexa_infra.monitoring.plots import draw, draw_all
from nexa_infra.monitoring.report import CostReport, build_report, read_report, to_json, to_markdown, to_terminal
from nexa_infra.runs import series
from nexa_infra.runs.attempts import Attempt, TaskState
from nexa_infra.runs.record import Price, Run
from nexa_infra.runs.series import MetricsLog, Recorder
from nexa_infra.scheduling.decide import Vitals
from nexa_infra.scheduling.policies import policy_of
from nexa_infra.scheduling.slurm import mirror
from nexa_infra.scheduling.slurm.client import section, sections
from nexa_infra.scheduling.vitals import MetricsWatch
from nexa_infra.spec.load import load_config
from nexa_infra.spec.policy import Health, Objective
from nexa_infra.spec.run import TrainingConfig

PRICE = Price(
    item="cpu", unit="core-hour", usd_per_hour=Decimal("0.05"), provider="aws", source="a list", date="2026-11-23"
)


def a_run(folder: Path, **config: Any) -> Run:
    """A training's run, whose directory is in a folder."""
    asked = {"job": {"name": "t"}, "launcher": {"type": "command", "command": ["true"]}, "training": {}}
    run = Run(
        id="20261124-101203-t-a1b2",
        config=TrainingConfig.model_validate(asked | config),
        directory=str(folder / "run"),
        workdir=str(folder),
        price=PRICE,
        created_at=datetime(2026, 11, 24, tzinfo=UTC),
    )
    for place in (run.files.trial(0), run.files.status):
        place.mkdir(parents=True, exist_ok=True)
    return run


def append(run: Run, *lines: dict[str, Any]) -> None:
    with run.files.metrics_log(0).open("a") as stream:
        stream.write("".join(f"{json.dumps(line)}\n" for line in lines))


def log_of(*lines: dict[str, Any], starts: tuple[int, ...] = ()) -> MetricsLog:
    recorder = Recorder(starts)
    recorder.take("".join(f"{json.dumps(line)}\n" for line in lines).encode())
    found = recorder.log()
    assert found is not None
    return found


COURSE = log_of(
    *({"step": step, "total_steps": 30, "train_loss": 3 / step, "accuracy": step / 40} for step in range(1, 31)),
    {"step": 31, "train_loss": math.nan, "a|b `x` $y$": 7},
)


def report_of(tmp_path: Path, log: MetricsLog | None = COURSE, stalls: tuple[str, ...] = ()) -> CostReport:
    run = a_run(tmp_path)
    objective = Objective(metric="accuracy")
    measured = measure(log, stalls, health=Health(), objective=objective)
    return build_report(run, (), estimate_run(run), end="done", measured=measured)


# -- in figures


def test_a_metric_is_told_by_its_course() -> None:
    measured = measure(COURSE, (), health=Health(), objective=Objective(metric="accuracy"))
    assert measured is not None
    assert (measured.axis, measured.step, measured.total, measured.lines) == ("step", 31, 30, 31)
    loss, accuracy, _ = measured.metrics
    assert (loss.first, loss.last, loss.last_step) == (3.0, None, 31)
    assert (loss.min, loss.min_step, loss.best_step, loss.plot) == (0.1, 30, 30, "plots/train_loss.svg")
    assert (accuracy.max, accuracy.best_step, accuracy.unsound) == (0.75, 30, None)
    assert loss.unsound == "train_loss is NaN at step 31"
    assert measured.warnings == ("train_loss is NaN at step 31",)


@pytest.mark.parametrize(
    ("health", "warnings"),
    [
        (Health(), ["val.LOSS is NaN at step 1"]),
        (Health(nan="ignore"), []),
        (Health(metrics=("grad_norm",)), ["val.LOSS is NaN at step 1", "grad_norm is infinite at step 1"]),
    ],
)
def test_a_config_says_which_metrics_must_be_finite(health: Health, warnings: list[str]) -> None:
    log = log_of({"step": 1, "val": {"LOSS": math.nan}, "grad_norm": math.inf, "lossy": math.nan})
    measured = measure(log, (), health=health, objective=None)
    assert measured is not None
    assert list(measured.warnings) == warnings


def test_every_metric_has_a_file_of_its_own_with_a_plain_name() -> None:
    names = ["loss", "Loss", "val/loss", "val loss", "../../etc", "..", "é", "x" * 300]
    files = plot_files(names)
    assert list(files) == names
    assert len({name.lower() for name in files.values()}) == len(names)
    for name in files.values():
        assert (
            Path(name).parent == Path("plots") and Path(name).name.removesuffix(".svg").strip(".") and len(name) < 100
        )


# -- in the report


def test_the_report_shows_figures_warnings_and_pictures(tmp_path: Path) -> None:
    report = report_of(tmp_path, stalls=("no new line of metrics since step 3, for 60 s",))
    text = to_markdown(report)
    assert "**Warning:** train\\_loss is NaN at step 31" in text or "**Warning:** train_loss is NaN at step 31" in text
    assert "**Warning:** no new line of metrics since step 3, for 60 s" in text
    images = [
        (image.attrs["src"], image.content)
        for token in MarkdownIt("gfm-like", {"linkify": False}).parse(text)
        for image in token.children or ()
        if image.type == "image"
    ]
    assert [source for source, _ in images] == [
        "plots/train_loss.svg",
        "plots/accuracy.svg",
        "plots/a_b_x_y.svg",
    ]
    shown = to_terminal(report)
    assert "Metrics at step 31 of 30, by 31 lines" in shown
    assert "Warning: train_loss is NaN at step 31" in shown
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_pictures_are_shown_by_their_addresses_where_a_page_reaches_no_file(tmp_path: Path) -> None:
    text = to_markdown(report_of(tmp_path), {"plots/accuracy.svg": "data:image/svg+xml;base64,AAAA"})
    assert text.count("![") == 1
    assert "](data:image/svg+xml;base64,AAAA)" in text


def test_the_report_survives_json_with_metrics_and_is_as_it_was_without(tmp_path: Path) -> None:
    report = report_of(tmp_path)
    data = json.loads(to_json(report), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert [each["name"] for each in data["measured"]["metrics"]] == ["train_loss", "accuracy", "a|b `x` $y$"]
    assert read_report(to_json(report)) == report
    bare = report_of(tmp_path, None)
    assert "measured" not in json.loads(to_json(bare))
    assert "Metrics" not in to_markdown(bare) + to_terminal(bare)


# -- in pictures


def test_a_picture_shows_where_an_attempt_began_and_where_a_value_is_no_number() -> None:
    log = log_of({"step": 1, "loss": 2}, {"step": 2, "loss": math.nan}, {"step": 3, "loss": 1}, starts=(20,))
    picture = draw(log.series[0], log.marks)
    assert list(log.marks) == [("step", 2)]
    ET.fromstring(picture)
    assert ">loss</text>" in picture and ">step</text>" in picture and " NaN</text>" in picture
    assert "stroke-dasharray" in picture
    assert draw(log.series[0], log.marks) == picture
    assert "stroke-dasharray" not in draw(log.series[0])


def test_a_wide_span_is_drawn_by_orders_of_magnitude() -> None:
    (steep,) = log_of(*({"step": step, "lr": 10.0**-step} for step in range(6))).series
    (flat,) = log_of(*({"step": step, "lr": 1.0 - step / 10} for step in range(6))).series
    # Powers of ten are written with raised digits.
    assert "<tspan" in draw(steep)
    assert "<tspan" not in draw(flat)


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-(10**12), 10**12), st.floats()), min_size=1, max_size=6),
    st.text(min_size=1, max_size=12),
)
def test_whatever_a_metric_is_it_can_be_drawn(points: list[tuple[int, float]], name: str) -> None:
    if name in {*series.AXES, "steps", "epochs", "total_steps", "max_steps"}:
        return
    log = log_of(*({"step": step, name: value} for step, value in points))
    for picture in draw_all(log, plot_files([one.name for one in log.series])).values():
        ET.fromstring(picture)


def test_nothing_is_imported_for_pictures_before_one_is_drawn() -> None:
    look = "import sys, nexa_infra.operations.steps, nexa_infra.__main__; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", look]).returncode == 0


# -- while it runs


def attempts(*logged: int) -> dict[int, list[Attempt]]:
    return {0: [Attempt(0, number, 100.0, logged=size) for number, size in enumerate(logged, 1)]}


def test_each_thing_that_is_wrong_is_said_once_an_attempt(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    watch, policy = MetricsWatch(run), policy_of(run)
    append(run, {"step": 1, "loss": 1}, {"step": 2, "loss": math.nan})
    assert watch.read()
    vitals = watch.vitals(["running"], attempts(0), {})
    assert watch.warnings(vitals, policy) == ("loss is NaN at step 2",)
    append(run, {"step": 3, "loss": math.nan})
    watch.read()
    assert watch.warnings(watch.vitals(["running"], attempts(0), {}), policy) == ()
    # The next attempt is not blamed for what the last one wrote.
    size = run.files.metrics_log(0).stat().st_size
    assert watch.vitals(["running"], attempts(0, size), {}).unsound == {}
    append(run, {"step": 2, "loss": math.nan})
    watch.read()
    assert watch.warnings(watch.vitals(["running"], attempts(0, size), {}), policy) == ("loss is NaN at step 2",)


def test_an_attempt_that_was_over_before_is_not_held_against_the_run(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    append(run, {"step": 1, "loss": math.nan})
    size = run.files.metrics_log(0).stat().st_size
    watch = MetricsWatch(run)
    watch.read()
    # It is resumed: what the scheduler says first is of the attempt before.
    for state in ("cancelled", "interrupted", "pending"):
        assert watch.vitals([state], attempts(0), {}).unsound == {}
    assert watch.vitals(["running"], attempts(0), {0: TaskState(2, "RUNNING")}) == Vitals()
    assert watch.vitals(["running"], attempts(0, size), {}).unsound == {}
    append(run, {"step": 2, "loss": math.nan})
    watch.read()
    assert watch.vitals(["running"], attempts(0, size), {}).unsound == {"loss": "loss is NaN at step 2"}


def test_a_stall_counts_from_the_last_line_or_the_start_and_only_while_the_trial_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path, health={"stalled_after": "00:01:00"})
    policy = policy_of(run)
    assert (policy.nan, policy.silence, policy.stalled) == ("warn", 60.0, "warn")
    now = 1000.0
    monkeypatch.setattr("nexa_infra.scheduling.vitals.time.monotonic", lambda: now)
    watch = MetricsWatch(run)

    def silent(state: str = "running", *logged: int) -> float | None:
        watch.read()
        return watch.vitals([state], attempts(*(logged or (0,))), {}).silent

    assert watch.vitals(["pending"], {}, {}).silent is None
    assert silent() == 0
    now += 50
    assert silent() == 50
    append(run, {"step": 1, "loss": 1})
    assert silent() == 0
    now += 61
    assert silent() == 61
    told = "no new line of metrics since step 1, for 60 s"
    vitals = watch.vitals(["running"], attempts(0), {})
    assert watch.warnings(vitals, policy) == (told,)
    now += 5
    assert watch.warnings(watch.vitals(["running"], attempts(0), {}), policy) == ()
    assert run.files.stalls.read_text() == f"{told}\n"
    # Neither the time in the queue nor an earlier attempt's silence counts.
    assert silent("pending", 0) is None
    now += 500
    assert silent("running", 0, 20) == 0


# -- a client's copy


def exchange(there: Run, here: Run, most: int = 40) -> bool:
    """Bring a piece as a poll does; both directories are on this machine."""
    held = mirror.held_of(here)
    script = f"cd -- '{there.directory}' || exit 66\n{section('log', mirror.log_piece(held, most))}"
    found = sections(LocalHost().script(script).stdout)
    return mirror.keep_log(here, held, found["log"][0])


def test_a_copy_of_the_log_grows_by_pieces_and_holds_each_byte_once(tmp_path: Path) -> None:
    there, here = a_run(tmp_path / "there"), a_run(tmp_path / "here")
    assert not exchange(there, here), "there is no log yet"
    data = bytes(range(256)) + b"==nexa queue 0==\n" * 9
    there.files.metrics_log(0).write_bytes(data)
    pieces = 1
    while exchange(there, here):
        pieces += 1
    assert pieces > 5
    assert here.files.metrics_log(0).read_bytes() == data
    assert not exchange(there, here)
    # An answer that comes twice, as of two clients that asked at once, is kept once.
    there.files.metrics_log(0).write_bytes(data + b"more\n")
    script = f"cd -- '{there.directory}'\n{section('log', mirror.log_piece(len(data), 100))}"
    told = sections(LocalHost().script(script).stdout)["log"][0]
    mirror.keep_log(here, len(data), told)
    mirror.keep_log(here, len(data), told)
    assert here.files.metrics_log(0).read_bytes() == data + b"more\n"


def test_a_log_that_was_begun_anew_there_is_brought_anew(tmp_path: Path) -> None:
    there, here = a_run(tmp_path / "there"), a_run(tmp_path / "here")
    there.files.metrics_log(0).write_bytes(b"a long log\n")
    exchange(there, here)
    there.files.metrics_log(0).write_bytes(b"short\n")
    assert exchange(there, here)
    assert not exchange(there, here)
    assert here.files.metrics_log(0).read_bytes() == b"short\n"


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_what_is_no_file_there_is_not_brought(tmp_path: Path, kind: str) -> None:
    there, here = a_run(tmp_path / "there"), a_run(tmp_path / "here")
    path = there.files.metrics_log(0)
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
    assert not exchange(there, here)
    assert not here.files.metrics_log(0).exists()


# -- what a config says


def complaints(tmp_path: Path, text: str) -> str:
    (tmp_path / "c.yaml").write_text(f"launcher: {{type: command, command: [echo]}}\n{text}\n")
    with pytest.raises(ConfigError) as wrong:
        load_config(tmp_path / "c.yaml")
    return str(wrong.value)


def test_health_is_read_and_its_faults_are_told(tmp_path: Path) -> None:
    text = (
        "launcher: {type: command, command: [echo]}\ntraining: {}\nhealth: {stalled_after: 00:10:00, metrics: [acc]}\n"
    )
    (tmp_path / "c.yaml").write_text(text)
    config = load_config(tmp_path / "c.yaml")
    assert isinstance(config, TrainingConfig)
    health = config.health
    assert (health.nan, health.stalled, health.silence, health.metrics) == ("warn", "warn", 600.0, ("acc",))
    assert Health().silence is None and Health(stalled_after="UNLIMITED").silence is None
    told = complaints(tmp_path, "training: {}\nhealth: {nan: stopp, stalled_after: 10x, metrics: acc}")
    assert "health.nan: 'stopp' is not one of warn, stop or ignore (did you mean 'stop'?)" in told
    assert "health.stalled_after: '10x' is not a walltime" in told
    assert "health.metrics: a list is meant here" in told
    assert "health: goes with training" in complaints(tmp_path, "sweep: {parameters: {n: [1, 2]}}\nhealth: {nan: stop}")
