"""The image catalog: which images are to be used for what, and how they are run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from nexa_infra.errors import ConfigError, Problem
from nexa_infra.spec.complaints import findings_of
from nexa_infra.spec.compose import Finding, PlacedDict, Tree, compose
from nexa_infra.spec.container import ContainerSettings, Mount
from nexa_infra.spec.fields import (
    KeyPath,
    Line,
    Misfit,
    Spec,
    Truth,
    Words,
    key_text,
    kind_of,
    nearest,
    shown,
    suggestion,
)
from nexa_infra.spec.load import composed, config_error, problem_at

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")

# What a catalog is called that was read from no file.
CATALOG_ITSELF = "the image catalog"

_MISSING = {
    "targets": "names no target: write targets: {NAME: {image: REGISTRY/NAME:TAG}}",
    "image": "is missing: say which image it is, such as image: registry.example.org/train:1.2",
}


def _target_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{shown(name)} is no target's name: use letters, digits, '.', '_' and '-'")
    return name


def _digest(text: str) -> str:
    if not _DIGEST.fullmatch(text):
        told = "write sha256: and 64 hexadecimal digits, as `docker push` prints it"
        raise ValueError(f"{shown(text)} is no digest: {told}")
    return text


TargetName = Annotated[str, AfterValidator(_target_name)]
Digest = Annotated[str, AfterValidator(_digest)]


class Target(ContainerSettings):
    """An image, what it is for, and how it is run."""

    image: Line = Field(description="REGISTRY/NAME:TAG, or a .sif file or docker archive")
    digest: Digest | None = Field(default=None, description="sha256:…, of the image's manifest; a tag may move")
    purpose: Line | None = Field(default=None, description="what it is for, in a line")
    command: Words = Field(default=(), description="what it runs where nothing else is said")
    health: Words = Field(default=(), description="a command that prints its versions and devices")

    @model_validator(mode="after")
    def _one_digest(self) -> Self:
        _, at, own = self.image.partition("@")
        if at and not _DIGEST.fullmatch(own):
            raise Misfit((("image",), f"{shown(own)} is no digest: write NAME@sha256: and 64 hexadecimal digits"))
        if at and self.digest not in {None, own}:
            raise Misfit((("digest",), "is another than the image's own: keep one of the two"))
        return self

    @property
    def pinned(self) -> bool:
        """Whether a digest says which image it is."""
        return self.digest is not None or "@" in self.image


class Catalog(Spec):
    """Targets by name."""

    require_digest: Truth = Field(default=False, description="refuse a target whose image has no digest")
    targets: dict[TargetName, Target] = Field(description="NAME: its image, and how it is run")


def load_catalog(path: str | Path) -> Catalog:
    """Read and check a catalog file.

    Raises:
        ConfigError: the file cannot be read, or not understood; every complaint names file, line and key.
    """
    return _checked(composed(path), str(path))


def parse_catalog(text: str, source: str) -> Catalog:
    """Read and check a catalog's YAML; `source` is what complaints call it.

    Raises:
        ConfigError: it is not understood; every complaint names line and key.
    """
    return _checked(compose(text, source), source)


def catalog_of(data: Mapping[str, Any], source: str) -> Catalog:
    """Check a catalog's plain data; `source` is what complaints call it.

    Raises:
        ConfigError: it is not understood; every complaint names the key.
    """
    catalog, findings = _validated(data)
    if catalog is None:
        raise ConfigError(*(Problem(key_text(one.path), one.message, source) for one in findings))
    return catalog


def target_of(catalog: Catalog, name: str, *, file: str | Path | None = None) -> Target:
    """Return a target by its name; `file` is where the catalog was read, for the complaint.

    Raises:
        ConfigError: there is none of this name, and the nearest is named; or its image has no digest,
            and the catalog demands one.
    """
    target = catalog.targets.get(name)
    source = str(file) if file is not None else CATALOG_ITSELF
    if target is None:
        there = f"there are {', '.join(sorted(catalog.targets))}" if catalog.targets else "there are none"
        told = f"there is no target {shown(name)}{suggestion(name, catalog.targets)}; {there}"
        raise ConfigError(Problem("targets", told, source))
    if catalog.require_digest and not target.pinned:
        key = key_text(("targets", name))
        told = (
            f"has no digest, and the catalog demands one (require_digest): push {target.image}, and write the "
            "sha256:… that `docker push` prints under digest"
        )
        raise ConfigError(problem_at(file, key, told) if file is not None else Problem(key, told, source))
    return target


def _checked(tree: Tree, source: str) -> Catalog:
    if not isinstance(tree.data, PlacedDict):
        what = "is empty" if tree.data is None else f"is {kind_of(tree.data)}, not a mapping"
        told = f"{what}: a catalog has the key targets:, and below it a name and its image for each"
        raise config_error([Finding((), told)], tree, source)
    catalog, findings = _validated(tree.data)
    if catalog is None or tree.findings:
        raise config_error([*tree.findings, *findings], tree, source)
    return catalog


def _validated(data: Mapping[str, Any]) -> tuple[Catalog | None, list[Finding]]:
    try:
        catalog = Catalog.model_validate(data)
    except ValidationError as error:
        return None, list(_said(findings_of(error, Catalog)))
    return (catalog, []) if catalog.targets else (None, [Finding(("targets",), _MISSING["targets"])])


def _said(findings: Iterable[Finding]) -> Iterator[Finding]:
    """Yield the findings, in a catalog's words where a config's would lead astray."""
    told = list(findings)
    unknown = [one.path for one in told if one.kind == "extra_forbidden"]
    for one in told:
        message = one.message
        if one.kind == "extra_forbidden":
            message = _unknown(one.path)
        elif one.kind == "missing":
            # A key that stands there misspelled is complained of once.
            if any(path[:-1] == one.path[:-1] and nearest(str(path[-1]), [str(one.path[-1])]) for path in unknown):
                continue
            message = _MISSING.get(str(one.path[-1]), message)
        elif one.path == ("targets",):
            message = _MISSING["targets"]
        elif one.kind == "model_type" and len(one.path) == 2:
            message = f"is no target: write {one.path[-1]}: {{image: REGISTRY/NAME:TAG}}"
        yield Finding(one.path, message, one.place, one.kind)


def _unknown(path: KeyPath) -> str:
    what, model = _part(path[:-1])
    known = list(model.model_fields)
    key = str(path[-1])
    if key in {"gpu", "gpus"}:
        return "there is no such key: a job says how many GPUs it gets (job.gpus_per_node), and its container sees them"
    if hint := suggestion(key, known):
        return f"there is no such key{hint}"
    for home, other in (("a target", Target), ("the top level", Catalog)):
        if key in other.model_fields:
            return f"there is no such key here: it belongs to {home}"
    return f"there is no such key: {what} has {', '.join(known)}"


def _part(path: KeyPath) -> tuple[str, type[BaseModel]]:
    """Say what stands at a path, and which model reads it."""
    match len(path):
        case 0:
            return "a catalog", Catalog
        case 2:
            return "a target", Target
        case _:
            return "a mount", Mount
