"""What `clean` says: a line for each thing removed, and a line for all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence

from nexa_infra.monitoring.report_text import clean
from nexa_infra.operations.clean import Leftover, Staying
from nexa_infra.operations.status_text import age


def line(leftover: Leftover) -> str:
    """Say what one thing is, how much it holds, and when it was last used."""
    size, used = binary(leftover.size), age(time.time() - leftover.used)
    return f"{leftover.kind:<8}  {size:>9}  {leftover.files:>9,} files  {used:>6}  {clean(str(leftover.path))}"


def stays(kept: Staying) -> str:
    """Say what is left where it is, and why."""
    return f"{clean(str(kept.path))} stays: {kept.reason}"


def total(removed: Sequence[Leftover], *, dry_run: bool, place: str = "") -> str:
    """Say how much all of it is, in bytes and inodes; `place` is a cluster's name, where it was on one."""
    there = f" on {place}" if place else ""
    if not removed:
        return f"Nothing to remove{there}."
    what = f"{len(removed):,} {'to remove' if dry_run else 'removed'}{there}"
    inodes = sum(each.files for each in removed)
    said = f"{what}: {binary(sum(each.size for each in removed))} in {inodes:,} files and folders"
    return f"{said}. Nothing was removed: this is --dry-run." if dry_run else f"{said}."


def binary(size: int) -> str:
    """Write bytes in their largest unit: `512 B`, `1.5 GiB`."""
    amount = float(size)
    for name in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {name}" if name == "B" else f"{amount:.1f} {name}"
        amount /= 1024
    return f"{amount:,.1f} TiB"
