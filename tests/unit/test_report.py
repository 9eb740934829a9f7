"""The cost report: what it holds, and how it reads."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from rich.cells import cell_len

from nexa_infra.monitoring.estimates import estimate_run
from nexa_infra.monitoring.report import (
    CostReport,
    build_report,
    read_report,
    to_json,
    to_markdown,
    to_table,
    to_terminal,
)
from nexa_infra.monitoring.report_model import LEFT_OUT, ImageUsed, Polling
from nexa_infra.monitoring.report_text import escape, money, quantity, ranges, rate, shorten, wrap
from nexa_infra.monitoring.spending import price_trials
from nexa_infra.operations import steps
from nexa_infra.runs.attempts import Attempt, TrialState
from nexa_infra.runs.prices import Price
from nexa_infra.runs.record import Run, Snapshot
from nexa_infra.runs.results import Trial
from nexa_infra.spec.run import SweepConfig
from nexa_infra.spec.sweep import trial_hash

GOLDEN = Path(__file__).parent.parent / "golden"
CPU = Price(
    item="cpu",
    unit="core-hour",
    usd_per_hour=Decimal("0.0529"),
    provider="aws",
    source="AWS m8i.large us-east-1 / 2 vCPU, skypilot-catalog v8 aws/vms.csv",
    date="2026-11-23",
)
GRID = {"learning_rate": ["0.001", "0.01", "0.1"], "width": ["32", "64"], "epochs": ["10", "20"]}
TAILS = {
    3: 'Traceback (most recent call last):\n  File "train.py", line 12, in <module>\nValueError: NaN | infinity\n',
    9: "epoch 1\repoch 2\repoch 3\n\x1b[31mKilled\x1b[0m\n",
}

ENDS = {"preempted": 1, "failed": 2}


def a_run(price: Price = CPU, directory: str = "/home/ada/digits/.nexa/runs", **config: Any) -> Run:
    asked = {
        "job": {"name": "digits", "time": "10"},
        "launcher": {"script": "train.py"},
        "sweep": {"parameters": GRID},
        "objective": {"metric": "accuracy"},
    }
    name = "20261124-101203-digits-a1b2"
    return Run(
        id=name,
        config=SweepConfig.model_validate(asked | config),
        directory=f"{directory}/{name}",
        workdir="/home/ada/digits/.nexa",
        price=price,
        snapshot=Snapshot(
            hash="0" * 16, path="/s", root="/r", files=3, size=9, commit="1a2b3c4d" * 5, branch="main", dirty=True
        ),
        created_at=datetime(2026, 11, 24, 10, 12, 3, tzinfo=UTC),
        labels={"flow_run_url": "http://127.0.0.1:4200/runs/flow-run/0b8e54d2-6f1c-4ad7-9d5c-8d5ee4b0a111"},
    )


def a_trial(
    run: Run,
    index: int,
    state: TrialState = "completed",
    *,
    seconds: float | None = 2.0,
    exit_code: int = 0,
    metrics: Mapping[str, Any] | None = None,
) -> Trial:
    parameters = run.config.trials.parameters_of(index)
    attempt = Attempt(index, 1, 100.0, "here", None if seconds is None else 100.0 + seconds, exit_code)
    return Trial(index, trial_hash(parameters), parameters, state, (attempt,), metrics=metrics or {})


def twelve(run: Run) -> tuple[Trial, ...]:
    """Twelve trials, of which two failed."""
    codes = {3: 1, 9: 137}
    trials = [
        a_trial(
            run,
            index,
            "failed" if index in codes else "completed",
            seconds=2 + index / 8,
            exit_code=codes.get(index, 0),
            metrics={} if index in codes else {"accuracy": 0.85 + 0.011 * (index * 7 % 12), "loss": 0.4},
        )
        for index in range(12)
    ]
    return price_trials(run, trials)


def the_report() -> CostReport:
    run = a_run()
    estimate = estimate_run(run, [2.0, 2.5, 3.0])
    return build_report(
        run, twelve(run), estimate, end="failed", reason="trials 3 and 9", stderr_tails=TAILS, ends=ENDS
    )


def report_of(run: Run, *trials: Trial, **how: Any) -> CostReport:
    return build_report(run, price_trials(run, trials), estimate_run(run), **{"end": "done"} | how)


def tables(markdown: str) -> list[list[list[str]]]:
    """Read Markdown's tables back with a parser of GitHub's dialect: rows of cells."""
    found: list[list[list[str]]] = []
    for token in MarkdownIt("gfm-like", {"linkify": False}).parse(markdown):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and found and token.map is not None and token.level > 2:
            found[-1][-1].append("".join(child.content for child in token.children or ()))
    return found


@pytest.mark.parametrize(("form", "name"), [(to_markdown, "md"), (to_terminal, "txt"), (to_json, "json")])
def test_the_report_of_twelve_trials_reads_as_the_golden_file(form: Any, name: str) -> None:
    assert form(the_report()) == (GOLDEN / f"cost_report.{name}").read_text(encoding="utf-8")


def test_the_same_run_reads_the_same_twice_and_survives_json() -> None:
    report = the_report()
    assert to_json(report) == to_json(the_report())
    # What only a training, a container or an extension has is left out where there is none of it.
    assert list(json.loads(to_json(report))) == [each.name for each in fields(CostReport) if each.name not in LEFT_OUT]
    again = read_report(to_json(report))
    assert to_json(again) == to_json(report)
    assert to_markdown(again) == to_markdown(report)


def test_the_image_is_named_by_its_digest_and_as_it_was_asked_for() -> None:
    digest = "sha256:" + "ab" * 32
    image = f"registry.example.org/lab/train@{digest}"
    used = ImageUsed(image=image, digest=digest, asked="registry.example.org/lab/train:1.2", runtime="apptainer")
    report = replace(the_report(), image=used)
    told = f"{image}, asked for as registry.example.org/lab/train:1.2, by apptainer"
    assert ["Image", told] in tables(to_markdown(report))[0]
    assert "registry.example.org/lab/train:1.2, by apptainer" in to_terminal(report)
    assert digest in to_terminal(report).split()
    assert json.loads(to_json(report))["image"] == asdict(used)
    # A file's path says nothing of what is in it.
    file = ImageUsed(image="/images/train.sif", digest=digest, asked="/images/train.sif", runtime="apptainer")
    markdown = to_markdown(replace(report, image=file))
    assert ["Image", f"/images/train.sif ({digest}), by apptainer"] in tables(markdown)[0]


def test_bad_ends_are_told_apart_the_most_frequent_first() -> None:
    ends = {"failed": 1, "deadline": 1, "node_fail": 2, "timeout": 3, "out_of_memory": 4, "preempted": 1_000, "odd": 1}
    told = (
        "1,000 preemptions, 4 out of memory, 3 timeouts, 2 node crashes, 1 missed deadline, "
        "1 error of the program itself, 1 odd"
    )
    report = report_of(a_run(), end="unfinished", ends=ends)
    assert json.loads(to_json(report))["ends"] == ends
    assert ["Ended badly", told] in tables(to_markdown(report))[0]
    assert "Ended badly 1,000 preemptions, 4 out of memory, 3 timeouts" in to_terminal(report)
    well = report_of(a_run())
    assert json.loads(to_json(well))["ends"] == {}
    assert "Ended badly" not in to_markdown(well) + to_terminal(well)


def test_every_attempt_that_ended_badly_counts_and_nobody_else_ended_one_on_this_machine(tmp_path: Path) -> None:
    run = a_run(directory=str(tmp_path))
    first = Attempt(0, 1, 100.0, "here", None, None)
    late = Attempt(1, 1, 100.0, "here", 160.0, 143, "TERM", cause="timeout")
    done = [replace(a_trial(run, n).attempts[0], number=2) for n in range(2)]
    failed = [Attempt(2, number, 100.0, "here", 101.0, 1) for number in (1, 2, 3)]
    trials = [
        replace(a_trial(run, 0), attempts=(first, done[0])),
        replace(a_trial(run, 1), attempts=(late, done[1])),
        replace(a_trial(run, 2, "failed"), attempts=tuple(failed)),
        a_trial(run, 3),
    ]
    report = steps.build(run, price_trials(run, trials))
    assert list(report.ends.items()) == [("failed", 3), ("interrupted", 1), ("timeout", 1)]
    assert report.polls is None


def test_what_the_scheduler_was_asked_is_told_where_it_was_asked() -> None:
    polls = Polling(30.0, {"polls": 120, "squeue": 61, "shared": 59, "sacct": 2})
    told = "every 30 s at the least: 120 polls, 61 squeue calls (59 answers shared with other runs), 2 sacct"
    report = report_of(a_run(), polls=polls)
    assert json.loads(to_json(report))["polls"] == {"period": 30.0, "calls": dict(polls.calls)}
    assert read_report(to_json(report)) == report
    assert ["Polls", told] in tables(to_markdown(report))[0]
    assert "Polls       every 30 s at the least: 120 polls, 61 squeue calls" in to_terminal(report)
    alone = report_of(a_run(), polls=Polling(0.5, {"polls": 1, "squeue": 1}))
    assert "every 0.5 s at the least: 1 poll, 1 squeue call |" in to_markdown(alone)
    assert "polls" not in json.loads(to_json(report_of(a_run())))


def test_a_report_is_built_from_what_has_no_more_than_a_runs_attributes() -> None:
    run = a_run()
    data = json.loads(run.model_dump_json())
    spoken = json.loads(json.dumps(data), object_hook=lambda each: SimpleNamespace(**each))
    spoken.kind, spoken.trials, spoken.labels = "sweep", run.trials, run.labels
    spoken.created_at, spoken.price.usd_per_hour = run.created_at, run.price.usd_per_hour
    spoken.price = Price(**vars(spoken.price))
    spoken.config.checkpoint.most_requeues = 0
    for name in ("walltime", "gpus", "cores"):
        setattr(spoken.config.job, name, getattr(run.config.job, name))
    estimate = estimate_run(spoken, [2.0, 2.5, 3.0])
    trials = price_trials(spoken, [replace(each, usd=None) for each in twelve(run)])
    report = build_report(
        spoken, trials, estimate, end="failed", reason="trials 3 and 9", stderr_tails=TAILS, ends=ENDS
    )
    assert report == the_report()


def test_the_sums_are_those_of_the_trials() -> None:
    run = a_run()
    report, trials = the_report(), twelve(run)
    seconds = sum((Decimal(str(trial.seconds)) for trial in trials), Decimal(0))
    assert report.actual_usd is not None
    assert abs(report.actual_usd - seconds * CPU.usd_per_hour / 3600) < Decimal("1e-20")
    assert abs((report.actual_unit_hours or 0) - seconds / 3600) < Decimal("1e-20")
    assert report.wasted_usd == (trials[3].usd or 0) + (trials[9].usd or 0)
    assert report.wasted_share == pytest.approx(float(report.wasted_usd / report.actual_usd))
    assert report.usd_per_trial_mean == report.actual_usd / 12
    assert (report.trials, report.states, report.attempts) == (12, {"completed": 10, "failed": 2}, 12)
    assert report.projected.ceiling_usd == 2 * CPU.usd_per_hour


def test_the_best_come_first_by_the_objective_and_the_dearest_by_cost() -> None:
    report = the_report()
    values = [trial.metric for trial in report.best]
    assert len(values) == 10
    assert values == sorted(values, key=lambda value: -(value or 0))
    assert report.best[0].metric_per_usd == pytest.approx((values[0] or 0) / float(report.best[0].usd or 0))
    costs = [trial.usd for trial in report.dearest]
    assert costs == sorted(costs, key=lambda usd: -(usd or 0))
    assert report.dearest[0].index == 11


def test_where_less_is_better_the_least_comes_first_and_no_metric_per_dollar_is_told() -> None:
    run = a_run(objective={"metric": "loss", "goal": "min"})
    report = report_of(run, *(a_trial(run, n, metrics={"loss": loss}) for n, loss in enumerate([0.3, 0.1, 0.2])))
    assert [trial.index for trial in report.best] == [1, 2, 0]
    assert {trial.metric_per_usd for trial in report.best} == {None}
    assert "Per USD" not in to_markdown(report)


def test_trials_without_a_usable_metric_are_left_out_and_counted() -> None:
    run = a_run()
    odd: list[object] = [float("nan"), float("inf"), "0.9", None, True, [1], 10**400]
    trials = [a_trial(run, n, metrics={"accuracy": value}) for n, value in enumerate(odd)]
    report = report_of(run, *trials, a_trial(run, 7), a_trial(run, 8, metrics={"accuracy": 0.5}))
    assert [trial.index for trial in report.best] == [8]
    assert report.unranked == 8
    assert "8 completed trials left out: accuracy is missing, or no finite number" in to_terminal(report)
    assert "8 completed trials left out: accuracy is missing, or no finite number" in to_markdown(report)


def test_a_failed_trial_is_never_among_the_best_nor_counted_as_left_out() -> None:
    run = a_run()
    failed = a_trial(run, 0, "failed", exit_code=1, metrics={"accuracy": 1.0})
    report = report_of(run, failed, a_trial(run, 1, metrics={"accuracy": 0.5}), end="failed")
    assert [trial.index for trial in report.best] == [1]
    assert report.unranked == 0


def test_without_an_objective_the_report_says_how_to_get_a_ranking() -> None:
    run = a_run(objective=None)
    report = report_of(run, a_trial(run, 0))
    for text in (to_terminal(report), to_markdown(report)):
        assert "objective: {metric: accuracy, goal: max}" in text
        assert "Best by" not in text


def test_failures_are_told_with_their_exit_and_last_words() -> None:
    report = the_report()
    assert report.failed_trials == "3,9"
    assert [(trial.exit_code, trial.signal) for trial in report.failed] == [(1, None), (137, "SIGKILL")]
    assert report.failed[0].stderr[-1] == "ValueError: NaN | infinity"
    assert report.failed[0].stderr_file is not None
    assert report.failed[0].stderr_file.endswith("/trials/3/attempt-1.err")
    assert report.retry_command == f"python -m nexa_infra retry {report.run_id}"
    assert report.resume_command is None
    assert report.failed[1].stderr == ("epoch 3", "Killed")
    assert "\x1b" not in to_terminal(report) + to_markdown(report)


def test_many_failures_are_all_named_and_the_first_are_told() -> None:
    run = a_run(sweep={"parameters": {"seed": [str(n) for n in range(40)]}})
    trials = [a_trial(run, n, "failed" if n else "completed", exit_code=1) for n in range(40)]
    report = report_of(run, *trials, end="failed", stderr_tails={1: "\n".join(map(str, range(100)))})
    assert report.failed_trials == "1-39"
    assert len(report.failed) == 10
    assert report.failed[0].stderr == tuple(map(str, range(90, 100)))
    assert "Trials: 1-39 (the first 10 are told here)" in to_markdown(report)
    assert "The others' last words are in the report's files." in to_terminal(report)


def test_an_unfinished_run_says_how_it_is_resumed() -> None:
    run = a_run()
    pending = replace(a_trial(run, 1, "pending"), attempts=())
    report = report_of(run, a_trial(run, 0), pending, end="unfinished")
    assert report.resume_command == f"python -m nexa_infra resume {run.id}"
    assert report.retry_command is None
    assert report.usd_per_trial_mean == report.actual_usd


def test_an_unknown_cost_is_said_and_never_shown_as_nothing() -> None:
    run = a_run()
    cut = a_trial(run, 1, "interrupted", seconds=None)
    some = report_of(run, a_trial(run, 0, seconds=3600), cut, end="unfinished")
    assert (some.actual_usd, some.uncounted) == (Decimal("0.0529"), 1)
    assert "at least $0.053" in to_terminal(some)
    assert "**at least $0.053**" in to_markdown(some)
    none = report_of(run, cut, end="unfinished")
    assert (none.actual_usd, none.actual_unit_hours, none.wasted_usd) == (None, None, None)
    for text in (to_terminal(none), to_markdown(none)):
        assert "unknown" in text
        assert "$0.00" not in text
    assert to_table(none, price_trials(run, [cut]))[0]["usd"] == "unknown"


def test_a_refused_run_has_a_report_that_offers_nothing_to_resume() -> None:
    report = report_of(a_run(), end="refused", reason="$0.11 is over budget.limit_usd, $0.10")
    assert (report.trials, report.states, report.actual_usd) == (12, {"pending": 12}, Decimal(0))
    assert (report.resume_command, report.retry_command, report.uncounted) == (None, None, 0)
    assert "Nothing was submitted: $0.11 is over budget.limit_usd, $0.10" in to_terminal(report)
    assert r"**Nothing was submitted**: \$0.11 is over" in to_markdown(report)


def test_no_walltime_is_told_as_no_ceiling() -> None:
    report = report_of(a_run(job={"time": "UNLIMITED"}))
    assert "no ceiling: 12 trials × 1 attempt × 1 node × 1 core × no" in to_terminal(report)
    assert ["Projected, at most", "no ceiling", "no ceiling"] in tables(to_markdown(report))[1]


def test_a_command_too_long_for_a_line_is_still_one_that_a_shell_runs() -> None:
    run = a_run().model_copy(update={"id": f"20261124-101203-{'x' * 64}-a1b2"})
    report = report_of(run, a_trial(run, 0, "failed", exit_code=1), end="failed")
    text = to_terminal(report)
    command = text.partition("Run the failed trials again:\n")[2].strip()
    assert "\\\n" in command
    said = subprocess.run(["bash", "-c", f"printf '%s ' {command}"], capture_output=True, text=True, check=True).stdout
    assert said.strip() == report.retry_command
    assert shlex.split(said) == ["python", "-m", "nexa_infra", "retry", run.id]


def test_a_table_row_holds_plain_json_and_every_row_has_the_same_keys() -> None:
    run = a_run(sweep={"parameters": {"trial": ["1"], "usd": ["a\nb"]}})
    odd = {"state": 1, "nan": float("nan"), "deep": {"x": [1]}, "big": 10**30, "text": "\ud800\x1b", "yes": True}
    trials = [a_trial(run, 0, metrics=odd), replace(a_trial(run, 0), metrics={"other": 0.5})]
    rows = to_table(report_of(run, *trials), price_trials(run, trials))
    assert len({tuple(row) for row in rows}) == 1
    assert rows[0]["trial"] == 0
    assert (rows[0]["parameters.trial"], rows[0]["parameters.usd"]) == ("1", r"a\nb")
    assert (rows[0]["metrics.state"], rows[0]["nan"], rows[0]["deep"]) == (1, "NaN", '{"x": [1]}')
    assert rows[1]["other"] == 0.5
    json.dumps(rows, allow_nan=False, ensure_ascii=False).encode()


def test_a_table_of_many_trials_is_capped_and_says_so() -> None:
    run = a_run(sweep={"parameters": {"seed": [str(n) for n in range(1200)]}})
    trials = price_trials(run, [a_trial(run, n) for n in range(1200)])
    rows = to_table(build_report(run, trials, estimate_run(run), end="done"), trials)
    assert len(rows) == 1001
    assert rows[-1]["state"] == "only the first 1,000 of 1,200 trials are shown; results.csv has them all"
    assert rows[-1].keys() == rows[0].keys()


@pytest.mark.parametrize(
    ("usd", "shown"),
    [
        (None, "unknown"),
        ("0", "$0.00"),
        ("0.0003", "$0.0003"),
        ("0.000037289", "$0.000037"),
        ("0.00999", "$0.01"),
        ("0.0312", "$0.031"),
        ("0.529", "$0.53"),
        ("0.999", "$1.00"),
        ("1.005", "$1.01"),
        ("1234.56", "$1,234.56"),
        ("1234567.891", "$1,234,567.89"),
        ("2.9e-12", "$2.9e-12"),
        ("1e999999", "$1.0e+999999"),
    ],
)
def test_money_is_shown_as_precisely_as_it_is_read(usd: str | None, shown: str) -> None:
    assert money(None if usd is None else Decimal(usd)) == shown


def test_a_price_is_never_rounded_and_hours_are_to_three_digits() -> None:
    assert [rate(Decimal(usd)) for usd in ("0.0529", "3.50", "100", "0")] == ["$0.0529", "$3.50", "$100.00", "$0.00"]
    hours = [quantity(Decimal(text)) for text in ("0", "12", "0.006712", "1234.5", "2.40", "9.999")]
    assert hours == ["0", "12", "0.00671", "1,235", "2.4", "10"]


@given(st.decimals(min_value=0, allow_nan=False, allow_infinity=False))
def test_money_that_is_not_zero_never_looks_like_zero(usd: Decimal) -> None:
    assert len(money(usd)) < 40
    assert (money(usd) == "$0.00") == (usd == 0)


@given(st.sets(st.integers(0, 200)))
def test_ranges_name_every_number_once(numbers: set[int]) -> None:
    named: list[int] = []
    for part in filter(None, ranges(sorted(numbers)).split(",")):
        first, _, last = part.partition("-")
        named.extend(range(int(first), int(last or first) + 1))
    assert named == sorted(numbers)


HOSTILE = st.one_of(
    st.text(max_size=300),
    st.text("|\\`*_<>[]()!&~$@#:/ \n\r\t-=", max_size=40),
    st.sampled_from(
        [
            *(
                "|",
                "\\",
                "\\|",
                "\\\\|",
                "a\\",
                "`|`",
                "``` |",
                "a|b\n|---|---|\n# h",
                "\u202egnp",
                "\x1b[2J",
                "\ud800",
            ),
            *("<script>alert(1)</script>", "[x](javascript:alert(1))", "![x](http://e)", "&#124;", "&lt;", "__x__"),
            *(
                "http://evil.example/|",
                "www.evil.example",
                "日本語" * 50,
                "👩‍👩‍👧‍👦" * 30,
                "e\u0301" * 60,
                "",
                " ",
                "x" * 10_000,
            ),
        ]
    ),
)


def hostile_report(values: list[str], reason: str, metric: str) -> tuple[CostReport, tuple[Trial, ...]]:
    """A report that holds hostile text wherever a run can put it."""
    run = a_run(
        price=replace(CPU, item=values[0] or "x", source=values[1]),
        directory=f"/w/{values[2].replace(chr(0), '')}",
    ).model_copy(update={"labels": {"flow_run_url": values[3]}})
    objective = run.config.objective
    assert objective is not None
    config = run.config.model_copy(update={"objective": objective.model_copy(update={"metric": metric})})
    run = run.model_copy(update={"config": config})
    trials = [
        replace(
            a_trial(run, n, "failed" if n == 1 else "completed", exit_code=n == 1, metrics={metric: 0.5 + n}),
            parameters={"a|b": values[n], "c": values[n + 1], "d": None, "e": True},
        )
        for n in range(3)
    ]
    tails = {1: "\n".join(values)}
    priced = price_trials(run, trials)
    return build_report(run, priced, estimate_run(run), end="failed", reason=reason, stderr_tails=tails), priced


without_surrogates = HOSTILE.map(lambda text: text.encode(errors="replace").decode())


@settings(deadline=None, max_examples=150)
@given(st.lists(without_surrogates, min_size=4, max_size=4), HOSTILE, without_surrogates)
def test_hostile_values_stay_in_their_cells(values: list[str], reason: str, metric: str) -> None:
    report, _ = hostile_report(values, reason, metric)
    markdown = to_markdown(report)
    markdown.encode()
    found = tables(markdown)
    assert [len(table) for table in found] == [7 if values[3] else 6, 6, 2, 3, 4]
    for table in found:
        assert len({len(row) for row in table}) == 1
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(markdown)
    assert [token.tag for token in tokens if token.type == "heading_open"] == [
        *("h1", "h2", "h2", "h2", "h2", "h2", "h3", "h2")
    ]
    assert not [
        token.type for token in tokens if token.type in {"html_block", "blockquote_open", "hr", "list_item_open"}
    ]
    inside = {child.type for token in tokens for child in token.children or ()}
    assert inside <= {"text", "text_special", "softbreak", "strong_open", "strong_close", "code_inline"}


@given(HOSTILE)
def test_an_escaped_cell_shows_what_it_was_given(text: str) -> None:
    [[_, [cell, after]]] = tables(f"| a | b |\n|---|---|\n| {escape(text, 10_000)} | after |\n")
    assert after == "after"
    assert cell == shorten(text, 10_000).strip(" ")


@settings(deadline=None, max_examples=150)
@given(st.lists(without_surrogates, min_size=4, max_size=4), HOSTILE, without_surrogates)
def test_no_line_on_a_terminal_is_wider_than_80_columns(values: list[str], reason: str, metric: str) -> None:
    report, trials = hostile_report(values, reason, metric)
    text = to_terminal(report)
    for line in text.splitlines():
        assert cell_len(line) <= 80
        assert len(line) <= 80
        assert line.isprintable()
    json.dumps(to_table(report, trials), allow_nan=False, ensure_ascii=False).encode()
    to_json(report).encode()


@given(HOSTILE, st.integers(8, 200))
def test_shortened_text_fits_and_keeps_its_ends(text: str, limit: int) -> None:
    for keep_end in (False, True):
        short = shorten(text, limit, keep_end=keep_end)
        assert cell_len(short) <= limit
        assert short.isprintable()
    assert shorten("/scratch/ada/" + "deep/" * 40 + "end", 20, keep_end=True).endswith("/end")


@given(st.lists(HOSTILE, max_size=30).map(" ".join), st.integers(8, 80))
def test_wrapped_text_fits_and_loses_nothing_silently(text: str, limit: int) -> None:
    lines = wrap(text, limit)
    assert len(lines) <= 8
    assert all(cell_len(line) <= limit for line in lines)
    whole = "".join(shorten(" ".join(text.split()), 10**6).split())
    told = "".join("".join(lines).split())
    assert told == whole or told.endswith("…")
