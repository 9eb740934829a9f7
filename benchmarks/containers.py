"""Containers beside the bare command lines of what runs them, and what kills leave behind; on the test rig's own parts.

`python -m benchmarks.containers FILE` is how this file calls itself, for a process of its own.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.measure import ROOT, BenchmarkError, Figure, Place, environment, place, say
from deployments.environment import SetupError
from nexa_infra.containers.catalog import Catalog, Target
from nexa_infra.containers.runner import run_container
from nexa_infra.spec.container import RuntimeName
from tests.rig import images
from tests.rig.apptainer import ApptainerRig
from tests.rig.docker import DockerRig
from tests.rig.fixtures import why_not

PAIRS = 15
KILLS = 100
PATIENCE = 30.0
TARGET = "bench"
# What runs in a container that is killed: it says where it is, and would take an hour.
_LONG = ("sh", "-c", "echo up; sleep 3600")


@dataclass(frozen=True)
class Parts:
    """What runs containers here, and the images that they run."""

    docker: DockerRig
    apptainer: ApptainerRig
    image: str
    sif: Path

    @property
    def environment(self) -> dict[str, str]:
        """An environment in which `docker` and `apptainer` are these."""
        more = {"DOCKER_HOST": self.docker.host, "DOCKER_CONFIG": str(self.docker.config)}
        found = environment() | self.apptainer.environment()
        return {**found, **more, "PYTHONPATH": str(ROOT)}


def containers() -> Iterator[Figure]:
    """Run `true` in a container by the engine and by the runtime's own command line, in turn, the image warm.

    The engine's calls are made in one process that has imported it, as a flow's are; each pair is one after the
    other, and the value is the median of the pairs' ratios.
    """
    with parts() as (here, found):
        for runtime, raw in (("docker", _docker(found)), ("apptainer", _apptainer(found))):
            say(f"{PAIRS} pairs of containers, by {runtime}")
            order = {"runtime": runtime, "image": str(found.sif) if runtime == "apptainer" else found.image, "raw": raw}
            file = here.folder / f"{runtime}.json"
            file.write_text(json.dumps(order))
            answer = here.python("-m", "benchmarks.containers", file, env=_inside(here, found)).answer()
            told = {
                "tool": shlex.join(raw[:2]),
                "s": answer["raw"],
                "ours_s": answer["ours"],
                "ratios": answer["ratios"],
            }
            value = statistics.median(answer["ratios"])
            yield Figure(f"containers.{runtime}", value, f"times {shlex.join(raw[:2])}", limit=1.2, baseline=told)
        say(f"{KILLS} clients killed at random instants")
        left, phases = killed(here, found, KILLS)
        yield Figure("containers.left-behind", left, f"containers, processes and mounts of {KILLS} kills", 0, phases)


def _docker(found: Parts) -> list[str]:
    return ["docker", "run", "--rm", "--network=none", "--entrypoint=/bin/sh", found.image, "-c", "true"]


def _apptainer(found: Parts) -> list[str]:
    return [
        "apptainer",
        "exec",
        "--contain",
        "--cleanenv",
        "--net",
        "--network=none",
        str(found.sif),
        "sh",
        "-c",
        "true",
    ]


def _inside(here: Place, found: Parts) -> dict[str, str]:
    return found.environment | {"NEXA_HOME": str(here.home)}


@contextmanager
def parts() -> Iterator[tuple[Place, Parts]]:
    """Start a dockerd and write an apptainer of the rig's, in a place that is removed with them."""
    if reason := why_not(containers=True):
        raise BenchmarkError(f"there can be no rig here: {reason}")
    with ExitStack() as stack:
        here = stack.enter_context(place())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nexa-rig-", ignore_cleanup_errors=True)))
        folder.chmod(0o755)
        try:
            docker = stack.enter_context(DockerRig(folder / "docker"))
            apptainer = ApptainerRig(folder / "apptainer")
            apptainer.write()
            busybox = images.busybox()
            docker.load(busybox)
            yield here, Parts(docker, apptainer, busybox.name, apptainer.sif(busybox))
        except SetupError as error:
            raise BenchmarkError(str(error)) from error


def killed(here: Place, found: Parts, times: int, *, seed: int = 20261124) -> tuple[int, dict[str, object]]:
    """Kill clients that run a container at random instants; return how much is left, and when they were killed."""
    chance = random.Random(seed)
    phases = {"before the container": 0, "while it ran": 0}
    before = _mounts()
    for number in range(times):
        runtime: RuntimeName = "docker" if number % 2 else "apptainer"
        order = {"runtime": runtime, "image": str(found.sif) if runtime == "apptainer" else found.image, "long": True}
        file = here.folder / "long.json"
        file.write_text(json.dumps(order))
        client = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.containers", file], cwd=here.project,
            env=_inside(here, found) | {"NEXA_BENCH_MARK": str(here.folder)},
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True, text=True,
        )  # fmt: skip
        # Half of the time from the first container's start on, the other half from the client's own.
        started = bool(client.stdout and client.stdout.readline()) if chance.random() < 0.7 else False
        time.sleep(chance.uniform(0.0, 0.6))
        client.send_signal(signal.SIGKILL)
        client.wait()
        phases["while it ran" if started else "before the container"] += 1
    deadline = time.monotonic() + PATIENCE
    while (left := _left(found, here.folder, before)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return len(left), {**phases, "left": left[:10], "seed": seed}


def _left(found: Parts, mark: Path, before: frozenset[str]) -> list[str]:
    gone = found.docker.run(["ps", "-aq", "--filter", "label=nexa.run"]).stdout.split()
    marked = f"NEXA_BENCH_MARK={mark}".encode()
    processes = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            if marked in words or any(word.startswith(b"NEXA_RUN_DIR=" + bytes(mark)) for word in words):
                processes.append(f"process {entry.name}")
    return [*gone, *processes, *(f"mount {each}" for each in _mounts() - before)]


def _mounts() -> frozenset[str]:
    return frozenset(line.split()[1] for line in Path("/proc/mounts").read_text().splitlines())


def _measure(order: Mapping[str, object]) -> None:
    """Measure in this process; the answer is one line of JSON."""
    catalog = Catalog(targets={TARGET: Target(image=str(order["image"]))})
    runtime: RuntimeName = "apptainer" if order["runtime"] == "apptainer" else "docker"

    def ours(command: Sequence[str] = ("sh", "-c", "true")) -> float:
        begun = time.perf_counter()
        run_container(
            TARGET, catalog=catalog, runtime=runtime, command=command, workspace=Path.cwd(),
            tell=lambda _, line: print(line, flush=True),
        ).check()  # fmt: skip
        return time.perf_counter() - begun

    if order.get("long"):
        ours(_LONG)
        return
    raw = [str(word) for word in order["raw"]]  # type: ignore[attr-defined]

    def bare() -> float:
        begun = time.perf_counter()
        subprocess.run(raw, check=True, stdin=subprocess.DEVNULL, capture_output=True, env=dict(os.environ))
        return time.perf_counter() - begun

    ours(), bare()
    taken = [(bare(), ours()) if number % 2 else (ours(), bare())[::-1] for number in range(PAIRS)]
    ratios = [round(one / other, 3) for other, one in taken]
    medians = {
        name: statistics.median(values) for name, values in zip(("raw", "ours"), zip(*taken, strict=True), strict=True)
    }
    print(json.dumps({**medians, "ratios": ratios}))


if __name__ == "__main__":
    _measure(json.loads(Path(sys.argv[1]).read_text()))
