"""The same 1,000 trials queued by submitit and by Hydra's launcher, each from a fresh process, beside the engine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path

from benchmarks.measure import ROOT, BenchmarkError, Figure, alternated, environment, place, say, timed
from benchmarks.rig import environment_on, rig
from benchmarks.slurm import ARRAY, CONFIG, TRIALS, make_repository, sbatch
from tests.rig.slurm import SlurmRig

ROUNDS = 5
# From the registry, into an environment of their own; the launcher alone would take Hydra's next release candidate.
PEERS = ("submitit==1.5.4", "hydra-submitit-launcher==1.2.0", "hydra-core==1.3.8", "omegaconf==2.3.1")
FOLDER = ROOT / ".nexa" / "bench-peers"
PATIENCE = 600.0  # seconds

# Each asks for what the config asks for.
_ENGINE = """\
import sys

from nexa_infra import prepare_slurm_batch

prepare_slurm_batch(sys.argv[1], submit=True, output_dir=sys.argv[2])
"""
_SUBMITIT = f"""\
import itertools
import sys

import submitit


def train(a, b, c):
    return 0.0


if __name__ == "__main__":
    executor = submitit.AutoExecutor(folder=sys.argv[1], cluster="slurm")
    executor.update_parameters(
        name="bench",
        timeout_min=5,
        slurm_mem="100M",
        slurm_array_parallelism={TRIALS},
        slurm_additional_parameters={{"hold": True}},
    )
    executor.map_array(train, *zip(*itertools.product(range(10), repeat=3)))
"""
_HYDRA = """\
import hydra


@hydra.main(version_base="1.3", config_path=None)
def train(config):
    return 0.0


if __name__ == "__main__":
    train()
"""
_MULTIRUN = (
    "--multirun",
    "hydra/launcher=submitit_slurm",
    "hydra.launcher.name=bench",
    "hydra.launcher.timeout_min=5",
    f"hydra.launcher.array_parallelism={TRIALS}",
    "+hydra.launcher.additional_parameters={mem: 100M, hold: true}",
    *(f"+{name}={','.join(map(str, range(10)))}" for name in "abc"),
)


def peers() -> Iterator[Figure]:
    """Queue 1,000 trials on the login node: from the start of a process until squeue shows them all, in turn.

    `submit.process` is the verb, which takes the whole road; `submit.script` writes and queues, as the
    peers do. Hydra's launcher is measured once, for it takes a while, and ended there: it would wait
    for results. The snapshot of the code, and bytecode, are there from a round before.
    """
    python = _python_of_peers()
    with place() as here, rig(here, make_repository) as (cluster, _):
        env = environment_on(here, cluster)
        theirs = {name: value for name, value in env.items() if name != "PYTHONPATH"}
        for name, text in (("engine", _ENGINE), ("submitit", _SUBMITIT), ("hydra", _HYDRA)):
            (here.folder / f"by_{name}.py").write_text(text)
        login_node = here.folder / "login-node.yaml"
        login_node.write_text(json.dumps({"workdir": str(here.folder / "work")}))
        folders = (str(here.folder / "out" / str(number)) for number in count())

        def queued(env: Mapping[str, str], *argv: str | Path) -> float:
            return _until_queued(cluster, [str(word) for word in argv], here.project, env)

        def script() -> float:
            return queued(env, sys.executable, here.folder / "by_engine.py", CONFIG, next(folders))

        def raw() -> float:
            seconds = timed(sbatch(here.folder / "out" / "0"), cwd=here.project, env=env).seconds
            _cancel_all(cluster)
            return seconds

        say(f"{ROUNDS} rounds of the engine, submitit and sbatch")
        script()
        verb = (sys.executable, "-m", "nexa_infra", "sweep", CONFIG, "--cluster", login_node)
        whole, written, submitit, bare = alternated(
            ROUNDS,
            lambda: queued(env, *verb),
            script,
            lambda: queued(theirs, python, here.folder / "by_submitit.py", next(folders)),
            raw,
        )
        say("Hydra's launcher, which takes a minute")
        sweep_dir = f"hydra.sweep.dir={next(folders)}"
        hydra = queued(theirs, python, here.folder / "by_hydra.py", *_MULTIRUN, sweep_dir)
    for name, seconds in (("process", whole), ("script", written), ("submitit", submitit), ("hydra", hydra)):
        beside = {"tool": "sbatch", "s": bare, "ratio": seconds / bare}
        yield Figure(f"submit.{name}", seconds, "s", baseline=beside)


def _until_queued(cluster: SlurmRig, argv: Sequence[str], cwd: Path, env: Mapping[str, str]) -> float:
    """Start a command; return the seconds until the queue shows the array. Both are ended then.

    Raises:
        BenchmarkError: the command ends without it, or `PATIENCE` goes by.
    """
    with tempfile.TemporaryFile("w+") as told:
        begun = time.perf_counter()
        with subprocess.Popen(
            argv, cwd=cwd, env=env, start_new_session=True, stdin=subprocess.DEVNULL, stdout=told, stderr=told
        ) as process:
            try:
                while True:
                    ended = process.poll() is not None
                    shown = cluster.run(["squeue", "-h", "--user=root", "-o", "%K"]).stdout.partition("%")[0].strip()
                    taken = time.perf_counter() - begun
                    if shown == ARRAY:
                        return taken
                    if ended or taken > PATIENCE:
                        told.seek(0)
                        words = "\n".join(told.read().splitlines()[-20:])
                        raise BenchmarkError(f"{argv[1]} did not queue {ARRAY} in {taken:.0f} s:\n{words}")
                    # To a hundredth of what it takes: looking takes time of what is looked at.
                    time.sleep(max(0.01, taken / 100))
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                _cancel_all(cluster)


def _cancel_all(cluster: SlurmRig) -> None:
    cluster.run(["scancel", "--user=root"])


def _python_of_peers() -> Path:
    """Return the Python of an environment that holds the peers, which is made at the first time.

    Raises:
        BenchmarkError: pip cannot get them.
    """
    python, stamp = FOLDER / "bin" / "python", FOLDER / "made-of"
    wanted = f"{sys.version}\n{' '.join(PEERS)}\n"
    if not stamp.exists() or stamp.read_text() != wanted:
        say(f"installing {', '.join(PEERS)} into {FOLDER}")
        shutil.rmtree(FOLDER, ignore_errors=True)
        try:
            timed([sys.executable, "-m", "venv", FOLDER], cwd=ROOT, env=environment())
            timed([python, "-m", "pip", "install", "--quiet", *PEERS], cwd=ROOT, env=environment())
        except BenchmarkError as error:
            raise BenchmarkError(f"the peers cannot be had from the registry: {error}") from error
        stamp.write_text(wanted)
    return python
