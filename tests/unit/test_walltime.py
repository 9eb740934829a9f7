"""Slurm's walltimes: every form of sbatch(1), and what is none of them."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexa_infra.errors import NexaError, WalltimeError
from nexa_infra.spec.walltime import format_walltime, parse_walltime


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 30 * 60),
        ("08:00", 8 * 60),
        ("0:30", 30),
        ("1:30", 90),
        ("08:00:00", 8 * 3600),
        ("100:00:00", 100 * 3600),
        ("1:90:00", 2.5 * 3600),
        ("1-0", 86400),
        ("2-12", 2.5 * 86400),
        ("1-2:30", 86400 + 2.5 * 3600),
        ("1-02:03:04", 86400 + 2 * 3600 + 184),
        ("0-0:0:1", 1),
        (" 10 ", 600),
    ],
)
def test_every_form_of_sbatch_is_read(text: str, seconds: float) -> None:
    assert parse_walltime(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["UNLIMITED", "unlimited", "INFINITE", "infinite", "-1"])
def test_no_limit_is_none(text: str) -> None:
    assert parse_walltime(text) is None


@pytest.mark.parametrize(
    "text",
    ["", " ", "8h", "1-", "-", ":", "1:", ":30", "1:2:3:4", "1-2:3:4:5", "1.5", "-5", "1--2", "1:-2", "٣", "²", "1 0",
     "0x10", "1_0", "99999999999", "NaN", "08:00:00\n08:00:00"],
)  # fmt: skip
def test_what_is_no_walltime_is_told_the_forms(text: str) -> None:
    with pytest.raises(WalltimeError, match=r"is not a walltime: write .*one of M, M:S, H:M:S, D-H") as caught:
        parse_walltime(text)
    assert isinstance(caught.value, NexaError)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("8h", "08:00:00"),
        ("90 min", "01:30:00"),
        ("45s", "00:00:45"),
        ("2d", "2-00:00:00"),
        ("1h30m", "01:30:00"),
        ("1.5 hours", "01:30:00"),
        ("2 days, 3 hours", "2-03:00:00"),
        ("1D12H", "1-12:00:00"),
    ],
)
def test_the_spelling_of_other_tools_is_told_in_slurm_s(text: str, written: str) -> None:
    with pytest.raises(WalltimeError, match=f"write {written}, or one of "):
        parse_walltime(text)


@pytest.mark.parametrize("text", ["1 month", "8 horses", "1h2", "h"])
def test_what_could_mean_anything_is_not_guessed(text: str) -> None:
    with pytest.raises(WalltimeError, match="write one of "):
        parse_walltime(text)


@pytest.mark.parametrize("text", ["0", "00:00", "0-0", "00:00:00"])
def test_no_time_at_all_is_no_walltime(text: str) -> None:
    with pytest.raises(WalltimeError, match="is no time at all"):
        parse_walltime(text)


def test_what_overflows_is_an_error_like_any_other() -> None:
    with pytest.raises(WalltimeError, match="longer than Slurm can count"):
        parse_walltime("9999999999-23:59:59")


@pytest.mark.parametrize(
    ("span", "text"),
    [
        (timedelta(seconds=1), "00:00:01"),
        (timedelta(hours=23, minutes=59, seconds=59), "23:59:59"),
        (timedelta(days=1), "1-00:00:00"),
        (timedelta(days=400, hours=5), "400-05:00:00"),
        (None, "UNLIMITED"),
    ],
)
def test_a_walltime_is_written_as_sbatch_reads_it(span: timedelta | None, text: str) -> None:
    assert format_walltime(span) == text


@given(st.integers(min_value=1, max_value=2**31 - 60))
def test_what_is_written_reads_back_the_same(seconds: int) -> None:
    assert parse_walltime(format_walltime(timedelta(seconds=seconds))) == timedelta(seconds=seconds)


@given(st.text(max_size=20))
def test_any_text_is_a_walltime_or_one_error(text: str) -> None:
    try:
        span = parse_walltime(text)
    except WalltimeError:
        return
    assert span is None or span > timedelta(0)
