"""Saved blocks by their names, as the engine's plain models."""

from __future__ import annotations

from nexa_infra.blocks.cluster import SlurmCluster
from nexa_infra.errors import ConfigError, NexaError, Problem
from nexa_infra.spec.cluster import Cluster
from nexa_infra.spec.fields import suggestion


def saved_cluster(name: str) -> Cluster:
    """Return a saved cluster; what opens its key is told to this process's logins.

    Raises:
        ConfigError: there is none of this name; the message names the nearest.
        NexaError: Prefect's server cannot be asked.
    """
    slug, _, word = name.rpartition("/")
    if slug not in {"", SlurmCluster.get_block_type_slug()}:
        raise ConfigError(Problem("cluster", f"{name!r} is no Slurm cluster: write slurm-cluster/NAME, or NAME"))
    try:
        block = SlurmCluster.load(word, _sync=True)  # type: ignore[call-arg]  # in a thread of a flow, too
    except ValueError as error:
        known = _known()
        told = f"; there are {', '.join(known)}" if known else ": save one in Prefect's UI, or name a cluster file"
        problem = Problem(
            "cluster", f"there is no saved cluster {word!r}{suggestion(word, known)}{told}", file="Prefect"
        )
        raise ConfigError(problem) from error
    except Exception as error:
        raise NexaError(
            f"Prefect's server cannot be asked for the cluster {word!r}: {str(error) or type(error).__name__}; start "
            "it (`make up`), set PREFECT_API_URL, or name a cluster file"
        ) from error
    if not isinstance(block, SlurmCluster):
        raise NexaError(f"the saved block {word!r} is no Slurm cluster")
    return block.to_cluster()


def _known() -> list[str]:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        documents = client.read_block_documents()
    slug = SlurmCluster.get_block_type_slug()
    return sorted(each.name for each in documents if each.name and each.block_type and each.block_type.slug == slug)
