"""The job that is asked of Slurm: what it may say, and what contradicts itself."""

from __future__ import annotations

from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from pydantic import ValidationError

from nexa_infra.spec.fields import Boolean
from nexa_infra.spec.job import SlurmJob


def job(**keys: Any) -> SlurmJob:
    return SlurmJob.model_validate(keys)


def test_a_job_without_keys_is_one_core_for_an_hour() -> None:
    plain = job()
    assert (plain.nodes, plain.cores, plain.gpus, plain.walltime) == (1, 1, 0, timedelta(hours=1))


def test_every_key_of_the_design_is_one() -> None:
    keys = (
        "name partition account qos time nodes ntasks_per_node gpus_per_node gpu_type cpus_per_task memory constraint "
        "gres nodelist exclude reservation dependency mail_type mail_user array_parallelism output_dir setup env "
        "env_file cost_per_gpu_hour extra"
    )
    assert set(keys.split()) <= set(SlurmJob.model_fields)


def test_eight_zero_zero_is_eight_minutes() -> None:
    assert job(time="08:00").walltime == timedelta(minutes=8)
    assert job(time="UNLIMITED").walltime is None


@pytest.mark.parametrize(
    ("gres", "count", "kind"),
    [
        ("gpu", 1, None),
        ("gpu:2", 2, None),
        ("gpu:a100", 1, "a100"),
        ("gpu:a100:4", 4, "a100"),
        ("gres/gpu:h100=8", 8, "h100"),
        ("gpu:a100:2,gpu:v100:1", 3, "a100"),
        ("tmpdisk:100", 0, None),
        ("tmpdisk:100, gpu:2", 2, None),
    ],
)
def test_gpus_are_counted_from_gres(gres: str, count: int, kind: str | None) -> None:
    asked = job(gres=gres)
    assert (asked.gpus, asked.gpu) == (count, kind)


def test_cores_are_tasks_times_cores_a_task() -> None:
    assert job(ntasks_per_node=2, cpus_per_task=8).cores == 16


def test_numbers_are_read_from_text_and_money_is_decimal() -> None:
    asked = job(nodes="2", gpus_per_node="4", gpu_type="h100", cost_per_gpu_hour="3.25", array_parallelism="8")
    assert (asked.nodes, asked.gpus, asked.array_parallelism) == (2, 4, 8)
    assert asked.cost_per_gpu_hour == Decimal("3.25")


@pytest.mark.parametrize("memory", ["16G", "512M", "0", "1T", "64GB", "100k"])
def test_memory_is_written_as_slurm_reads_it(memory: str) -> None:
    assert job(memory=memory).memory == memory


def test_any_other_option_of_sbatch_goes_through() -> None:
    asked = job(
        extra={"licenses": "fluent:2", "exclusive": Boolean("true"), "nice": 100, "no-kill": True, "x11": "all"}
    )
    assert asked.extra == {"licenses": "fluent:2", "exclusive": True, "nice": "100", "no-kill": True, "x11": "all"}


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"gres": "gpu:2", "gpus_per_node": 2}, "gres: gpu:2 and gpus_per_node: 2 both ask for GPUs"),
        ({"gres": "gpu:a100:2", "gpu_type": "h100"}, "gpu_type: is h100, but gres asks for a100"),
        ({"gpu_type": "h100"}, "gpu_type: is h100, but no GPU is asked for: set gpus_per_node"),
        ({"cost_per_gpu_hour": 1}, "cost_per_gpu_hour: is set, but no GPU is asked for"),
        ({"cost_per_core_hour": 1, "gpus_per_node": 1}, "cost_per_core_hour: prices jobs without GPUs"),
        ({"mail_user": "a@b"}, "mail_user: is set without mail_type"),
        ({"nodes": 0}, "greater than or equal to 1"),
        ({"nodes": -1}, "greater than or equal to 1"),
        ({"nodes": True}, "a number is meant here, not the boolean true"),
        ({"nodes": Boolean("False")}, "a number is meant here, not the boolean false"),
        ({"gpus_per_node": -1}, "greater than or equal to 0"),
        ({"time": "8h"}, "'8h' is not a walltime: write 08:00:00"),
        ({"time": 8.5}, "'8.5' is not a walltime"),
        ({"name": "a\nb"}, "must be one line without control characters"),
        ({"name": "-x"}, "'-x' is no job name"),
        ({"name": "a/b"}, "'a/b' is no job name"),
        ({"name": "x" * 65}, "too long for a job name: keep it to 64 characters"),
        ({"partition": "gpu\x1b[0m"}, "must be one line without control characters"),
        ({"memory": "16 G"}, "'16 G' is no amount of memory"),
        ({"memory": "１６G"}, "is no amount of memory"),
        ({"bogus": 1}, "Extra inputs are not permitted"),
        ({"setup": {"modules": "cuda"}}, r"write \[cuda\]"),
        ({"env": {"A B": "x"}}, "'A B' is no name for an environment variable"),
        ({"env": {"NEXA_METRICS": "x"}}, "is set by the run itself"),
        ({"env": {"A": "\0"}}, "NUL"),
        ({"extra": {"array": "0-3"}}, "array: cannot be set here: the run makes its own arrays"),
        ({"extra": {"job_name": "x"}}, "job_name: cannot be set here: use job.name"),
        ({"extra": {"partition": "x"}}, "partition: has a key of its own: use job.partition"),
        ({"extra": {"--licenses": "x"}}, "--licenses: write the option without dashes in front"),
        ({"extra": {"delay_boot": "1"}}, "with '-' inside: delay-boot"),
        ({"extra": {"a b": "1"}}, "a b: is no sbatch option"),
        ({"extra": {"comment": "a\nb"}}, "comment: must be one line"),
        (
            {"extra": {"comment": ""}},
            "comment: an option's value is text, or true for an option without one, not an empty",
        ),
        ({"extra": {"comment": None}}, "not null"),
    ],
)
def test_a_contradiction_or_an_unreadable_value_is_refused(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        job(**keys)


def test_every_contradiction_is_told_at_once() -> None:
    with pytest.raises(ValidationError, match=r"gpu_type: .*cost_per_gpu_hour: .*mail_user: "):
        job(gpu_type="h100", cost_per_gpu_hour=2, mail_user="a@b")


def test_a_job_is_frozen_and_survives_its_record() -> None:
    asked = job(gpus_per_node=2, gpu_type="h100", extra={"exclusive": True}, env={"A": "b"}, setup={"lines": ["true"]})
    assert SlurmJob.model_validate_json(asked.model_dump_json()) == asked
    with pytest.raises(ValidationError, match="frozen"):
        asked.nodes = 3  # type: ignore[misc]


def test_a_warning_that_nobody_asked_for_is_none_after_the_record_was_read_back() -> None:
    for given, asked in (({}, False), ({"signal": "USR1"}, True), ({"signal_before_end": 90}, True)):
        job = SlurmJob.model_validate_json(SlurmJob.model_validate(given).model_dump_json())
        assert (job.warns, job.warning_signal, job.warning_seconds) == (asked, "USR1", 90)
