"""Images, brought to Docker's engine from a registry or an archive; and what is to blame where they are not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from nexa_infra.containers.credentials import remembered
from nexa_infra.containers.docker import words_of
from nexa_infra.errors import ContainerError
from nexa_infra.runs.record import Container

if TYPE_CHECKING:
    import docker


def bring(
    client: docker.DockerClient,
    container: Container,
    tell: Callable[[str], None] | None = None,
    stop: threading.Event | None = None,
) -> None:
    """Pull an image where the engine lacks it, saying how far it is; `stop`, once set, gives it up.

    Raises:
        ContainerError: it cannot be had; the message says whether the registry, the login or the disk is to blame.
    """
    from docker.errors import APIError, DockerException, ImageNotFound

    try:
        client.api.inspect_image(container.image)
    except ImageNotFound:
        pass
    except (DockerException, OSError) as error:
        raise ContainerError(f"Docker's engine cannot be asked for {container.image}: {error}") from error
    else:
        return
    try:
        if container.source == "archive" and container.file is not None:
            with open(container.file, "rb") as stream:  # noqa: PTH123
                for said in client.api.load_image(stream):
                    _check_progress(said, container)
            client.api.inspect_image(container.image)
            return
        if container.source != "registry":
            raise ContainerError(f"the image {container.image} is no longer on this machine: build or push it again")
        name, _, digest = container.image.partition("@")
        login = remembered(name.partition("/")[0])
        auth = {"username": login.username, "password": login.password} if login else None
        progress = _Progress(container.image, tell)
        for said in client.api.pull(name, tag=digest, stream=True, decode=True, auth_config=auth):
            if stop is not None and stop.is_set():
                raise ContainerError(f"{container.image} was not pulled to its end: its caller has ended")
            _check_progress(said, container)
            progress.hear(said)
    except ImageNotFound as error:
        raise ContainerError(f"the registry has no {container.image}: {words_of(error)}") from error
    except APIError as error:
        raise ContainerError(_blame(container.image, words_of(error))) from error
    except OSError as error:
        raise ContainerError(f"Docker's engine went away while {container.image} was brought: {error}") from error


class _Progress:
    """Tells how far a pull is, every two seconds."""

    def __init__(self, image: str, tell: Callable[[str], None] | None) -> None:
        self._image, self._tell = image, tell
        self._layers: dict[str, tuple[int, int]] = {}
        self._last = 0.0

    def hear(self, said: Mapping[str, Any]) -> None:
        detail = said.get("progressDetail") or {}
        if said.get("status") == "Downloading" and detail.get("total"):
            self._layers[str(said.get("id"))] = (int(detail["current"]), int(detail["total"]))
        if self._tell is None or not self._layers or time.monotonic() - self._last < 2.0:
            return
        self._last = time.monotonic()
        done, total = (sum(pair) for pair in zip(*self._layers.values(), strict=True))
        self._tell(f"pulling {self._image}: {done >> 20} of {total >> 20} MiB")


def _check_progress(said: Mapping[str, Any], container: Container) -> None:
    if word := said.get("error"):
        raise ContainerError(_blame(container.image, str(word)))


def _blame(image: str, words: str) -> str:
    """Say what is to blame for a pull that failed."""
    if "no space left" in words:
        return f"the disk of Docker's engine is full, {image} could not be pulled: make room there ({words})"
    if any(sign in words for sign in ("denied", "unauthorized", "no basic auth", "authentication required")):
        return f"the registry refuses {image}: give a registry block that may read it, or log in to it ({words})"
    if "not found" in words or "manifest unknown" in words:
        return f"the registry has no {image}: {words}"
    return f"{image} could not be pulled: {words}"
