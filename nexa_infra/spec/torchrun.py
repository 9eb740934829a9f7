"""The values that torchrun's own options take."""

from __future__ import annotations

import re
from typing import Any

from nexa_infra.spec.fields import Boolean, kind_of, one_line, shown

# Options that would take a run's ranks out of its hands, and what to do instead.
OPTIONS_OWNED = {
    "--run-path": "ranks are started as python -u SCRIPT: leave it out",
    **dict.fromkeys(("--module", "-m"), "name the module in launcher.module"),
    **dict.fromkeys(
        ("--log-dir", "--redirects", "-r", "--tee", "-t"),
        "each rank has a log of its own, rank-N.log, in the trial's directory",
    ),
}

_ENDPOINT = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?):(?P<port>\d{1,5})")


def option_name(word: str) -> str:
    """Return the name of an option of torchrun as its help writes it: `--nproc_per_node=2` is `--nproc-per-node`."""
    return word.partition("=")[0].replace("_", "-") if word.startswith("--") else word


def node_range(text: str) -> tuple[int, int]:
    """Read `N` or `MIN:MAX` nodes."""
    least, _, most = text.partition(":")
    return int(least), int(most or least)


def as_processes(value: Any) -> str | int:
    """Read how many processes a node runs."""
    text = str(value).strip()
    if isinstance(value, (bool, Boolean)) or not isinstance(value, (str, int)):
        raise ValueError(f"a number, gpu, cpu or auto is meant here, not {kind_of(value)}")
    if text in {"auto", "gpu", "cpu"}:
        return text
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) == 0:
        raise ValueError(f"{shown(value)} is no number of processes: write 1, 2, …, gpu, cpu or auto")
    return int(text)


def as_nodes(value: Any) -> str | None:
    """Read how many nodes take part: `N`, or `MIN:MAX`."""
    if value is None:
        return None
    text = str(value).strip()
    if not re.fullmatch(r"[0-9]{1,5}(:[0-9]{1,5})?", text):
        raise ValueError(f"{shown(value)} is no number of nodes: write MIN:MAX, such as 1:4")
    least, most = node_range(text)
    if least == 0:
        raise ValueError(f"{shown(text)} starts at no node: the least is 1")
    if least > most:
        raise ValueError(f"{shown(text)} has its ends the wrong way round: write {most}:{least}")
    return text


def as_endpoint(value: Any) -> str | None:
    """Read `HOST:PORT`."""
    if value is None:
        return None
    text = one_line(str(value).strip())
    found = _ENDPOINT.fullmatch(text)
    if not found or not 0 < int(found["port"]) < 65536:
        raise ValueError(f"{shown(text)} is no endpoint: write HOST:PORT, such as node7:29500")
    return text
