"""Slurm's walltimes: the real controller reads every form as `parse_walltime` does."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest

from nexa_infra.scheduling.slurm.text import read_records
from nexa_infra.spec.walltime import format_walltime, parse_walltime
from tests.rig.slurm import SlurmRig

MINUTES = ("1", "30", "090", "1440")
CLOCKS = (
    "08:00", "0:01", "0:30", "1:30", "0:59", "0:60", "0:61", "1:120", "0:3600", "59:60",
    "08:00:00", "100:00:00", "1:90:00", "0:0:59", "0:0:60", "0:0:61", "00:00:01", "23:59:59", "24:00:00",
)  # fmt: skip
DAYS = (
    "1-0", "2-12", "1-48", "0-1", "365-0", "366-1", "1-2:30", "0-0:1", "0-1:90", "1-24:60",
    "1-02:03:04", "0-0:0:1", "7-00:00:00", "1-00:00:60",
)  # fmt: skip
NO_LIMIT = ("UNLIMITED", "unlimited", "INFINITE", "infinite", "-1")
FORMS = (*MINUTES, *CLOCKS, *DAYS, *NO_LIMIT)


def asked(slurm: SlurmRig, form: str) -> str:
    return slurm.submit("--hold", "--partition=high", f"--time={form}")  # high has no limit of its own


def seconds_by_slurm(slurm: SlurmRig, jobs: Iterable[str]) -> list[float]:
    """What the controller made of each job's walltime: squeue's %l would say INVALID beyond a year."""
    told = slurm.run(["scontrol", "show", "job", "-o"]).stdout
    # A job whose folder's name holds a line end takes two lines; its first one has what is asked for here.
    limits = {record["JobId"]: record["TimeLimit"] for record in read_records(told) if "JobId" in record}
    return [_seconds(limits[job]) for job in jobs]


def _seconds(limit: str) -> float:
    if limit == "UNLIMITED":
        return math.inf
    days, _, clock = limit.rpartition("-")
    hours, minutes, seconds = (int(part) for part in clock.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def in_whole_minutes(form: str) -> float:
    span = parse_walltime(form)
    return math.inf if span is None else math.ceil(span.total_seconds() / 60) * 60


def test_the_controller_reads_every_form_as_it_is_read_here(slurm: SlurmRig) -> None:
    told = seconds_by_slurm(slurm, [asked(slurm, form) for form in FORMS])
    assert dict(zip(FORMS, told, strict=True)) == {form: in_whole_minutes(form) for form in FORMS}


def test_the_controller_reads_back_what_is_written_here(slurm: SlurmRig) -> None:
    written = [format_walltime(parse_walltime(form)) for form in FORMS]
    told = seconds_by_slurm(slurm, [asked(slurm, form) for form in written])
    assert told == [in_whole_minutes(form) for form in FORMS]


@pytest.mark.parametrize("form", ["8h", "1.5", "1:2:3:4", "1-1:", "1-1:1:1:1", "08h00"])
def test_sbatch_refuses_what_is_no_form_here(slurm: SlurmRig, form: str) -> None:
    done = slurm.run(["sbatch", "--parsable", "--hold", f"--time={form}"], script="#!/bin/sh\ntrue\n")
    assert done.stderr == "sbatch: error: Invalid --time specification\n"


@pytest.mark.parametrize("form", ["0", "0:0", "00:00:00", "0-0"])
def test_no_time_at_all_is_no_limit_to_slurm_and_so_is_refused_here(slurm: SlurmRig, form: str) -> None:
    assert seconds_by_slurm(slurm, [asked(slurm, form)]) == [math.inf]
