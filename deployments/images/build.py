"""The catalog's images: built by the machine's Docker, pushed to a registry, their digests written down."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from ruamel.yaml import YAML

from deployments.environment import SetupError
from nexa_infra.containers.catalog import Catalog, load_catalog, parse_catalog, target_of
from nexa_infra.runs.directory import write_atomically

FOLDER = Path(__file__).resolve().parent
CATALOG = FOLDER / "catalog.yaml"
# HOST[:PORT] and, mostly, a path below it; what Docker takes for a name.
_REGISTRY = re.compile(r"[a-z0-9]+(?:[.:-][a-z0-9]+)*(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)*")


@dataclass(frozen=True)
class Pushed:
    """An image as the registry has it."""

    target: str
    image: str
    digest: str


def targets_here(catalog: Catalog, names: Sequence[str]) -> list[str]:
    """Return the targets that are asked for, by default all whose Dockerfile lies here.

    Raises:
        ConfigError: one is not in the catalog; the nearest is named.
        SetupError: one has no Dockerfile here.
    """
    chosen = list(names) or [name for name in catalog.targets if _dockerfile(name).exists()]
    for name in chosen:
        target_of(catalog.model_copy(update={"require_digest": False}), name, file=CATALOG)
        if not _dockerfile(name).exists():
            raise SetupError(f"{name} is not built here: there is no {_dockerfile(name)}")
    return chosen


def build(
    names: Sequence[str] = (),
    *,
    base: str | None = None,
    arguments: Sequence[str] = (),
    network: str | None = None,
) -> dict[str, str]:
    """Build images, and return the name of each target's; `arguments` are Dockerfile ARGs, NAME=VALUE or NAME.

    Raises:
        ConfigError: a target is not in the catalog.
        SetupError: a build fails; what Docker said was shown.
    """
    catalog = load_catalog(CATALOG)
    built = {}
    for name in targets_here(catalog, names):
        image = catalog.targets[name].image.partition("@")[0]
        print(f"building {image}", flush=True)
        argv = ["build", "--tag", image, "--file", str(_dockerfile(name))]
        argv += ["--build-arg", f"BASE_IMAGE={base}"] if base else []
        argv += [word for argument in arguments for word in ("--build-arg", argument)]
        argv += ["--network", network] if network else []
        _docker(*argv, str(FOLDER), failure=f"{name} was not built", shown=True)
        built[name] = image
    return built


def push(registry: str, names: Sequence[str] = ()) -> list[Pushed]:
    """Push images that were built, to `registry`/NAME:TAG.

    Raises:
        ConfigError: a target is not in the catalog.
        SetupError: `registry` is no address, an image was not built, or the registry refuses it.
    """
    if not _REGISTRY.fullmatch(registry):
        raise SetupError(f"{registry!r} is no registry: write HOST/PREFIX, such as registry.example.org/team")
    catalog = load_catalog(CATALOG)
    pushed = []
    for name in targets_here(catalog, names):
        local = catalog.targets[name].image.partition("@")[0]
        image = f"{registry}/{local.rpartition('/')[2]}"
        _docker("tag", local, image, failure=f"{name} is not built: python -m deployments.images build {name}")
        print(f"pushing {image}", flush=True)
        _docker("push", image, failure=f"{image} was not pushed: is `docker login` needed?", shown=True)
        told = _docker("image", "inspect", "--format", "{{json .RepoDigests}}", image, failure=f"{image} is gone")
        repository = image.rpartition(":")[0]
        digests = [each.partition("@")[2] for each in json.loads(told) if each.startswith(f"{repository}@")]
        if len(digests) != 1:
            raise SetupError(f"{image} was pushed, but Docker does not say by which digest: {told.strip()}")
        pushed.append(Pushed(name, image, digests[0]))
    return pushed


def record(pushed: Sequence[Pushed], file: Path) -> None:
    """Write where images are and their digests into a catalog, by default a copy of the project's own.

    What else stands in the file, comments too, stays as it is.

    Raises:
        ConfigError: the file is no catalog.
    """
    source = file if file.exists() else CATALOG
    load_catalog(source)  # complains of what is wrong with it
    yaml = YAML(typ="rt")
    yaml.preserve_quotes = True
    yaml.width = 120
    document = yaml.load(source.read_text())
    for each in pushed:
        target = document["targets"].setdefault(each.target, {})
        place = list(target).index("image") + 1 if "image" in target else 0
        target["image"] = each.image
        if "digest" in target:
            target["digest"] = each.digest
        else:
            target.insert(place, "digest", each.digest)
    text = StringIO()
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.dump(document, text)
    parse_catalog(text.getvalue(), str(file))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, text.getvalue(), mode=0o644)


def _dockerfile(name: str) -> Path:
    return FOLDER / name / "Dockerfile"


def _docker(*words: str, failure: str, shown: bool = False) -> str:
    """Run docker; what it prints is shown as it comes, or returned.

    Raises:
        SetupError: it fails, or there is no docker.
    """
    sys.stdout.flush()
    try:
        done = subprocess.run(
            ["docker", *words],
            stdout=None if shown else subprocess.PIPE,
            stderr=None if shown else subprocess.PIPE,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise SetupError(
            "there is no docker on this machine: install its engine, or its client and set DOCKER_HOST"
        ) from None
    if done.returncode:
        told = "" if shown else f"\n{done.stderr.strip()}"
        raise SetupError(f"{failure} (docker {words[0]}, exit code {done.returncode}){told}")
    return done.stdout or ""
