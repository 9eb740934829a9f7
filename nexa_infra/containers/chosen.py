"""The container that a config asks for, with each complaint at its key."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nexa_infra.containers.catalog import CATALOG_ITSELF, Catalog, load_catalog
from nexa_infra.containers.pin import pin
from nexa_infra.errors import ConfigError, ContainerError, Problem
from nexa_infra.hosts.connections import host_of
from nexa_infra.runs.record import Container
from nexa_infra.settings import settings
from nexa_infra.spec.cluster import Cluster
from nexa_infra.spec.container import ContainerSpec
from nexa_infra.spec.load import code_root, problem_at
from nexa_infra.spec.run import SweepConfig, TrainingConfig

# The project's own catalog, from the top of its code.
CATALOG = Path("deployments", "images", "catalog.yaml")


def container_of(
    config: SweepConfig | TrainingConfig,
    file: Path | None,
    cluster: Cluster | None,
    *,
    catalog: Catalog | None = None,
    overrides: Sequence[str] = (),
    here: bool | None = None,
) -> Container | None:
    """Return the container that a config's trials run in, frozen; None where they run as they are.

    `here` says whether they run on this machine; unset, they do where there is no cluster.

    Raises:
        ConfigError: what is asked makes no sense; the message names the key.
        ContainerError: the image cannot be had, or nothing runs it.
    """
    asked = config.container
    if asked is None:
        return None
    try:
        if asked.target is not None and catalog is None and asked.runtime != "none":
            catalog = load_catalog(_catalog_file(asked, file))
        return pin(asked, host_of(cluster), cluster=cluster, catalog=catalog, here=here)
    except ConfigError as error:
        found = [
            each if each.file not in {None, CATALOG_ITSELF} else problem_at(file, _key(each), each.message, overrides)
            for each in error.problems
        ]
        raise ConfigError(*found) from error
    except ContainerError as error:
        raise type(error)(f"container.{'image' if asked.image else 'target'}: {error}") from error


def _key(problem: Problem) -> str:
    return problem.key if problem.key.startswith("container") else "container.target"


def _catalog_file(asked: ContainerSpec, config: Path | None) -> Path:
    """Return the catalog that is meant: beside the config, or the one that is used where none is named."""
    beside = config.parent if config else Path.cwd()
    if asked.catalog is not None:
        return (beside / Path(asked.catalog).expanduser()).resolve()
    return catalog_file(code_root(config) if config else Path.cwd())


def catalog_file(root: Path) -> Path:
    """Return the catalog that is used where none is named: this machine's own, or that of the code in `root`.

    Raises:
        ConfigError: there is none; the message says where it was looked for.
    """
    if (own := settings().catalog) is not None:
        return own.expanduser()
    if (root / CATALOG).is_file():
        return root / CATALOG
    message = f"there is no image catalog: {root / CATALOG} is not there; name one (container.catalog, NEXA_CATALOG)"
    raise ConfigError(Problem("", message))
