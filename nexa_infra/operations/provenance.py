"""What code this is: its commit, branch and changes, and a hash of what it holds."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nexa_infra.hosts.local import LocalHost


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
    head = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    branch = _git(root, "symbolic-ref", "--quiet", "--short", "HEAD")
    dirty = bool(_git(root, "status", "--porcelain"))
    diff = _git(root, "diff", "--binary", "HEAD") if head and dirty else None
    patch = hashlib.sha256(diff.encode("utf-8", "surrogateescape")).hexdigest() if diff else None
    return Provenance(head, branch, dirty, patch)


def tree_hash(root: Path, paths: Iterable[str]) -> str:
    """Return 16 hex digits of the SHA-256 over every file's path, executable bit and content."""
    total = hashlib.sha256()
    for name in sorted(paths):
        path = root / name
        if path.is_symlink():
            mode, content = "link", hashlib.sha256(os.fsencode(path.readlink())).hexdigest()
        else:
            mode = "exec" if os.access(path, os.X_OK) else "file"
            with path.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
        total.update(f"{name}\0{mode}\0{content}\n".encode("utf-8", "surrogateescape"))
    return total.hexdigest()[:16]


def _git(root: Path, *words: str) -> str | None:
    done = LocalHost().run(["git", "-C", str(root), *words])
    return done.stdout.strip() or None if done.returncode == 0 else None
