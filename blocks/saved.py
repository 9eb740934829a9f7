"""Saved blocks by their names, as the engine's plain models."""

from __future__ import annotations

from typing import TypeVar

from prefect.blocks.core import Block

from nexa_infra.blocks.catalog import ImageCatalog
from nexa_infra.blocks.cluster import SlurmCluster
from nexa_infra.containers.catalog import Catalog
from nexa_infra.errors import ConfigError, NexaError, Problem
from nexa_infra.spec.cluster import Cluster
from nexa_infra.spec.fields import suggestion

BlockT = TypeVar("BlockT", bound=Block)


def saved_cluster(name: str) -> Cluster:
    """Return a saved cluster; what opens its key is told to this process's logins.

    Raises:
        ConfigError: there is none of this name; the message names the nearest.
        NexaError: Prefect's server cannot be asked.
    """
    return saved(SlurmCluster, name, key="cluster", what="cluster", else_="name a cluster file").to_cluster()


def saved_catalog(name: str) -> Catalog:
    """Return a saved image catalog.

    Raises:
        ConfigError: there is none of this name; the message names the nearest.
        NexaError: Prefect's server cannot be asked.
    """
    return saved(ImageCatalog, name, key="catalog", what="image catalog", else_="name a catalog file").to_catalog()


def catalog_of(catalog: ImageCatalog | str | None) -> Catalog | None:
    """Return the catalog of a block, or of the name that one was saved under; None where none is named.

    Raises:
        ConfigError: there is none of this name; the message names the nearest.
        NexaError: Prefect's server cannot be asked.
    """
    if isinstance(catalog, str):
        return saved_catalog(catalog.strip()) if catalog.strip() else None
    return catalog.to_catalog() if catalog is not None else None


def saved(block_type: type[BlockT], name: str, *, key: str, what: str, else_: str = "") -> BlockT:
    """Return a saved block; its name may stand behind its type's slug, as in `slurm-cluster/hpc`.

    Args:
        block_type: The block's class.
        name: What it was saved under.
        key: What asks for it, for complaints.
        what: What it is, in a complaint.
        else_: What would do instead of a saved one, as a complaint says it; empty for nothing.

    Raises:
        ConfigError: there is none of this name; the message names the nearest.
        NexaError: Prefect's server cannot be asked.
    """
    own = block_type.get_block_type_slug()
    slug, _, word = name.rpartition("/")
    if slug not in {"", own}:
        raise ConfigError(Problem(key, f"{name!r} is no {what}: write {own}/NAME, or NAME"))
    instead = f", or {else_}" if else_ else ""
    try:
        block = block_type.load(word, _sync=True)  # type: ignore[call-arg]  # in a thread of a flow, too
    except ValueError as error:
        known = _known(own)
        told = f"; there are {', '.join(known)}" if known else f": save one in Prefect's UI{instead}"
        problem = Problem(key, f"there is no saved {what} {word!r}{suggestion(word, known)}{told}", file="Prefect")
        raise ConfigError(problem) from error
    except Exception as error:
        start = f"start it (`make up`), {'' if else_ else 'or '}set PREFECT_API_URL{instead}"
        raise NexaError(
            f"Prefect's server cannot be asked for the {what} {word!r}: {str(error) or type(error).__name__}; {start}"
        ) from error
    if not isinstance(block, block_type):
        raise NexaError(f"the saved block {word!r} is no {what}")
    return block


def _known(slug: str) -> list[str]:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        documents = client.read_block_documents()
    return sorted(each.name for each in documents if each.name and each.block_type and each.block_type.slug == slug)
