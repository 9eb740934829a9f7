"""The script that starts torchrun on a node, by real bash, with a torchrun that only starts its ranks."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nexa_infra.runs.ranks import Gang, read_gang, read_records
from nexa_infra.scheduling.torchrun import gang_script
from tests.conftest import ROOT

PATIENCE = 60.0

# Starts WORLD ranks, each in a session of its own as torchrun does (or, with TOGETHER, in its own group).
TORCHRUN = r"""#!/bin/bash
printf '%s\0' "$@" >"$STUB/argv"
printf '%s' "$OMP_NUM_THREADS" >"$STUB/threads"
[[ -z ${HANG-} ]] || exec sleep 1000
until [[ $1 == --no-python && $2 == bash ]]; do shift; done
shift
pids=()
trap 'for pid in "${pids[@]}"; do kill -s TERM -- "-$pid"; done' TERM
for ((rank = 0; rank < ${WORLD:-1}; rank++)); do
  RANK=$rank ${TOGETHER-setsid} "$@" &
  pids+=("$!")
done
worst=0
for pid in "${pids[@]}"; do
  while :; do
    wait "$pid"
    code=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  echo "$code" >>"$STUB/codes"
  ((code == 0)) || worst=1
done
exit "$worst"
"""

# A rank that counts the warnings that come to it, until none has come for a while.
COUNTING = """
import os, pathlib, signal, time
told = []
for number in (signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, lambda number, frame: told.append(number))
pathlib.Path(os.environ["STUB"], "ready-" + os.environ["RANK"]).touch()
while not told:
    time.sleep(0.01)
time.sleep(1.5)
print("told", *told, flush=True)
"""

# A rank that takes a second to end.
SAVING = """
import os, pathlib, signal, sys, time
def save(number, frame):
    time.sleep(1)
    print("saved", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
pathlib.Path(os.environ["STUB"], "ready-" + os.environ["RANK"]).touch()
while True:
    time.sleep(0.01)
"""


class Node:
    """One node of a gang, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "it's bin"
        self.ranks = folder / "a trial" / "attempt-1"
        self.bin.mkdir()
        (self.bin / "torchrun").write_text(TORCHRUN)
        (self.bin / "torchrun").chmod(0o755)
        (self.bin / "python3").symlink_to(sys.executable)
        (folder / "gang.sh").write_text(gang_script())
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(
        self, *program: str, options: tuple[str, ...] = ("--no-python",), **variables: str | None
    ) -> subprocess.Popen[bytes]:
        """Start the node; a variable that is None is not set."""
        asked = {"PROCESSES": "1", "TASKS": "1", "CORES": "1", "NODES": "1", "RESTARTS": "0", "BACKEND": "c10d"}
        asked |= {"TIMEOUT": "600", "ENDPOINT": "", "HEAD": ""}
        environment: dict[str, str | None] = {
            **{f"NEXA_GANG_{name}": value for name, value in asked.items()},
            "NEXA_RANK_DIR": str(self.ranks),
            "NEXA_RUN_ID": "run",
            "NEXA_TRIAL": "0",
            "NEXA_ATTEMPT": "1",
            "SLURMD_NODENAME": "n1",
            "STUB": str(self.folder),
            "PATH": f"{self.bin}:/usr/bin:/bin",
            **variables,
        }
        words = ["bash", str(self.folder / "gang.sh"), "node", str(1 + len(options)), "torchrun", *options, *program]
        with (self.folder / "out").open("wb") as out, (self.folder / "err").open("wb") as err:
            started = subprocess.Popen(
                words,
                env={name: value for name, value in environment.items() if value is not None},
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        self.processes.append(started)
        return started

    def run(self, *program: str, options: tuple[str, ...] = ("--no-python",), **variables: str | None) -> int:
        """Take the node to its end."""
        return self.start(*program, options=options, **variables).wait(PATIENCE)

    @property
    def options(self) -> list[str]:
        """What torchrun was told before the rank's command."""
        words = (self.folder / "argv").read_text().split("\0")[:-1]
        return words[: words.index("bash") - 1]

    @property
    def out(self) -> str:
        """What the node has said."""
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        """What it has said of errors."""
        return (self.folder / "err").read_text()

    def log(self, rank: int) -> str:
        """A rank's log."""
        return (self.ranks / f"rank-{rank}.log").read_text()

    @property
    def gang(self) -> Gang:
        """What it recorded."""
        return read_gang(read_records(self.ranks))

    def until_ready(self, ranks: int) -> None:
        """Wait until so many ranks heed signals."""
        wait(lambda: all((self.folder / f"ready-{rank}").exists() for rank in range(ranks)))

    def left(self) -> list[int]:
        """Processes of it that live."""
        mark = f"STUB={self.folder}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (path / "environ").read_bytes().split(b"\0"):
                    found.append(int(path.name))
            except OSError:
                continue
        return found


def wait(true: Callable[[], object]) -> None:
    """Wait until something is true."""
    limit = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.02)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    yield made
    for process in made.processes:
        process.kill()
        process.wait()
    for pid in made.left():
        os.kill(pid, signal.SIGKILL)


def test_the_script_passes_shellcheck() -> None:
    path = ROOT / "nexa_infra" / "scheduling" / "templates" / "gang.sh"
    done = subprocess.run(["shellcheck", "--shell=bash", path], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("", 0)


# ---- what torchrun is told ----

MEETING = {"ENDPOINT": "n1:2000", "HEAD": "n1", "NODES": "2"}
C10D = ["--nnodes=2", "--rdzv-id=run-0-1", "--rdzv-backend=c10d", "--rdzv-endpoint=n1:2000"]
CONF = "--rdzv-conf=join_timeout=600,read_timeout=600"
STATIC = ["--rdzv-backend=static", "--node-rank=1", "--master-addr=n1", "--master-port=2000"]


@pytest.mark.parametrize(
    ("gang", "variables", "options"),
    [
        ({}, {}, ["--standalone"]),
        (MEETING, {"SLURM_NODEID": "0"}, [*C10D, f"{CONF},is_host=1"]),
        (MEETING, {"SLURM_NODEID": "1"}, [*C10D, f"{CONF},is_host=0"]),
        ({**MEETING, "HEAD": ""}, {"SLURM_NODEID": "1"}, [*C10D, CONF]),
        ({**MEETING, "NODES": "1:2"}, {}, ["--nnodes=1:2", *C10D[1:], f"{CONF},is_host=1"]),
        (
            {**MEETING, "BACKEND": "static", "TIMEOUT": "30"},
            {"SLURM_NODEID": "1"},
            ["--nnodes=2", *STATIC, "--rdzv-conf=timeout=30"],
        ),
        ({"PLACED": "1", "NODES": "2"}, {"SLURM_NODEID": "1"}, ["--nnodes=2", "--node-rank=1"]),
        ({"PLACED": "1", "NODES": "2"}, {"NEXA_SCHEDULER": "local"}, ["--standalone"]),
    ],
)
def test_torchrun_is_told_where_its_nodes_meet(
    node: Node, gang: dict[str, str], variables: dict[str, Any], options: list[str]
) -> None:
    told: dict[str, Any] = {f"NEXA_GANG_{name}": value for name, value in gang.items()}
    assert node.run("true", **told, **variables) == 0
    assert node.options == ["--nproc-per-node=1", "--max-restarts=0", *options, "--no-python"]
    assert node.gang.endpoint == gang.get("ENDPOINT", "")
    assert not node.left(), "nothing that watched over it outlives it"


@pytest.mark.parametrize(
    ("asked", "gpus", "granted", "processes", "threads"),
    [
        ("auto", None, None, 2, 4),
        ("auto", "0,1,2,3", None, 4, 2),
        ("auto", "GPU-a,GPU-b", "8", 2, 4),
        ("auto", None, "3", 3, 2),
        ("auto", "NoDevFiles", None, 2, 4),
        ("gpu", "5", None, 1, 8),
        ("cpu", None, None, 8, 1),
        ("cpu", "0,1", None, 8, 1),
        ("3", None, None, 3, 2),
        ("1", "0,1", None, 1, 8),
        ("16", None, None, 16, 1),
    ],
)
def test_as_many_processes_are_started_as_the_launcher_asks(
    node: Node, asked: str, gpus: str | None, granted: str | None, processes: int, threads: int
) -> None:
    variables: dict[str, Any] = {"CUDA_VISIBLE_DEVICES": gpus, "SLURM_GPUS_ON_NODE": granted, "WORLD": "0"}
    variables |= {"NEXA_GANG_PROCESSES": asked, "NEXA_GANG_TASKS": "2", "NEXA_GANG_CORES": "8"}
    assert node.run("true", **variables) == 0
    assert node.options[0] == f"--nproc-per-node={processes}"
    assert (node.folder / "threads").read_text() == str(threads), "what is left of the cores"


def test_threads_that_a_person_has_set_stay(node: Node) -> None:
    assert node.run("true", NEXA_GANG_CORES="8", OMP_NUM_THREADS="3") == 0
    assert (node.folder / "threads").read_text() == "3"


@pytest.mark.parametrize(
    ("asked", "gpus", "told"),
    [
        ("3", "0,1", "nproc_per_node: 3 makes 3 processes, but n1 has granted 2 GPUs"),
        ("gpu", None, "nproc_per_node: gpu, but n1 has granted no GPU to this job"),
    ],
)
def test_a_node_that_has_granted_too_few_gpus_says_so(node: Node, asked: str, gpus: str | None, told: str) -> None:
    assert node.run("true", NEXA_GANG_PROCESSES=asked, CUDA_VISIBLE_DEVICES=gpus) == 78
    assert node.err == f"gang.sh: {told}\n"


@pytest.mark.skipif(shutil.which("torchrun", path="/usr/bin:/bin") is not None, reason="the system has a torchrun")
def test_a_node_without_torchrun_says_so(node: Node) -> None:
    assert node.run("true", PATH="/usr/bin:/bin") == 127
    assert node.err.startswith("gang.sh: torchrun is not installed on n1: ")


# ---- what its ranks are started as ----


@pytest.mark.parametrize("options", [("--no-python",), ("--role=r", "--no_python")])
def test_a_program_that_is_no_python_is_started_as_it_is(node: Node, options: tuple[str, ...]) -> None:
    assert node.run("bash", "-c", "echo by bash", options=options) == 0
    assert node.out == "by bash\n"


def test_a_script_and_a_module_are_started_by_the_python_beside_torchrun(node: Node) -> None:
    (node.folder / "train.py").write_text("import sys; print(sys.argv[1:], sys.executable)\n")
    assert node.run(str(node.folder / "train.py"), "--lr", "1", options=()) == 0
    assert node.out == f"['--lr', '1'] {node.bin}/python3\n"
    assert node.run("-m", "json.tool", "--help", options=("--role", "r")) == 0
    assert "json.tool" in node.out or "usage" in node.out


def test_arguments_arrive_byte_for_byte(node: Node) -> None:
    words = ["a b", "it's", '"', "$HOME `ls` \\", "two\nlines\n", "", "--no-python", "*", "-n", "é\t"]
    (node.folder / "train.py").write_text(
        "import os, sys; open(os.environ['STUB'] + '/got', 'w').write('\\0'.join(sys.argv[1:]))\n"
    )
    assert node.run(str(node.folder / "train.py"), *words, options=()) == 0
    assert (node.folder / "got").read_text().split("\0") == words


def test_rank_0_is_heard_and_every_rank_has_its_log(node: Node) -> None:
    code = "echo out $RANK; echo err $RANK >&2"
    assert node.run("bash", "-c", code, WORLD="2") == 0
    assert (node.out, node.err) == ("out 0\n", "err 0\n")
    assert sorted(node.log(0).splitlines()) == ["err 0", "out 0"]
    assert node.log(1) == "out 1\nerr 1\n"
    assert node.gang.started == {0, 1} and [end.code for end in node.gang.ends] == [0, 0]


def test_a_rank_that_is_started_again_goes_on_in_its_log(node: Node) -> None:
    assert node.run("bash", "-c", "echo first") == 0
    assert node.run("bash", "-c", "echo second", TORCHELASTIC_RESTART_COUNT="1") == 0
    assert node.log(0) == "first\n-- restart 1 --\nsecond\n"
    assert node.gang.restarts == 1


@pytest.mark.parametrize(
    ("program", "code", "by"),
    [
        ("exit 3", 3, None),
        ("kill -KILL $$", 137, "SIGKILL"),
        ("kill -SEGV $$", 139, "SIGSEGV"),
        ("exit 200", 200, None),
    ],
)
def test_how_a_rank_ends_is_recorded_and_passed_on(node: Node, program: str, code: int, by: str | None) -> None:
    assert node.run("bash", "-c", f'[ "$RANK" = 0 ] || {{ {program}; }}', WORLD="2") == 1
    (failure,) = node.gang.failures
    assert (failure.rank, failure.code, failure.signal, failure.node) == (1, code, by, "n1")
    assert (node.folder / "codes").read_text() == f"0\n{code}\n"
    assert node.log(1) == "", "what bash says of a child's death is no word of the program's"


def test_what_a_program_leaves_behind_holds_nobody_up(node: Node) -> None:
    begun = time.monotonic()
    assert node.run("bash", "-c", "sleep 1000 & echo done") == 0
    assert time.monotonic() - begun < 30
    assert node.out == "done\n"


# ---- ends and warnings ----


def test_a_program_that_saves_itself_when_told_to_end_is_waited_for(node: Node) -> None:
    started = node.start("-c", SAVING, options=(), WORLD="2")
    node.until_ready(2)
    started.send_signal(signal.SIGTERM)
    started.wait(PATIENCE)
    assert node.log(0) == node.log(1) == node.out == "saved\n"
    assert [end.code for end in node.gang.ends] == [0, 0]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_warning_to_the_leader_alone_reaches_every_rank_once(node: Node, number: signal.Signals) -> None:
    started = node.start("-c", COUNTING, options=(), WORLD="2")
    node.until_ready(2)
    started.send_signal(number)
    assert started.wait(PATIENCE) == 0
    assert node.log(0) == node.log(1) == f"told {int(number)}\n"
    assert (node.ranks / "warned").exists() == (number == signal.SIGUSR1)


def test_a_warning_to_every_process_reaches_every_rank_once(node: Node) -> None:
    started = node.start("-c", COUNTING, options=(), WORLD="2", TOGETHER="")
    node.until_ready(2)
    os.killpg(started.pid, signal.SIGUSR1)
    assert started.wait(PATIENCE) == 0
    assert node.log(0) == node.log(1) == f"told {int(signal.SIGUSR1)}\n"


def test_a_warning_on_this_machine_reaches_ranks_in_sessions_of_their_own(node: Node) -> None:
    started = node.start("-c", COUNTING, options=(), WORLD="2", NEXA_SCHEDULER="local")
    node.until_ready(2)
    os.killpg(started.pid, signal.SIGUSR1)
    assert started.wait(PATIENCE) == 0
    assert node.log(0) == node.log(1) == f"told {int(signal.SIGUSR1)}\n"


def test_a_rank_that_was_warned_is_not_started_again(node: Node) -> None:
    node.ranks.mkdir(parents=True)
    (node.ranks / "warned").touch()
    assert node.run("bash", "-c", "echo started again") == 1
    assert node.out == "" and not node.gang.started


def test_nodes_that_do_not_meet_are_given_up(node: Node) -> None:
    code = node.run("true", NEXA_GANG_ENDPOINT="n1:2000", NEXA_GANG_TIMEOUT="-9", HANG="1")
    assert code == 137
    assert "gang.sh: the nodes have not met at n1:2000 within -9 s\n" in node.err
    assert not node.left()


def test_nodes_that_have_met_are_not_given_up(node: Node) -> None:
    code = node.run("sleep", "2.5", NEXA_GANG_ENDPOINT="n1:2000", NEXA_GANG_TIMEOUT="-9")
    assert (code, node.err) == (0, "")


def test_a_folder_that_cannot_be_written_ends_the_node(node: Node) -> None:
    (node.folder / "a trial").touch()
    assert node.run("true") == 73


def test_a_rank_s_log_keeps_the_beginning_and_the_end_within_its_limit(node: Node) -> None:
    many = 300_000
    assert node.run("seq", "-f", "%09.0f", str(many), WORLD="2", NEXA_GANG_LOG="524288 262144 16384") == 0
    everything = "".join(f"{number:09}\n" for number in range(1, many + 1))
    assert node.out == everything, "rank 0 is heard, and that has a limit of its own"
    for rank in range(2):
        beginning, end = node.log(rank), ""
        for part in ("before", "last"):
            end += (node.ranks / f"rank-{rank}.log.{part}").read_text()
        assert everything.startswith(beginning) and everything.endswith(end)
        assert len(beginning) > 2**18 and len(end) > 2**18 and len(beginning) + len(end) <= 2**20
