"""One trial's argv, word for word."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from nexa_infra.spec.launcher import Launcher, argument, fill, pieces, placeholders, unfilled
from nexa_infra.spec.run import SweepConfig


def launcher(**keys: Any) -> Launcher:
    return Launcher.model_validate(keys)


@pytest.mark.parametrize(
    ("keys", "start"),
    [
        ({"script": "train.py"}, ["python3", "train.py"]),
        ({"module": "pkg.train"}, ["python3", "-m", "pkg.train"]),
        ({"script": "train.py", "python": "python3.12", "extra_args": ["-u"]}, ["python3.12", "-u", "train.py"]),
        (
            {"type": "torchrun", "script": "train.py", "extra_args": ["--standalone"]},
            ["torchrun", "--standalone", "train.py"],
        ),
        ({"type": "torchrun", "module": "pkg.train"}, ["torchrun", "-m", "pkg.train"]),
        ({"type": "command", "command": ["./run.sh", "--fast"]}, ["./run.sh", "--fast"]),
    ],
)
def test_a_program_is_started_by_its_launcher(keys: dict[str, Any], start: list[str]) -> None:
    assert launcher(**keys).argv(["--epochs", "2"], {"lr": "1e-4"}) == [*start, "--epochs", "2", "--lr", "1e-4"]


@pytest.mark.parametrize(
    ("style", "value", "words"),
    [
        ("--name value", "1e-4", ["--x", "1e-4"]),
        ("--name value", "-1", ["--x", "-1"]),
        ("--name value", "", ["--x", ""]),
        ("--name value", True, ["--x"]),
        ("--name value", False, ["--no-x"]),
        ("--name value", "true", ["--x", "true"]),
        ("--name value", None, []),
        ("--name=value", "a b", ["--x=a b"]),
        ("--name=value", "", ["--x="]),
        ("--name=value", True, ["--x"]),
        ("--name=value", False, ["--no-x"]),
        ("--name=value", None, []),
        ("name=value", "1e-4", ["x=1e-4"]),
        ("name=value", True, ["x=true"]),
        ("name=value", False, ["x=false"]),
        ("name=value", None, []),
    ],
)
def test_a_parameter_is_written_in_the_launcher_s_style(style: Any, value: Any, words: list[str]) -> None:
    assert argument("x", value, style) == words
    assert launcher(script="t.py", argument_style=style).argv([], {"x": value}) == ["python3", "t.py", *words]


def test_a_placeholder_takes_its_parameter_out_of_the_list() -> None:
    started = launcher(type="command", command=["./run", "--lr={lr}", "{out}/{lr}"])
    assert started.argv(["{seed}"], {"lr": "1e-4", "out": "o", "seed": "7", "wd": "0"}) == [
        "./run", "--lr=1e-4", "o/1e-4", "7", "--wd", "0",
    ]  # fmt: skip


def test_doubled_braces_are_the_braces_themselves() -> None:
    assert fill("{{lr}} {lr} {} { lr } {1}", {"lr": "2"}) == "{lr} 2 {} { lr } {1}"
    assert placeholders(["{{lr}}", "{a.b}-{c/d}", "${HOME}", "{}"]) == {"a.b", "c/d", "HOME"}


def test_a_placeholder_shows_booleans_as_words() -> None:
    assert fill("{a}{b}", {"a": True, "b": False}) == "truefalse"


@given(st.text(alphabet="{}ab1 ", max_size=20))
def test_the_pieces_of_a_word_are_the_word(word: str) -> None:
    told = "".join(f"{{{text}}}" if is_name else text for text, is_name in pieces(word))
    assert told == re.sub(r"\{\{([ab][ab1]*)\}\}", r"{\1}", word)
    assert fill(word, dict.fromkeys(placeholders([word]), "X")).count("X") == sum(name for _, name in pieces(word))


@given(st.text(max_size=30).filter(lambda text: "{" not in text))
def test_a_word_without_braces_is_left_alone(word: str) -> None:
    assert fill(word, {}) == word


def test_an_unfilled_placeholder_is_told_with_the_nearest_name() -> None:
    assert unfilled(["{lr}"], ["lr"]) is None
    assert unfilled(["--lr={l_r}"], ["lr", "wd"]) == (
        "the placeholder {l_r} is filled by no parameter (did you mean 'lr'?): "
        "add the parameter, or write {{l_r}} for the text itself"
    )


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({}, "type: python needs a program: add script: train.py, or module: package.train"),
        ({"type": "torchrun"}, "type: torchrun needs a program"),
        ({"script": "a.py", "module": "a"}, "module: stands beside script: a.py: keep one of the two"),
        ({"type": "command"}, "command: is missing"),
        ({"type": "command", "command": []}, "command: is missing"),
        ({"type": "command", "command": [""]}, r"command\[0\]: is empty"),
        ({"type": "command", "command": ["x"], "script": "a.py"}, "script: goes with type: python or torchrun"),
        ({"type": "command", "command": ["x"], "extra_args": ["-u"]}, "extra_args: goes with type: python or torchrun"),
        ({"command": ["x"]}, "command: goes with type: command, but type is python"),
        ({"type": "command", "command": "./run.sh --a 'b c'"}, r'write \[./run.sh, --a, "b c"\]'),
        ({"script": "a\nb.py"}, "must be one line without control characters"),
        ({"script": ""}, "at least 1 character"),
    ],
)
def test_a_launcher_that_starts_nothing_is_refused(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        launcher(**keys)


@pytest.mark.parametrize(
    ("sweep", "told"),
    [
        ({"parameters": {"wd": ["1"]}}, "launcher.command.1.: the placeholder {lr} is filled by no parameter"),
        ({"parameters": {"lr": ["1", None]}}, "lr is null in a trial"),
        ({"trials": [{"lr": "1"}, {"wd": "1"}]}, "a trial has no lr"),
        ({"parameters": {"wd": ["1"]}, "overrides": {"lr": None}}, "overrides holds lr at null"),
    ],
)
def test_a_placeholder_must_be_filled_in_every_trial(sweep: dict[str, Any], told: str) -> None:
    program = {"type": "command", "command": ["./run", "{lr}"]}
    with pytest.raises(ValidationError, match=told):
        SweepConfig.model_validate({"launcher": program, "sweep": sweep})
    filled = {"parameters": {"wd": ["1"]}, "overrides": {"lr": "2"}}
    assert len(SweepConfig.model_validate({"launcher": program, "sweep": filled}).trials) == 1
