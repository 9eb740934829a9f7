"""What code this is: its commit, branch and changes, and a hash of what it holds."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# How much of a file is read at once, bytes.
_PIECE = 1 << 16
# What a link is told as: its mode is always lrwxrwxrwx.
_LINK = b"lx"


@dataclass(frozen=True)
class Provenance:
    """Where code comes from; all None outside a git repository."""

    commit: str | None = None
    branch: str | None = None
    dirty: bool = False
    patch: str | None = None


def provenance_of(root: Path) -> Provenance:
    """Ask git what code `root` holds."""
    if not (root / ".git").exists():
        return Provenance()
    told = _git(root, "status", "--porcelain=v2", "--branch", "--untracked-files=normal", "-z").split(b"\0")
    heads = dict(line[2:].split(b" ", 1) for line in told if line.startswith(b"# branch."))
    commit, branch = (os.fsdecode(heads.get(name, b"(")) for name in (b"branch.oid", b"branch.head"))
    # git says (initial) where there is no commit yet, and (detached) where there is no branch.
    known, on_branch = not commit.startswith("("), not branch.startswith("(")
    dirty = any(line and not line.startswith(b"# ") for line in told)
    diff = _git(root, "diff", "--binary", "--no-color", "--no-ext-diff", "HEAD") if known and dirty else b""
    return Provenance(
        commit if known else None,
        branch if on_branch else None,
        dirty,
        hashlib.sha256(diff).hexdigest() if diff else None,
    )


def tree_hash(root: Path, paths: Iterable[str]) -> str:
    """Return 16 hex digits of a SHA-256 over every file's path, executable bit and content, a link's being its target.

    It is one that a host without Python can compute as well: `snapshots.DIGEST` does.
    """
    paths = list(paths)
    place = os.fsencode(root) + b"/"
    read = [_read(place + name) for name in sorted(map(os.fsencode, paths))]
    total = hashlib.sha256(f"{names_hash(paths)}\n".encode())
    total.update(b"".join(b"%s\n" % kind for kind, _ in read))
    total.update(b"".join(b"%s\n" % content for kind, content in read if kind != _LINK))
    total.update(b"".join(b"%s\0" % target for kind, target in read if kind == _LINK))
    return total.hexdigest()[:16]


def names_hash(paths: Iterable[str]) -> str:
    """Return the SHA-256 of a sorted list of files, as `find . -print0` would begin and end each."""
    return hashlib.sha256(b"".join(b"./%s\0" % name for name in sorted(map(os.fsencode, paths)))).hexdigest()


def _read(path: bytes) -> tuple[bytes, bytes]:
    """Return a file's kind, two letters as of `ls -l`, and its content's SHA-256, or a link's target."""
    try:
        # Not blocking: it may have become a pipe since it was chosen.
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return _LINK, os.readlink(path)  # noqa: PTH115 - pathlib knows no bytes
    try:
        seen = os.fstat(file)
        content = hashlib.sha256(os.read(file, min(seen.st_size + 1, _PIECE)))
        while seen.st_size >= _PIECE and (piece := os.read(file, _PIECE)):
            content.update(piece)
    finally:
        os.close(file)
    return b"-x" if seen.st_mode & stat.S_IXUSR else b"--", content.hexdigest().encode()


def _git(root: Path, *words: str) -> bytes:
    """Return what git prints, nothing where it fails: then there is nothing to tell."""
    try:
        return subprocess.run(["git", "-C", root, *words], capture_output=True, check=False).stdout
    except FileNotFoundError:
        return b""
