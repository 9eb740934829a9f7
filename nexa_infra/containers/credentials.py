"""What a registry asks of who pulls from it."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Credentials:
    """An account at a registry; no text that is made of it shows the password."""

    registry: str  # as it stands in an image's name: registry.example.org, or with its port, host:5000
    username: str
    password: str = field(repr=False)


_REMEMBERED: dict[str, Credentials] = {}


def remember(credentials: Credentials) -> None:
    """Keep a login for as long as this process lives: it travels with no run, and is written nowhere."""
    _REMEMBERED[host_of_registry(credentials.registry)] = credentials


def remembered(registry: str) -> Credentials | None:
    """Return the login that this process was given for a registry."""
    return _REMEMBERED.get(host_of_registry(registry))


def host_of_registry(registry: str) -> str:
    """Return a registry's host, however its address was written; Docker Hub has several."""
    host = registry.removeprefix("https://").removeprefix("http://").partition("/")[0]
    return "docker.io" if host in {"index.docker.io", "registry-1.docker.io"} else host
