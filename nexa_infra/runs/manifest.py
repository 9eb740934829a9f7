r"""A manifest: every file of a folder by content, a line each, the same whichever host has read them.

A line is a file's SHA-256, its bytes and its path, in the order of the paths' bytes; of a symbolic link it is the
SHA-256 of the target, which is not followed, and `link`. In a path `\\` is a backslash, and `\xHH` a byte that is a
control character or no UTF-8, so that a path may be anything. Folders, pipes, sockets and devices have no line.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nexa_infra.hosts.shell import quote

if TYPE_CHECKING:
    from nexa_infra.hosts.base import Host


@dataclass(frozen=True)
class Content:
    """What a file holds, or where a link leads; `size` is in bytes, None for a link."""

    sha256: str
    size: int | None

    def __str__(self) -> str:
        if self.size is None:
            return f"a link, its target's SHA-256 {self.sha256[:16]}…"
        return f"{self.size:,} bytes, SHA-256 {self.sha256[:16]}…"


# A path as the operating system has it, in bytes -> what is there.
Contents = dict[bytes, Content]

_LINE = re.compile(r"([0-9a-f]{64})  (link|[0-9]+)  (.+)")
_ESCAPE = re.compile(r"\\(\\|x[0-9a-f]{2})")


def to_text(contents: Contents) -> str:
    """Write a manifest."""
    lines = (f"{each.sha256}  {_size(each)}  {escaped(path)}\n" for path, each in sorted(contents.items()))
    return "".join(lines)


def from_text(text: str) -> Contents:
    """Read a manifest.

    Raises:
        ValueError: it is none; the message names the line.
    """
    found: Contents = {}
    lines = text.split("\n")
    if lines.pop():
        raise ValueError("its last line is cut off")
    for number, line in enumerate(lines, 1):
        if not (read := _LINE.fullmatch(line)):
            raise ValueError(f"line {number} is not SHA-256, bytes and path")
        found[_plain(read[3])] = Content(read[1], None if read[2] == "link" else int(read[2]))
    return found


def escaped(path: bytes) -> str:
    """Write a path in one line of printable text."""
    return "".join(
        "\\\\" if letter == "\\" else letter if letter.isprintable() else "".join(map(_hex, _bytes(letter)))
        for letter in path.decode("utf-8", "surrogateescape")
    )


def contents_of(host: Host, folder: Path) -> Contents:
    """Read a folder's files where they are: here, or on another host in one round trip, by its sha256sum.

    Raises:
        HostError: one of them cannot be read there.
        OSError: likewise here.
    """
    return _there(host, folder) if host.remote else contents_here(folder)


def contents_here(folder: Path) -> Contents:
    """Read the files of a folder on this machine."""
    return dict(_walk(os.fsencode(folder), b""))


def _size(content: Content) -> str:
    return "link" if content.size is None else str(content.size)


def _hex(byte: int) -> str:
    return f"\\x{byte:02x}"


def _plain(text: str) -> bytes:
    # Texts stand between escapes.
    return b"".join(
        _bytes(part) if number % 2 == 0 else b"\\" if part == "\\" else bytes([int(part[1:], 16)])
        for number, part in enumerate(_ESCAPE.split(text))
    )


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _walk(folder: bytes, above: bytes) -> Iterator[tuple[bytes, Content]]:
    with os.scandir(os.path.join(folder, above) if above else folder) as entries:  # noqa: PTH118 - paths are bytes
        for entry in entries:
            path = above + entry.name
            if entry.is_symlink():
                yield path, Content(hashlib.sha256(os.readlink(entry.path)).hexdigest(), None)  # noqa: PTH115 - likewise
            elif entry.is_dir():
                yield from _walk(folder, path + b"/")
            elif entry.is_file():
                # A file may have become a pipe meanwhile, which nobody is to wait for.
                with open(entry.path, "rb", opener=_without_waiting) as stream:
                    seen = os.fstat(stream.fileno())
                    if stat.S_ISREG(seen.st_mode):
                        yield path, Content(hashlib.file_digest(stream, "sha256").hexdigest(), seen.st_size)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)


def _there(host: Host, folder: Path) -> Contents:
    """Read the files of a folder on another host: sizes and links as find(1) says them, hashes as sha256sum(1) does."""
    script = (
        f"cd -- {quote(str(folder))} && find . -type f -printf '%s %p\\0' && printf '\\0'"
        " && find . -type l -printf '%p\\0%l\\0' && printf '\\0'"
        " && find . -type f -exec sha256sum -b -- {} +"
    )
    told = _bytes(host.script(script).check().stdout)
    sizes, told = _fields(told)
    links, hashes = _fields(told)
    known = {path: int(size) for size, _, path in (field.partition(b" ") for field in sizes)}
    found = {
        path: Content(hashlib.sha256(to).hexdigest(), None) for path, to in zip(links[::2], links[1::2], strict=True)
    }
    for line in hashes.split(b"\n"):
        digest, _, path = line.removeprefix(b"\\").partition(b" *")
        if line.startswith(b"\\"):  # it says so where it has escaped something
            path = _SUMMED.sub(lambda letter: _LETTERS[letter[1]], path)
        if path in known:
            found[path] = Content(digest.decode(), known[path])
    return {path.removeprefix(b"./"): each for path, each in found.items()}


_SUMMED = re.compile(rb"\\([\\nr])")
_LETTERS = {b"\\": b"\\", b"n": b"\n", b"r": b"\r"}


def _fields(told: bytes) -> tuple[list[bytes], bytes]:
    """Take the fields up to the first empty one; return what follows, too."""
    if told.startswith(b"\0"):
        return [], told[1:]
    fields, _, rest = told.partition(b"\0\0")
    return fields.split(b"\0"), rest
