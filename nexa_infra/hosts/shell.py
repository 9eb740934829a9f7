"""Quoting: every value goes through here once, at the edge."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def quote(word: str) -> str:
    """Quote a word for any POSIX shell."""
    return shlex.quote(word)


def quote_line(word: str) -> str:
    """Quote a word for bash so that it stays on one line: control characters become `$'…'` escapes."""
    if not _CONTROL.search(word):
        return shlex.quote(word)
    escaped = word.replace("\\", "\\\\").replace("'", "\\'")
    return "$'" + _CONTROL.sub(lambda found: _ESCAPES.get(found[0], f"\\{ord(found[0]):03o}"), escaped) + "'"


def quote_path(path: str, *, by: Callable[[str], str] = quote_line) -> str:
    """Quote a path for bash, or `by` for another shell; a leading `~/` stays the home of whoever runs it."""
    return '"$HOME"/' + by(path[2:]) if path.startswith("~/") else by(path)


def join(words: Iterable[str]) -> str:
    """Quote words as one command line for people and shells to read."""
    return " ".join(quote(word) for word in words)
