"""Projects whose trials run in containers, and what is left of those."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.rig.daemons import environments
from tests.rig.docker import DockerRig
from tests.rig.images import Image
from tests.rig.registry import RegistryRig

# What it computes hangs on its seed alone: not on where it runs, nor on which Python does.
TRAIN = """
import json, math, os, random, sys

seed = int(sys.argv[1])
chance = random.Random(seed)
weight = 0.0
for step in range(500):
    weight -= 0.01 * (math.tanh(weight) - chance.random()) * math.cos(chance.uniform(-1.0, 1.0))
loss = math.fsum((math.tanh(weight) - chance.random()) ** 2 for _ in range(100)) / 100
with open(os.environ["NEXA_METRICS"], "w") as file:
    json.dump({"loss": loss, "weight": weight}, file)
print("trained with seed", seed)
"""


# A line each; values of several lines go where lines are not what a file is made of.
HOSTILE_LINES = [
    "", " ", "a b", "'", '"', '""', "$(id)", "`id`", "${HOME}", "\\", "\\n", "ü ☃ 𝄞", ",", "a,b=c", ";:|&<>", "%s %d",
    "-rf", "--", "*", "~", "#no comment", "=", "\t", "{seed}", "!!",
]  # fmt: skip
HOSTILE = [*HOSTILE_LINES, "a\nb", "\n", "a\n"]
# What a folder may be called, and what Docker could read as more than a name.
HOSTILE_NAME = "-x 'a' \"b\" $(id) `id` ${HOME} \\ ü,;=%\n *"
COMPARES = """
import json, os, pathlib, sys

expected = json.load(open("expected.json"))
different = [name for name, value in expected["env"].items() if os.environ.get(name) != value]
different += [place for place in expected["mounts"] if pathlib.Path(place, "file").read_text() != place]
if sys.argv[1:] != expected["args"]:
    different.append(repr(sys.argv))
if not os.environ["NEXA_RUN_DIR"].startswith(expected["home"]):
    different.append(os.environ["NEXA_RUN_DIR"])
pathlib.Path(os.environ["NEXA_METRICS"]).write_text(json.dumps({"different": len(different)}))
print("different", len(different), *different)
"""


def boxed_project(
    folder: Path,
    container: Mapping[str, Any] | None,
    *,
    seeds: Sequence[int] = (1, 2, 3),
    program: str = TRAIN,
    command: Sequence[str] = ("python3", "train.py"),
    **more: Any,
) -> Path:
    """Write a git repository with train.py and the config of a sweep that runs it, a trial a seed; return the config.

    Where `container` is None its trials run as they are. The seed follows the command.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.py").write_text(program)
    config: dict[str, Any] = {
        "job": {"name": "boxed", "array_parallelism": 2, **more.pop("job", {})},
        "launcher": {"type": "command", "command": [*command, "{seed}"]},
        "sweep": {"parameters": {"seed": list(seeds)}},
        **({} if container is None else {"container": dict(container)}),
        **more,
    }
    path = folder / "boxed.yaml"
    path.write_text(json.dumps(config, ensure_ascii=False))
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "All"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return path


def hostile_project(folder: Path, container: Mapping[str, Any], home: Path) -> Path:
    """Write a project whose one trial counts the values, mounts and arguments that arrive other than they were sent.

    Its runs are to be in `home`, whose name may be hostile too; what it mounts lies beside `folder`.
    """
    env = {f"BOX_{number}": value for number, value in enumerate(HOSTILE)}
    job = {f"JOB_{number}": value for number, value in enumerate(HOSTILE)}
    filed = {f"FILE_{number}": value for number, value in enumerate(HOSTILE_LINES)}
    folder.mkdir(parents=True)
    env_file = folder.parent / "env file"
    env_file.write_text("".join(f"{name}={value}\n" for name, value in filed.items()))
    env_file.chmod(0o600)
    mounts = hostile_mounts(folder.parent)
    expected = {
        "env": env | job | filed,
        "mounts": [each["target"] for each in mounts],
        "args": [*HOSTILE, "1"],
        "home": str(home),
    }
    (folder / "expected.json").write_text(json.dumps(expected))
    return boxed_project(
        folder,
        {**container, "env": env, "mounts": mounts},
        seeds=[1],
        program=COMPARES,
        command=["python3", "train.py", *(value.replace("{", "{{").replace("}", "}}") for value in HOSTILE)],
        job={"env": job, "env_file": str(env_file)},
    )


def hostile_mounts(folder: Path) -> list[dict[str, str]]:
    """Make folders of hostile names, each with a file that says where it is to be seen."""
    mounts = []
    for number, name in enumerate(["plain", HOSTILE_NAME, "a:b,readonly", "\\n\n last\n"]):
        (source := folder / "data" / f"{number}{name}").mkdir(parents=True)
        target = f"/mnt/{name}"
        (source / "file").write_text(target)
        mounts.append({"source": str(source), "target": target})
    return mounts


def pushed(docker: DockerRig, registry: RegistryRig, image: Image, name: str, mark: str, *, mib: int = 0) -> str:
    """Push an image of its own, with a file /`mark` of `mib` MiB, and return its digest; the engine keeps nothing."""
    fill = ["dd", "if=/dev/urandom", f"of=/{mark}", "bs=1M", f"count={mib}"]
    made = docker.must("run", "--detach", "--network=none", docker.load(image), *fill).strip()
    docker.must("wait", made)
    docker.must("commit", made, f"marked:{mark}")
    docker.must("rm", made)
    digest = registry.push(docker, f"marked:{mark}", name)
    docker.must("rmi", f"marked:{mark}")
    return digest


def left_of(docker: DockerRig, run_id: str, directory: str | Path) -> list[str]:
    """Return what is left of a run here: its containers, whatever their state, and its processes."""
    mark = str(directory)
    processes = [str(process) for process, found in environments() if found.get("NEXA_RUN_DIR") == mark]
    return [*docker.containers(run_id), *processes]
