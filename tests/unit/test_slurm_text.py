"""What Slurm's commands print, recorded from Slurm 22.05.8, read into rows."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nexa_infra.scheduling.slurm.text import (
    ACCOUNTING_FIELDS,
    AccountingRow,
    QueueRow,
    explained,
    gpus_of,
    moment,
    read_accounting,
    read_config,
    read_job_id,
    read_queue,
    read_records,
    read_tres,
    refusal,
    task_indices,
)

QUEUE = """\
7|7|N/A|CANCELLED|None|cancel
9|9|0-99%4|CANCELLED|JobHeldUser|pend
3|3|N/A|FAILED|JobLaunchFailure|kill9
5|5|N/A|OUT_OF_MEMORY|OutOfMemory|oom
15|15|2-5%2|PENDING|JobArrayTaskLimit|throttled
13|13|1-2,5-6,9|PENDING|JobHeldUser|pairs
23|23|N/A|PENDING|Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions|excl2
48|48|2-5|PENDING|ReqNodeNotAvail, UnavailableNodes:n1,BeginTime|requeued
10|10|1-41:2%1|PENDING|JobHeldUser|strided
38|15|0|RUNNING|None|throttled
36|1|0|COMPLETED|None|nexa-a|b-1
"""


def test_a_queue_is_read_line_by_line() -> None:
    rows = read_queue(QUEUE)
    assert len(rows) == 11
    assert rows[4] == QueueRow("15", "15", "2-5%2", "PENDING", "JobArrayTaskLimit", "throttled")
    assert rows[6].reason.startswith("Nodes required for job are DOWN, DRAINED")
    assert rows[9] == QueueRow("38", "15", "0", "RUNNING", "None", "throttled")
    assert [row.count for row in rows] == [1, 100, 1, 1, 4, 5, 1, 4, 21, 1, 1]


def test_a_job_s_name_may_hold_the_separator() -> None:
    assert read_queue(QUEUE)[-1].name == "nexa-a|b-1"


def test_what_is_no_row_of_the_queue_is_left_out() -> None:
    torn = "Welcome!\n\n11|11|N/A|PENDING|JobHeldUser|new\nline|x|y\nsqueue: error: a|b|c|d|e|f\n4|4|7|RUNN"
    assert [row.name for row in read_queue(torn)] == ["new"]
    assert read_queue("") == []


# -- lists of array tasks


@pytest.mark.parametrize(
    ("text", "indices"),
    [
        ("7", [7]),
        ("0-9%2", range(10)),
        ("0-9%0", range(10)),
        ("[4-8%2]", range(4, 9)),
        ("1-41:2%1", range(1, 42, 2)),
        ("[0-1,4,9,16,25]", [0, 1, 4, 9, 16, 25]),
        ("0,3,6,9,61-63,70-71", [0, 3, 6, 9, 61, 62, 63, 70, 71]),
        ("1-7:3,20", [1, 4, 7, 20]),
    ],
)
def test_a_list_of_tasks_is_read_as_slurm_writes_it(text: str, indices: range | list[int]) -> None:
    assert list(task_indices(text)) == list(indices)


# The second is what sacct prints without SLURM_BITSTR_LEN=0, the third what squeue's %i does.
@pytest.mark.parametrize(
    "text", ["", "[0-1,4,9,289,32...]", "[0-1,4,9,16,", "1-", "-1", "1-5:0", "a", "N/A", "1 2", "²"]
)
def test_a_list_that_was_cut_is_no_list(text: str) -> None:
    with pytest.raises(ValueError, match="is no list of array tasks"):
        task_indices(text)


def test_a_row_whose_list_was_cut_cannot_say_how_many_it_stands_for() -> None:
    row = QueueRow("1", "1", "0-1,4,9,289,32...", "PENDING", "None", "sparse")
    with pytest.raises(ValueError, match="is no list"):
        _ = row.count


def as_slurm_writes(indices: set[int]) -> str:
    """A list of array tasks: runs as ranges, one stride as `first-last:step`, the rest by commas."""
    rest = sorted(indices)
    steps = {after - before for before, after in pairwise(rest)}
    if len(steps) == 1 and steps != {1} and len(rest) > 2:
        return f"{rest[0]}-{rest[-1]}:{steps.pop()}"
    words = []
    while rest:
        run = 1
        while run < len(rest) and rest[run] == rest[0] + run:
            run += 1
        words.append(f"{rest[0]}-{rest[run - 1]}" if run > 1 else str(rest[0]))
        rest = rest[run:]
    return ",".join(words)


_strided = st.builds(range, st.integers(0, 50), st.integers(51, 900), st.integers(1, 9)).map(set)


@given(
    st.one_of(st.sets(st.integers(0, 1000), min_size=1, max_size=60), _strided),
    st.sampled_from(["", "%1", "%40"]),
    st.booleans(),
)
def test_a_list_of_tasks_reads_back(indices: set[int], throttle: str, bracketed: bool) -> None:
    text = as_slurm_writes(indices) + throttle
    assert list(task_indices(f"[{text}]" if bracketed else text)) == sorted(indices)


# -- what sbatch prints


@pytest.mark.parametrize(
    ("stdout", "job"),
    [
        ("12\n", "12"),
        ("6416;cluster\n", "6416"),
        ("Welcome to the cluster\nproject: 1200 hours left\n12\n", "12"),
        ("12\r\n", "12"),
        ("", None),
        ("Submitted batch job 12\n", None),
        ("12 13\n", None),
    ],
)
def test_a_job_s_id_is_read_from_what_sbatch_prints(stdout: str, job: str | None) -> None:
    assert read_job_id(stdout) == job


FAILED = "sbatch: error: Batch job submission failed: "
LIMIT = (
    "Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
)
FULL = "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying\n"


@pytest.mark.parametrize(
    "stderr",
    [
        f"{FAILED}Socket timed out on send/recv operation\n",
        f"{FAILED}Connection reset by peer\n",
        f"{FAILED}Zero Bytes were transmitted or received\n",
        f"{FAILED}Unexpected message received\n",
        f"{FAILED}Transport endpoint is not connected\n",
        f"{FAILED}Unable to contact slurm controller (receive failure)\n",
        f"{FAILED}Unable to contact slurm controller (send failure)\n",
        f"{FULL}{FAILED}Socket timed out on send/recv operation\n",
    ],
)
def test_a_lost_answer_may_hide_a_job(stderr: str) -> None:
    assert refusal(stderr) == "ambiguous"


@pytest.mark.parametrize(
    "stderr",
    [
        FULL,
        f"{FULL}{FAILED}Resource temporarily unavailable\n",
        f"{FAILED}Unable to contact slurm controller (connect failure)\n",
        f"{FAILED}Slurm backup controller in standby mode\n",
        f"{FAILED}Controller is in standby mode, try a different controller\n",
    ],
)
def test_a_controller_that_is_away_or_full_is_asked_again(stderr: str) -> None:
    assert refusal(stderr) == "transient"


SUBMIT_LIMIT = "fewer trials, or wait until some of your queued tasks are done"


@pytest.mark.parametrize(
    ("lines", "remedy"),
    [
        (["QOSMaxSubmitJobPerUserLimit", LIMIT], SUBMIT_LIMIT),
        (["AssocMaxSubmitJobLimit", LIMIT], SUBMIT_LIMIT),
        (["MaxSubmitJobsPerAccount", LIMIT], SUBMIT_LIMIT),
        (["QOSMaxWallDurationPerJobLimit", LIMIT], "lower job.time (`sacctmgr show qos` tells the limits)"),
        (
            [LIMIT],
            "over a limit of your account or QOS (`sacctmgr show assoc user=$USER`, `sacctmgr show qos`)",
        ),
        (
            ["invalid partition specified: elsewhere", "Batch job submission failed: Invalid partition name specified"],
            "check job.partition (`sinfo -s` lists them)",
        ),
        (
            [
                "Memory specification can not be satisfied",
                "Batch job submission failed: Requested node configuration is not available",
            ],
            "no node has so much: lower job.memory",
        ),
        (
            [
                "If munged is up, restart with --num-threads=10",
                'Munge encode failed: Failed to access "/run/munge/munge.socket.2": No such file or directory',
                "slurm_send_node_msg: auth_g_create: REQUEST_SUBMIT_BATCH_JOB has authentication error",
                "Batch job submission failed: Protocol authentication error",
            ],
            "munge does not run on this host: tell those who run it",
        ),
    ],
)
def test_a_refusal_is_told_in_the_scheduler_s_words_and_ours(lines: list[str], remedy: str) -> None:
    stderr = "".join(f"sbatch: error: {line}\n" for line in lines)
    assert refusal(stderr) == "permanent"
    assert explained(stderr) == f"{'; '.join(lines)}: {remedy}"


def test_an_option_that_this_sbatch_does_not_know_is_told() -> None:
    stderr = "sbatch: unrecognized option '--foo'\nTry \"sbatch --help\" for more information\n"
    assert refusal(stderr) == "permanent"
    assert explained(stderr).endswith(": this cluster's sbatch is too old, or too new, for one of job.extra")


def test_what_sbatch_says_again_and_again_is_told_once_and_its_last_word_decides() -> None:
    stderr = f"{FULL}{FULL}{FAILED}Job dependency problem\n"
    assert refusal(stderr) == "permanent"
    assert explained(stderr).count("temporarily unable") == 1


def test_a_site_s_own_words_stand_alone() -> None:
    assert explained("sbatch: error: GPUs need an account\n") == "GPUs need an account"
    assert explained(" \n") == "sbatch said nothing"


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("Invalid account or account/partition combination specified", "job.account"),
        ("Requested node configuration is not available", "job.gpu_type"),
        ("Invalid qos specification", "job.qos"),
        ("Access/permission denied", "login node"),
        ("Invalid user id", "root may not submit here"),
        ("Invalid job array specification", "MaxArraySize"),
        ("Requested time limit is invalid (missing or exceeds some limit)", "job.time"),
        ("Required partition not available (inactive or drain)", "job.partition"),
        ("Requested reservation is invalid", "job.reservation"),
        ("Access denied to requested reservation", "job.reservation"),
        ("Invalid feature specification", "job.constraint"),
        ("Invalid license specification", "licenses"),
        ("Invalid node name specified", "job.nodelist"),
        ("Socket timed out on send/recv operation", "may have been taken"),
        ("Unable to contact slurm controller (connect failure)", "scontrol ping"),
    ],
)
def test_a_refusal_names_the_key_to_change(said: str, remedy: str) -> None:
    words = explained(f"{FAILED}{said}\n")
    assert words.startswith(f"Batch job submission failed: {said}: ")
    assert remedy in words.removeprefix(f"Batch job submission failed: {said}: ")


# -- what sacct prints

ONE = "billing=1,cpu=1,mem=1G,node=1"
TIMES = "2026-11-24T11:05:00|2026-11-24T11:05:02|2026-11-24T11:05:02"
A100 = "billing=1,cpu=1,gres/gpu:a100=1,gres/gpu=1,mem=1G,node=1"
ACCOUNTING = f"""\
2|FAILED|3:0|0:0|0|{ONE}|{ONE}|{TIMES}|n1|None|fail
3|FAILED|0:9|0:0|0|{ONE}|{ONE}|{TIMES}|n1|None|kill9
5|OUT_OF_MEMORY|0:125|0:0|0|billing=1,cpu=1,mem=64M,node=1|billing=1,cpu=1,mem=64M,node=1|{TIMES}|n1|None|oom
6|RUNNING|0:0|0:0|42|{ONE}|{ONE}|1795518300|1795518302|Unknown|n1|None|timeout
8|CANCELLED by 21001|0:0|0:0|5|{ONE}|{ONE}|{TIMES}|n2|None|cancelada
1_0|COMPLETED|0:0|0:0|30|{A100}|{A100}|{TIMES}|n1|None|nexa-a|b-1
15_3|NODE_FAIL|0:0|0:0|12|{ONE}|{ONE}|{TIMES}|n1|JobArrayTaskLimit|throttled
24|FAILED|1:0|0:0|0||billing=1,cpu=1,gres/gpu:a100=5,gres/gpu=5,mem=1G,node=1|{TIMES}|None assigned|None|sbatch
4_[2-8%2]|CANCELLED by 0|0:0|0:0|0||{ONE}|{TIMES}|None assigned|JobArrayTaskLimit|mixed
1_[0-1,4,9,289,32...]|CANCELLED by 0|0:0|0:0|0||{ONE}|{TIMES}|None assigned|JobHeldUser|sparse
14|REQUEUED|0:0|0:0|3|{ONE}|{ONE}|{TIMES}|n1|None|requeued
14|PENDING|0:0|0:0|0||{ONE}|2026-11-24T11:10:47|Unknown|Unknown|None assigned|None|requeued
3|DEADLINE|1:0|0:0|0||{ONE}|2026-11-24T11:08:32|None|2026-11-24T11:09:03|None assigned|BeginTime|deadline
"""


def test_an_attempt_is_read_whole() -> None:
    assert read_accounting(ACCOUNTING)[5] == AccountingRow(
        array_id="1",
        tasks="0",
        state="COMPLETED",
        cancelled_by=None,
        exit_code=0,
        signal=0,
        step_signal=0,
        elapsed=30,
        allocated={"billing": 1, "cpu": 1, "gres/gpu:a100": 1, "gres/gpu": 1, "node": 1},
        requested={"billing": 1, "cpu": 1, "gres/gpu:a100": 1, "gres/gpu": 1, "node": 1},
        submitted="2026-11-24T11:05:00",
        started="2026-11-24T11:05:02",
        ended="2026-11-24T11:05:02",
        nodes="n1",
        reason="None",
        name="nexa-a|b-1",
    )


def test_every_kind_of_row_is_read() -> None:
    rows = read_accounting(ACCOUNTING)
    assert [(row.array_id, row.tasks) for row in rows] == [
        ("2", ""), ("3", ""), ("5", ""), ("6", ""), ("8", ""), ("1", "0"), ("15", "3"), ("24", ""),
        ("4", "[2-8%2]"), ("1", "[0-1,4,9,289,32...]"), ("14", ""), ("14", ""), ("3", ""),
    ]  # fmt: skip
    assert [(row.exit_code, row.signal) for row in rows[:4]] == [(3, 0), (0, 9), (0, 125), (0, 0)]
    assert [(row.state, row.cancelled_by) for row in rows[4:6]] == [("CANCELLED", "21001"), ("COMPLETED", None)]
    assert rows[7].allocated == {} and gpus_of(rows[7].requested) == {"a100": 5}
    assert [row.state for row in rows[-3:]] == ["REQUEUED", "PENDING", "DEADLINE"]


def test_a_lost_node_has_no_exit_code() -> None:
    """22.05 writes 0:0 for it, and 24.11 writes 1:0; neither heard of the script's."""
    told = f"15_3|NODE_FAIL|{{}}|0:0|12|{ONE}|{ONE}|{TIMES}|n1|None|lost\n"
    assert read_accounting(told.format("1:0")) == read_accounting(told.format("0:0"))


def test_a_state_that_was_cut_and_numbers_that_are_empty_are_read() -> None:
    (row,) = read_accounting("7|CANCELLED+||||||||||||\n")
    assert (row.state, row.exit_code, row.signal, row.elapsed, row.name) == ("CANCELLED", 0, 0, 0, "|")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "sacct: error: something",
        f"2|FAILED|3:0|0:0|0|{ONE}|{ONE}|{TIMES}|n1|No",
        f"2|FAILED|3:0|0:0|many|{ONE}|{ONE}|{TIMES}|n1|None|fail",
        f"2|FAILED|x:0|0:0|1|{ONE}|{ONE}|{TIMES}|n1|None|fail",
        f"2.batch|FAILED|3:0|0:0|0|{ONE}|{ONE}|{TIMES}|n1|None|batch",
        f"2_7.0|FAILED|3:0|0:0|0|{ONE}|{ONE}|{TIMES}|n1|None|srun",
        "of a name|with a line's end|a|b|c|d|e|f|g|h|i|j|k",
    ],
)
def test_what_is_no_attempt_is_left_out(line: str) -> None:
    assert [row.state for row in read_accounting(f"{line}\n{ACCOUNTING}")] == [
        row.state for row in read_accounting(ACCOUNTING)
    ]


def test_a_name_comes_last() -> None:
    assert ACCOUNTING_FIELDS.split(",")[-1] == "JobName"


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1795518302", 1795518302.0),
        ("2026-11-24T11:05:02", 1795518302.0),
        ("2026-11-24T12:05:02+01:00", 1795518302.0),
        ("Unknown", None),
        ("None", None),
        ("N/A", None),
        ("", None),
        ("2026-11-24T11:05", 1795518300.0),
        ("11:05:02", None),
    ],
)
def test_a_time_is_read_as_seconds_since_the_epoch(text: str, seconds: float | None) -> None:
    assert moment(text) == seconds


# -- resources, settings, partitions


def test_gpus_are_counted_once() -> None:
    assert gpus_of(read_tres(A100)) == {"a100": 1}
    assert gpus_of(read_tres("cpu=8,gres/gpu:a100=2,gres/gpu:h100=2,gres/gpu=4,mem=8G")) == {"a100": 2, "h100": 2}
    assert gpus_of(read_tres("cpu=1,gres/gpu=2,mem=1G,node=1")) == {None: 2}
    assert gpus_of(read_tres(ONE)) == {}
    assert read_tres("") == {}


CONFIG = """\
Configuration data as of 2026-11-24T11:05:14
AccountingStorageTRES   = cpu,mem,energy,node,billing,fs/disk,vmem,pages,gres/gpu,gres/gpu:a100,gres/gpu:h100
AuthInfo                = socket=/run/munge/socket,cred_expire=5
JobSubmitPlugins        = (null)
KillWait                = 3 sec
MaxArraySize            = 1001
PowerPlugin             =\x20
SlurmctldHost[0]        = head(127.0.0.1)

Cgroup Support Configuration:
ConstrainRAMSpace       = yes

Slurmctld(primary) at head is UP
"""


def test_a_configuration_is_read() -> None:
    assert read_config(CONFIG) == {
        "AccountingStorageTRES": "cpu,mem,energy,node,billing,fs/disk,vmem,pages,gres/gpu,gres/gpu:a100,gres/gpu:h100",
        "AuthInfo": "socket=/run/munge/socket,cred_expire=5",
        "JobSubmitPlugins": "(null)",
        "KillWait": "3 sec",
        "MaxArraySize": "1001",
        "PowerPlugin": "",
        "SlurmctldHost[0]": "head(127.0.0.1)",
        "ConstrainRAMSpace": "yes",
    }


PARTITIONS = """\
PartitionName=cpu AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=YES QoS=N/A \
DefaultTime=01:00:00 DisableRootJobs=NO ExclusiveUser=NO GraceTime=0 Hidden=NO MaxNodes=UNLIMITED \
MaxTime=2-00:00:00 MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED Nodes=n[1-2] PriorityJobFactor=1 PriorityTier=1 \
RootOnly=NO ReqResv=NO OverSubscribe=NO OverTimeLimit=NONE PreemptMode=OFF State=UP TotalCPUs=16 TotalNodes=2 \
SelectTypeParameters=NONE JobDefaults=(null) DefMemPerCPU=1024 MaxMemPerNode=UNLIMITED \
TRES=cpu=16,mem=32G,node=2,billing=16,gres/gpu=8,gres/gpu:a100=6,gres/gpu:h100=2

PartitionName=closed AllocNodes=elsewhere MaxTime=UNLIMITED State=UP
"""
NODE = """\
NodeName=n1 Arch=x86_64 CoresPerSocket=1  CPUAlloc=1 CPULoad=0.24 AvailableFeatures=(null) Gres=gpu:a100:4 \
OS=Linux 6.1.0 #1 SMP PREEMPT_DYNAMIC @0  RealMemory=16384 State=MIXED+DRAIN \
Reason=disk of /scratch=full [root@2026-11-24T11:05:08]\x20
"""
JOB = """\
JobId=15 ArrayJobId=15 ArrayTaskId=2-5%2 JobName=throttled UserId=root(0) Reason=JobArrayTaskLimit Dependency=(null) \
AllocNode:Sid=head:5684 NodeList= NumNodes=1 CPUs/Task=1 ReqB:S:C:T=0:0:*:* TRES=cpu=1,mem=1G,node=1,billing=1 \
TimeLimit=01:00:00 Power=\x20
"""


def test_partitions_are_read() -> None:
    cpu, closed = read_records(PARTITIONS)
    assert (cpu["PartitionName"], cpu["MaxTime"], cpu["DefMemPerCPU"]) == ("cpu", "2-00:00:00", "1024")
    assert cpu["TRES"] == "cpu=16,mem=32G,node=2,billing=16,gres/gpu=8,gres/gpu:a100=6,gres/gpu:h100=2"
    assert len(cpu) == len(PARTITIONS.splitlines()[0].split())
    assert closed == {"PartitionName": "closed", "AllocNodes": "elsewhere", "MaxTime": "UNLIMITED", "State": "UP"}


def test_a_value_may_hold_spaces_and_signs() -> None:
    (node,) = read_records(NODE)
    assert node["OS"] == "Linux 6.1.0 #1 SMP PREEMPT_DYNAMIC @0"
    assert node["Reason"] == "disk of /scratch=full [root@2026-11-24T11:05:08]"
    assert node["CoresPerSocket"] == "1"
    (job,) = read_records(JOB)
    assert (job["NodeList"], job["CPUs/Task"], job["ReqB:S:C:T"], job["Power"]) == ("", "1", "0:0:*:*", "")
    assert job["AllocNode:Sid"] == "head:5684"


def test_no_records_are_none() -> None:
    assert read_records("") == [] and read_records("No partitions in the system\n") == []
