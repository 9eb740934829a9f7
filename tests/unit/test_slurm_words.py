"""What Slurm's ends and waits mean, in a user's words."""

from __future__ import annotations

import pytest

from nexa_infra.scheduling.slurm.words import ended, waiting


@pytest.mark.parametrize(
    ("state", "facts", "words"),
    [
        ("COMPLETED", {"node": "n1"}, "ended well on n1 (COMPLETED, exit code 0)"),
        ("FAILED", {"exit_code": 3, "node": "n1"}, "failed with exit code 3 on n1 (FAILED)"),
        ("FAILED", {}, "failed (FAILED)"),
        ("FAILED", {"exit_code": 127},
         "failed with exit code 127 (FAILED): a command was not found: check job.setup and launcher.script"),
        ("FAILED", {"exit_code": 126},
         ("failed with exit code 126 (FAILED): "
          "a command could not be run, for want of permission or of the right format")),
        ("FAILED", {"exit_code": 139, "reason": "NonZeroExitCode"},
         "failed with exit code 139 (FAILED): its program was ended by signal 11, SIGSEGV"),
        ("FAILED", {"signal": 9, "node": "n2", "reason": "JobLaunchFailure"},
         "was ended by signal 9, SIGKILL on n2 (FAILED): often for want of memory"),
        # Newer ones' squeue tells the signal.
        ("FAILED", {"reason": "RaisedSignal:11(Segmentation fault)"}, "was ended by signal 11, SIGSEGV (FAILED)"),
        ("FAILED", {"reason": "RaisedSignal:53(Real-time signal 19)", "signal": 53},
         ("could not be set up (FAILED, signal 53): "
          "its log's folder is missing on the node, or cannot be written there")),
        ("FAILED", {"signal": 12}, "was ended by signal 12, SIGUSR2 (FAILED)"),
        ("FAILED", {"signal": 99}, "was ended by signal 99 (FAILED)"),
        ("FAILED", {"signal": 53, "node": "n1"},
         ("could not be set up on n1 (FAILED, signal 53): "
          "its log's folder is missing on the node, or cannot be written there")),
        ("FAILED", {"exit_code": 1, "node": "None assigned", "reason": "BadConstraints"},
         "never started (FAILED, BadConstraints, exit code 1): no node of the cluster is what the job asks for"),
        ("TIMEOUT", {"walltime": "08:00:00", "node": "n1"},
         "ran into its walltime of 08:00:00 on n1 (TIMEOUT): raise job.time, or let it resume from a checkpoint"),
        ("TIMEOUT", {}, "ran into its walltime (TIMEOUT): raise job.time, or let it resume from a checkpoint"),
        ("OUT_OF_MEMORY", {"signal": 125, "node": "n1"},
         "used more memory than it had asked for on n1 (OUT_OF_MEMORY): raise job.memory"),
        ("NODE_FAIL", {"node": "n1"}, "lost its node n1 (NODE_FAIL): no fault of the trial's: a retry may go well"),
        # Sacct still tells what the task once waited for.
        ("NODE_FAIL", {"reason": "JobArrayTaskLimit"},
         "lost its node (NODE_FAIL): no fault of the trial's: a retry may go well"),
        ("BOOT_FAIL", {"node": "n1"},
         "met a node that did not boot on n1 (BOOT_FAIL): no fault of the trial's: a retry may go well"),
        ("PREEMPTED", {"node": "n2"},
         "gave way to a job of higher priority on n2 (PREEMPTED): a retry may go well"),
        ("REQUEUED", {}, "was put back into the queue (REQUEUED): it runs again"),
        ("CANCELLED", {"by": "0"}, "was cancelled by root (CANCELLED by 0): an administrator, or Slurm itself"),
        ("CANCELLED", {"by": "root"}, "was cancelled by root (CANCELLED by root): an administrator, or Slurm itself"),
        ("CANCELLED", {"by": "1000", "node": "n1"}, "was cancelled by user 1000 on n1 (CANCELLED by 1000)"),
        ("CANCELLED", {"by": "ada"}, "was cancelled by ada (CANCELLED by ada)"),
        ("CANCELLED", {"reason": "JobArrayTaskLimit"}, "was cancelled (CANCELLED)"),
        ("CANCELLED", {"reason": "DependencyNeverSatisfied"}, "was cancelled (CANCELLED, DependencyNeverSatisfied)"),
        ("DEADLINE", {"exit_code": 1, "node": "None assigned"},
         "could not end by its deadline (DEADLINE): lower job.time, or submit it with a later deadline"),
        ("REVOKED", {}, "was taken over by another cluster of the federation (REVOKED)"),
        ("RECONFIG_FAIL", {"node": "n1", "exit_code": 1, "signal": 15, "reason": "NodeFeature"},
         "ended on n1 as Slurm says: RECONFIG_FAIL, NodeFeature, exit code 1, signal 15, SIGTERM"),
        ("NEW_STATE", {"reason": "None"}, "ended as Slurm says: NEW_STATE"),
    ],
)  # fmt: skip
def test_an_end_is_told_with_the_scheduler_s_own_word(state: str, facts: dict[str, str | int], words: str) -> None:
    assert ended(state, **facts) == words  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "reason",
    ["", "None", "Priority", "Resources", "BeginTime", "Dependency", "JobArrayTaskLimit", "Prolog", "Cleaning",
     "Resources,BeginTime", "Priority, Resources"],
)  # fmt: skip
def test_what_every_job_waits_for_is_not_told(reason: str) -> None:
    assert waiting(reason, "12") is None


NEVER, MAY = True, False
DOWN = "ReqNodeNotAvail, UnavailableNodes:gpu_[1-2]"


@pytest.mark.parametrize(
    ("reason", "meaning", "remedy", "never"),
    [
        ("JobHeldUser", "held", "`scontrol release 12` lets it start", MAY),
        ("JobHeldAdmin", "held by an administrator", "ask those who run the cluster", MAY),
        ("JobHoldMaxRequeue", "held after too many requeues", "`scontrol release 12` lets it start", MAY),
        ("launch failed requeued held", "held after a launch that failed",
         "a fault of the node, as a rule its prolog: `scontrol release 12` tries again", MAY),
        ("job requeued in held state", "requeued and held", "`scontrol release 12` lets it start", MAY),
        ("DependencyNeverSatisfied", "waiting for what can no longer happen",
         "what the job depends on ended otherwise: cancel it, and check job.dependency", NEVER),
        ("PartitionTimeLimit", "asking for more time than the partition gives",
         "lower job.time (`sinfo -o '%P %l'` tells the limits)", NEVER),
        ("PartitionNodeLimit", "asking for more nodes than the partition gives",
         "lower job.nodes (`scontrol show partition` tells what it gives)", NEVER),
        ("PartitionConfig", "asking for more than the partition gives, in time, nodes, cores or memory",
         "`scontrol show partition` tells what it gives", NEVER),
        ("PartitionDown", "waiting for the partition, which is down", "choose another job.partition, or wait", MAY),
        ("PartitionInactive", "waiting for the partition, which starts no jobs now",
         "choose another job.partition, or wait", MAY),
        (DOWN, "waiting for nodes that are down, drained or reserved", "`sinfo -R` tells why", MAY),
        (f"{DOWN},BeginTime", "waiting for nodes that are down, drained or reserved", "`sinfo -R` tells why", MAY),
        ("ReqNodeNotAvail, May be reserved for other job", "waiting for nodes that are drained, or kept for others",
         "`sinfo -R` and `scontrol show reservation` tell which and until when; a shorter job.time may fit in before",
         MAY),
        ("ReqNodeNotAvail, Reserved for maintenance", "waiting, not to run into a maintenance of the nodes",
         "lower job.time to end before it, or wait until after", MAY),
        ("Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions",
         "waiting for nodes",
         "`sinfo -R` tells which are down; those that only serve others now come back by themselves", MAY),
        ("Reservation", "waiting for the reservation to begin", "`scontrol show reservation` tells when", MAY),
        ("ReservationDeleted", "asking for a reservation that is gone", "cancel it, and check job.reservation", NEVER),
        ("Licenses", "waiting for licenses", "`scontrol show licenses` tells how many are free", MAY),
        ("BadConstraints", "asking for what no node of the cluster is",
         "check job.constraint, job.gres, job.gpu_type and job.memory", NEVER),
        ("InvalidAccount", "under an account that is not, or no longer, valid",
         "check job.account (`sacctmgr show assoc user=$USER`)", NEVER),
        ("InvalidQOS", "under a QOS that is not, or no longer, valid",
         "check job.qos (`sacctmgr show assoc user=$USER format=qos`)", NEVER),
        ("AccountNotAllowed", "under an account that the partition does not admit",
         "choose another job.account or job.partition", NEVER),
        ("SomethingNew", "waiting", "`scontrol show job 12` tells more", MAY),
    ],
)  # fmt: skip
def test_a_wait_is_told_with_a_remedy(reason: str, meaning: str, remedy: str, never: bool) -> None:
    assert waiting(reason, "12") == (f"{meaning} ({reason}): {remedy}", never)


def test_of_several_reasons_the_first_that_matters_is_told() -> None:
    assert waiting(f"BeginTime,{DOWN}", "12") == waiting(DOWN, "12")


@pytest.mark.parametrize(
    ("reason", "begins", "never"),
    [
        ("AssocMaxJobsLimit", "waiting for room under a limit of the account", MAY),
        ("QOSMaxCpuPerUserLimit", "waiting for room under a limit of the QOS", MAY),
        ("QOSMaxGRESPerUser", "waiting for room under a limit of the QOS", MAY),
        ("QOSMaxJobsPerUserLimit", "waiting for room under a limit of the QOS", MAY),
        ("QOSMaxNodePerUserLimit", "waiting for room under a limit of the QOS", MAY),
        ("QOSGrpCpuLimit", "waiting for room under a limit of the QOS", MAY),
        ("AssocGrpGRES", "waiting for room under a limit of the account", MAY),
        ("AssocGrpNodeLimit", "waiting for room under a limit of the account", MAY),
        ("MaxGRESPerAccount", "waiting for room under a limit of the QOS", MAY),
        ("MaxJobsPerAccount", "waiting for room under a limit of the QOS", MAY),
        ("QOSResourceLimit", "waiting for room under a limit of the QOS", MAY),
        ("AssociationJobLimit", "waiting for room under a limit of the account", MAY),
        ("AccountingPolicy", "waiting for room under a limit of the account or QOS", MAY),
        ("AssocGrpCPURunMinutesLimit", "waiting for room under a limit of the account on the time of what runs", MAY),
        ("MaxCpuRunMinsPerUser", "waiting for room under a limit of the QOS on the time of what runs", MAY),
        ("AssocGrpCPUMinutesLimit", "waiting, for the hours of the account are used up", MAY),
        ("QOSGrpGRESMinutes", "waiting, for the hours of the QOS are used up", MAY),
        ("AssocGrpWallLimit", "waiting, for the hours of the account are used up", MAY),
        ("QOSMaxWallDurationPerJobLimit", "asking for more than the QOS gives one job", NEVER),
        ("AssocMaxWallDurationPerJobLimit", "asking for more than the account gives one job", NEVER),
        ("AssocMaxCpuPerJobLimit", "asking for more than the account gives one job", NEVER),
        ("QOSMaxCpuMinutesPerJobLimit", "asking for more than the QOS gives one job", NEVER),
        ("QOSMaxGRESPerNode", "asking for more than the QOS gives one job", NEVER),
        ("QOSMinCpuNotSatisfied", "asking for less than the QOS wants a job to ask for", NEVER),
        ("QOSMinGRES", "asking for less than the QOS wants a job to ask for", NEVER),
        ("MaxMemPerLimit", "asking for more memory a core or a node than is allowed", NEVER),
        ("AssocGrpSubmitJobsLimit", "over a limit of the account on queued tasks", MAY),
    ],
)
def test_a_limit_says_whose_it_is_and_whether_waiting_helps(reason: str, begins: str, never: bool) -> None:
    told = waiting(reason, "12")
    assert told is not None
    assert told[0].startswith(f"{begins} ({reason}): ") and told[1] is never


def test_a_limit_on_walltime_says_what_to_lower() -> None:
    told = waiting("QOSMaxWallDurationPerJobLimit", "12")
    assert told is not None
    assert told[0].endswith(": lower job.time (`sacctmgr show qos` tells the limits)")
