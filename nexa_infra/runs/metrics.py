"""What trials have measured in the end: each its metrics.json, or all of them in one pack that a client has brought."""

from __future__ import annotations

import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from nexa_infra.errors import NexaError
from nexa_infra.runs.directory import RunDirectory, without_waiting

# A trial that writes more than this into metrics.json is not measuring.
_MOST = 16 * 2**20
_NAME = re.compile(r"(?:\./)?trials/(\d{1,9})/metrics\.json")


def metrics_of(directory: RunDirectory) -> Callable[[int], dict[str, Any]]:
    """Return what gives a trial's metrics by its index, as `read_metrics` reads them.

    A client's copy of a run directory holds them as they last came, in one pack.

    Raises:
        NexaError: the pack is damaged.
    """
    try:
        pack = directory.metrics_pack.open("rb")
    except FileNotFoundError:
        return lambda index: read_metrics(directory.metrics(index))
    try:
        with pack:
            packed = dict(_unpacked(pack))
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise NexaError(f"{directory.metrics_pack} cannot be read: {error}; remove it, and collect again") from error
    return lambda index: packed.get(index, {})


def _unpacked(pack: IO[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    with tarfile.open(fileobj=pack, mode="r|gz") as archive:
        for member in archive:
            name = _NAME.fullmatch(member.name)
            content = archive.extractfile(member) if name and member.isfile() else None
            if name and content is not None:
                yield int(name[1]), _parsed(content)


def read_metrics(path: Path) -> dict[str, Any]:
    """Read a trial's metrics.json; names of nested objects are joined by dots.

    Where the trial wrote none, or something other than a JSON object of at most 16 MiB, there are none.
    """
    try:
        with open(path, "rb", opener=without_waiting) as stream:
            return _parsed(stream)
    except OSError:
        return {}


def _parsed(stream: IO[bytes]) -> dict[str, Any]:
    raw = stream.read(_MOST + 1) or b""
    try:
        data = json.loads(raw) if len(raw) <= _MOST else None
        return dict(_flatten(data)) if isinstance(data, dict) else {}
    except (ValueError, RecursionError):
        return {}


def _flatten(data: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{above}{_sound(name)}.")
        else:
            yield f"{above}{_sound(name)}", _sound(value)


def _sound(value: Any) -> Any:
    """Return a value whose texts can be written as UTF-8: JSON may hold halves of surrogate pairs."""
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    if isinstance(value, list):
        return [_sound(one) for one in value]
    if isinstance(value, dict):
        return {_sound(name): _sound(one) for name, one in value.items()}
    return value
