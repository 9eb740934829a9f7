"""Bringing the code over: a snapshot, named by its content, that no later edit changes."""

from __future__ import annotations

import fcntl
import fnmatch
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nexa_infra.errors import SyncError
from nexa_infra.hosts.local import LocalHost
from nexa_infra.operations.provenance import provenance_of, tree_hash
from nexa_infra.runs.record import Snapshot
from nexa_infra.spec.run import SyncRules

_MIB = 2**20
# Where there is no git to ask: folders that never are code.
_SKIPPED = frozenset({".git", ".hg", ".svn", ".nexa", ".venv", "__pycache__", "node_modules", ".tox", ".mypy_cache"})


def sync_repository(
    destination: str | Path,
    *,
    include_runs: bool = False,
    root: str | Path | None = None,
    rules: SyncRules | None = None,
) -> Snapshot:
    """Copy this code to `destination`/snapshots/<hash>, unless it is there already.

    `root` is the code's folder; unset, the git repository that holds the working directory, or the
    working directory. Git is asked which files are code: the tracked ones and, unless `rules` say
    otherwise, those that it neither tracks nor ignores. `include_runs` brings run directories too.
    The copy is made under another name, verified, and renamed.

    Raises:
        SyncError: there is nothing to copy, it is larger than `rules.max_mib`, or it changes while it is copied.
        HostError: rsync is missing, or failed.
    """
    if isinstance(destination, str) and ":" in destination.split("/", 1)[0]:
        raise SyncError(f"{destination!r} is on another host: this version copies to a path on this machine")
    source = Path(root).resolve() if root is not None else repository_of(Path.cwd())
    target = Path(destination).expanduser().resolve()
    if source.is_relative_to(target / "snapshots"):
        raise SyncError(f"{source} is itself a snapshot: run from the code's own folder")
    rules = rules or SyncRules()
    names = list(_chosen(source, target, rules, include_runs))
    if not names:
        raise SyncError(f"there is no code in {source}: every file is ignored or excluded")
    size = _checked_size(source, names, rules)
    name = tree_hash(source, names)
    path = target / "snapshots" / name
    while True:
        if not path.is_dir() or not _holds(path, names, name):
            _copy(source, path, names, name)
        if _claimed(path):
            break
    where = provenance_of(source)
    return Snapshot(
        hash=name,
        path=str(path),
        root=str(source),
        files=len(names),
        size=size,
        commit=where.commit,
        branch=where.branch,
        dirty=where.dirty,
        patch=where.patch,
    )


@contextmanager
def snapshots_locked(folder: Path) -> Iterator[None]:
    """Hold what a folder of snapshots is locked by: none is removed while a run takes one up."""
    with folder.with_suffix(".lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _claimed(path: Path) -> bool:
    """Mark a snapshot as used now, so that `clean` leaves it until a run names it; False where it has gone since."""
    with snapshots_locked(path.parent):
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
    return True


def repository_of(folder: Path) -> Path:
    """Return the git repository that holds a folder, or the folder itself."""
    folder = folder.resolve()
    return next((place for place in (folder, *folder.parents) if (place / ".git").exists()), folder)


def _chosen(root: Path, target: Path, rules: SyncRules, include_runs: bool) -> Iterator[str]:
    """Yield the files that travel, relative to `root`."""
    found = _asked_of_git(root, rules) if (root / ".git").exists() else _walked(root)
    own = target.relative_to(root).as_posix() + "/" if target != root and target.is_relative_to(root) else None
    runs: dict[str, bool] = {}
    for name in dict.fromkeys(found):
        if (own and name.startswith(own)) or (target == root and name.startswith("snapshots/")):
            continue
        if not include_runs and _in_run_directory(root, name.rpartition("/")[0], runs):
            continue
        if _matches(name, rules.exclude) or not os.path.lexists(root / name):
            continue
        yield name


def _asked_of_git(root: Path, rules: SyncRules) -> Iterator[str]:
    for name in _git_files(root, "--cached"):
        # A submodule is listed as one name, its folder.
        if (root / name).is_dir() and not (root / name).is_symlink():
            yield from (f"{name}/{inner}" for inner in _asked_of_git(root / name, rules))
        else:
            yield name
    if rules.untracked:
        yield from _git_files(root, "--others", "--exclude-standard")
    if rules.include:
        ignored = _git_files(root, "--others", "--ignored", "--exclude-standard")
        yield from (name for name in ignored if _matches(name, rules.include))


def _git_files(root: Path, *options: str) -> list[str]:
    done = LocalHost().run(["git", "-C", str(root), "ls-files", "-z", *options])
    if done.returncode:
        raise SyncError(f"git cannot list the code in {root}: {done.stderr.strip()}")
    return [name for name in done.stdout.split("\0") if name and not name.endswith("/")]


def _walked(root: Path) -> Iterator[str]:
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        folders[:] = sorted(
            name for name in folders if name not in _SKIPPED and not (here / name / "pyvenv.cfg").exists()
        )
        for name in sorted(files) + [name for name in folders if (here / name).is_symlink()]:
            path = here / name
            if path.is_file() or path.is_symlink():
                yield path.relative_to(root).as_posix()


def _in_run_directory(root: Path, folder: str, known: dict[str, bool]) -> bool:
    """Say whether a folder is, or is inside, a run directory; `known` remembers what was looked at."""
    if folder not in known:
        here = (root / folder / "run.json").exists() and (root / folder / "job.sbatch").exists()
        known[folder] = here or (bool(folder) and _in_run_directory(root, folder.rpartition("/")[0], known))
    return known[folder]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Say whether a path, its last part or a folder above it fits a pattern."""
    places = [name, *(parent.as_posix() for parent in Path(name).parents)]
    return any(
        fnmatch.fnmatchcase(place, pattern.rstrip("/")) or fnmatch.fnmatchcase(Path(place).name, pattern.rstrip("/"))
        for pattern in patterns
        for place in places
    )


def _checked_size(root: Path, names: list[str], rules: SyncRules) -> int:
    sizes = {name: (root / name).lstat().st_size for name in names}
    total = sum(sizes.values())
    if total > rules.max_mib * _MIB:
        largest = sorted(sizes, key=lambda name: sizes[name], reverse=True)[:3]
        told = ", ".join(f"{name} ({sizes[name] / _MIB:.0f} MiB)" for name in largest)
        raise SyncError(
            f"the code in {root} is {total / _MIB:,.0f} MiB in {len(names):,} files, over sync.max_mib "
            f"({rules.max_mib}): the largest are {told}; leave them behind with sync.exclude, or raise sync.max_mib"
        )
    return total


def _holds(path: Path, names: list[str], expected: str) -> bool:
    try:
        return tree_hash(path, names) == expected
    except OSError:
        return False


def _copy(source: Path, path: Path, names: list[str], expected: str) -> None:
    """Copy the files to a staging folder, verify it, and give it its name."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    staging = path.parent / f".staging-{secrets.token_hex(8)}"
    try:
        LocalHost().rsync(
            f"{source}/",
            f"{staging}/",
            options=["-a", "--no-owner", "--no-group", "--files-from=-", "--from0"],
            stdin="\0".join(names),
        )
        if not _holds(staging, names, expected):
            raise SyncError(f"the code in {source} changed while it was copied: run again once it is still")
        if path.exists():
            # A trial has changed the files that it ran from: put them right where they are.
            LocalHost().rsync(f"{staging}/", f"{path}/", options=["-a", "--checksum"])
        else:
            try:
                staging.rename(path)
            except OSError:
                if not _holds(path, names, expected):
                    raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
