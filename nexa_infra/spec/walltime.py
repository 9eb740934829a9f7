"""Slurm walltimes, as sbatch reads them."""

from __future__ import annotations

import math
import re
from datetime import timedelta

from nexa_infra.errors import WalltimeError

FORMS = "M, M:S, H:M:S, D-H, D-H:M, D-H:M:S, UNLIMITED"

# Ten digits are more than Slurm can hold, and fewer than overflow a timedelta.
_CLOCK = re.compile(r"([0-9]{1,10})(?::([0-9]{1,10}))?(?::([0-9]{1,10}))?")
_DAYS = re.compile(r"([0-9]{1,10})-([0-9]{1,10})(?::([0-9]{1,10}))?(?::([0-9]{1,10}))?")
# sbatch holds seconds in a C int: one minute more, and a long walltime becomes another one.
_LONGEST = timedelta(seconds=2**31 - 60)
_UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_TERM = re.compile(
    r"([0-9]{1,6}(?:\.[0-9]{1,3})?)"
    r"(?:(d)(?:ays?)?|(h)(?:rs?|ours?)?|(m)(?:ins?|inutes?)?|(s)(?:ecs?|econds?)?)"
)


def parse_walltime(text: str) -> timedelta | None:
    """Read a Slurm walltime; `None` is no limit.

    Accepts the forms of sbatch(1) `--time`: `M`, `M:S`, `H:M:S`, `D-H`, `D-H:M`, `D-H:M:S`, and
    `UNLIMITED` (also `INFINITE` and `-1`). So `08:00` is eight minutes. Slurm counts in whole
    minutes and rounds seconds up; this does not.

    Raises:
        WalltimeError: the text is none of these, or is zero; the message shows the accepted forms.
    """
    word = text.strip()
    if word.upper() in {"UNLIMITED", "INFINITE", "-1"}:
        return None
    if found := _DAYS.fullmatch(word):
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
        span = _span(text, ((days * 24 + hours) * 60 + minutes) * 60 + seconds)
    elif found := _CLOCK.fullmatch(word):
        parts = [int(part) for part in found.groups() if part is not None]
        hours, minutes, seconds = parts if len(parts) == 3 else (0, parts[0], parts[1] if len(parts) == 2 else 0)
        span = _span(text, (hours * 60 + minutes) * 60 + seconds)
    else:
        raise WalltimeError(f"{text[:80]!r} is not a walltime: write {_hint(word)}one of {FORMS}")
    if not span:
        raise WalltimeError(f"{text!r} is no time at all: write a minute or more, or UNLIMITED for no limit")
    return span


def format_walltime(span: timedelta | None) -> str:
    """Write a walltime so that sbatch reads it back: `H:M:S`, `D-H:M:S` or `UNLIMITED`."""
    if span is None:
        return "UNLIMITED"
    minutes, seconds = divmod(int(span.total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours:02}:{minutes:02}:{seconds:02}"
    return f"{days}-{clock}" if days else clock


def _span(text: str, seconds: int) -> timedelta:
    if seconds > _LONGEST.total_seconds():
        raise WalltimeError(f"{text[:80]!r} is longer than Slurm can count: write UNLIMITED for no limit")
    return timedelta(seconds=seconds)


def _hint(word: str) -> str:
    """Say how the spelling of other tools (`8h`, `1h30m`, `1.5 hours`) is written here."""
    rest = re.sub(r"[\s,]", "", word.lower())
    seconds = 0.0
    while found := _TERM.match(rest):
        seconds += float(found[1]) * _UNITS[found[found.lastindex or 0]]
        rest = rest[found.end() :]
    return "" if rest or not seconds else f"{format_walltime(timedelta(seconds=math.ceil(seconds)))}, or "
