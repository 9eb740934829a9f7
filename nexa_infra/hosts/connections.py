"""The connections of this process: one a login, shared by all that need it, closed when the last has gone."""

from __future__ import annotations

import atexit
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from nexa_infra.hosts.local import LocalHost
from nexa_infra.hosts.login import Login

if TYPE_CHECKING:
    from nexa_infra.hosts.base import Host
    from nexa_infra.hosts.ssh import SshHost
    from nexa_infra.spec.cluster import Cluster

_lock = threading.Lock()
_hosts: dict[Login, SshHost] = {}
_users: Counter[Login] = Counter()


def host_of(cluster: Cluster | None) -> Host:
    """Return where a cluster's commands run: its login node, or this machine where it has no host."""
    if cluster is None or cluster.host is None:
        return LocalHost()
    return _shared(Login.of(cluster))


def ssh_host(login: Login) -> SshHost:
    """Return the process's one connection for a login; it is made when it is first used."""
    return _shared(login)


@contextmanager
def kept_open(cluster: Cluster | None) -> Iterator[None]:
    """Keep a cluster's connection open over several steps; the last to leave closes it."""
    if cluster is None or cluster.host is None:
        yield
        return
    login = Login.of(cluster)
    with _lock:
        _users[login] += 1
    try:
        yield
    finally:
        with _lock:
            _users[login] -= 1
            host = _hosts.pop(login, None) if not _users[login] else None
        if host is not None:
            host.close()


def close_all() -> None:
    """End every connection of this process."""
    with _lock:
        hosts = list(_hosts.values())
        _hosts.clear()
    for host in hosts:
        host.close()


def _shared(login: Login) -> SshHost:
    # Imported on first use: a local run needs no SSH.
    from nexa_infra.hosts.ssh import SshHost

    with _lock:
        if login not in _hosts:
            _hosts[login] = SshHost(login)
        return _hosts[login]


atexit.register(close_all)
