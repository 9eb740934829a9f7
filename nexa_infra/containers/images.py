"""What an image is called: in a registry, by a tag or a digest, or a file; and what stands for it unchangeably."""

from __future__ import annotations

import re
from dataclasses import dataclass

from nexa_infra.containers.credentials import host_of_registry

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_COMPONENT = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_REFERENCE = re.compile(
    rf"(?:(?P<registry>(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:]+\])(?::[0-9]+)?)/)?(?P<repository>{_COMPONENT}(?:/{_COMPONENT})*)"
    r"(?::(?P<tag>[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}))?(?:@(?P<digest>\S+))?"
)
HUB = "docker.io"


@dataclass(frozen=True)
class Reference:
    """An image of a registry."""

    registry: str  # host, and port where it is not the usual one
    repository: str
    tag: str | None
    digest: str | None
    bare: bool = False  # whether it was written without a registry, and so may be a machine's own image

    @property
    def name(self) -> str:
        """The image without tag and digest."""
        return f"{self.registry}/{self.repository}"

    def __str__(self) -> str:
        return self.name + (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")

    def at(self, digest: str) -> str:
        """The image by a digest, as every runtime takes it."""
        return f"{self.name}@{digest}"


def parse_reference(text: str) -> Reference:
    """Read an image's name, as `docker pull` takes it; `docker://` may stand in front.

    Raises:
        ValueError: it is none; the message says what one looks like.
    """
    word = text.removeprefix("docker://")
    marked = "#" in word.partition("/")[0]  # as enroot writes it
    if marked:
        word = word.replace("#", "/", 1)
    first, slash, _ = word.partition("/")
    hosted = bool(slash) and ("." in first or ":" in first or first == "localhost")
    if marked and not hosted:
        told = f"a registry has a dot or a port in its name, such as {first or 'lab'}:5000"
        raise ValueError(f"{text!r} is no image: {told}")
    found = _REFERENCE.fullmatch(word if hosted else f"{HUB}/{word}")
    if found is None:
        small = re.sub(r"^.*?(?=(?::[^/:@]*)?(?:@.*)?$)", lambda name: name[0].lower(), word)
        told = "write REGISTRY/NAME:TAG or REGISTRY/NAME@sha256:DIGEST"
        if small != word and _REFERENCE.fullmatch(small):
            told = f"names are in small letters, {small}"
        raise ValueError(f"{text!r} is no image: {told}")
    registry, digest = host_of_registry(found["registry"]), found["digest"]
    if digest is not None and not DIGEST.fullmatch(digest):
        raise ValueError(f"{text!r} has no digest after @: one is sha256: and 64 hexadecimal digits")
    repository = found["repository"]
    if registry == HUB and "/" not in repository:
        repository = f"library/{repository}"
    tag = found["tag"] or (None if digest else "latest")
    return Reference(registry, repository, tag, digest, bare=not hosted)


def file_named(image: str) -> str | None:
    """Return the path of an image that is a file: a `.sif`, or an archive of `docker save`; None for a registry's."""
    for scheme in ("docker-archive:", "file:"):
        if image.startswith(scheme):
            path = image.removeprefix(scheme)
            return "/" + path.lstrip("/") if path.startswith("//") else path
    if image.startswith(("/", "./", "../", "~/")) or image.endswith((".sif", ".sqsh", ".tar")):
        return image
    return None
