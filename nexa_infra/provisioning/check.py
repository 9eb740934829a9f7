"""One line of what the doctor says."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
# A trial makes about five files.
FEW_INODES = 10_000
ASK_FOR = "ask its administrators for"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    fine: bool
    found: str
    remedy: str = ""


def numbers(version: str) -> tuple[int, ...]:
    """Read a version's numbers: `3.2.7`."""
    return tuple(int(part) for part in version.split(".") if part)
