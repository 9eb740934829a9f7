"""Which files are code: asked of git where there is one, and chosen by the rules of the run."""

from __future__ import annotations

import fnmatch
import os
import stat
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path

from nexa_infra.errors import SyncError
from nexa_infra.spec.run import SyncRules

_MIB = 2**20
# Where there is no git to ask: folders that never are code.
_SKIPPED = frozenset({".git", ".hg", ".svn", ".nexa", ".venv", "__pycache__", "node_modules", ".tox", ".mypy_cache"})

Files = dict[str, os.stat_result]
Found = tuple[str, os.stat_result]


def chosen(
    root: Path, rules: SyncRules, *, target: Path | None, home: Path | None = None, include_runs: bool = False
) -> Files:
    """Return the files that travel, each as it is now, by their paths relative to `root`.

    `target` is where they go to, if that is on this machine: it does not travel itself. Nor does `home`, where runs
    are being made that nobody would know for one yet.

    Raises:
        SyncError: there are none, they are larger than `rules.max_mib`, or one of them is no file.
    """
    own = [_below(root, target) or "snapshots/"] if target is not None and target.is_relative_to(root) else []
    if home is not None and not include_runs and home.is_relative_to(root) and home != root:
        own.append(_below(root, home))
    files = dict(_found(root, rules, tuple(own), include_runs))
    if not files:
        raise SyncError(f"there is no code in {root}: every file is ignored or excluded")
    for name, seen in files.items():
        if not (stat.S_ISREG(seen.st_mode) or stat.S_ISLNK(seen.st_mode)):
            raise SyncError(f"{root / name} is neither a file nor a link: leave it behind with sync.exclude")
    _check_size(root, files, rules)
    return files


def whole_folders(root: Path, files: Iterable[str]) -> list[str]:
    """Return the files with a folder in place of all that is in it, wherever all of it travels.

    rsync needs half as long for a folder as for its files one by one. A file that somebody makes there
    meanwhile travels too: the copy's names are to be compared.
    """
    inside: dict[str, set[str]] = {"": set()}
    for name in files:
        folder, _, last = name.rpartition("/")
        if folder not in inside:
            inside[folder] = set()
            while folder:
                folder_above, _, itself = folder.rpartition("/")
                inside.setdefault(folder_above, set()).add(itself)
                folder = folder_above
        inside[name.rpartition("/")[0]].add(last)
    whole: set[str] = set()
    for folder in sorted(inside, key=lambda each: each.count("/") if each else -1, reverse=True):
        below = (f"{folder}/{each}" if folder else each for each in inside[folder])
        if all(each in whole for each in below if each in inside) and _entries(root, folder) == inside[folder]:
            whole.add(folder)
    return list(_collapsed("", inside, whole))


def _collapsed(folder: str, inside: Mapping[str, Set[str]], whole: Set[str]) -> Iterator[str]:
    if folder in whole:
        yield folder or "."
        return
    for each in sorted(inside[folder]):
        name = f"{folder}/{each}" if folder else each
        if name in inside:
            yield from _collapsed(name, inside, whole)
        else:
            yield name


def _entries(root: Path, folder: str) -> set[str]:
    try:
        return set(os.listdir(f"{root}/{folder}"))  # noqa: PTH208 - its names alone are asked for
    except OSError:
        return set()


def changed(root: Path, files: Files) -> list[str]:
    """Return which files are other ones than they were when they were chosen."""
    return [name for name, seen in files.items() if (now := _looked(root, name)) is None or _stamp(now) != _stamp(seen)]


def _stamp(seen: os.stat_result) -> tuple[int, ...]:
    return (seen.st_ino, seen.st_mode, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)


def _looked(root: Path, name: str) -> os.stat_result | None:
    try:
        return os.lstat(f"{root}/{name}")
    except (FileNotFoundError, NotADirectoryError):
        return None


def _below(root: Path, folder: Path) -> str:
    """Return what the names of all that is in a folder begin with; nothing for `root` itself."""
    return "" if folder == root else f"{folder.relative_to(root).as_posix()}/"


def _found(root: Path, rules: SyncRules, own: tuple[str, ...], include_runs: bool) -> Iterator[Found]:
    runs: dict[str, bool] = {}
    for name, seen in _asked_of_git(root, rules) if (root / ".git").exists() else _walked(root):
        if name.startswith(own):
            continue
        if not include_runs and _in_run_directory(root, name.rpartition("/")[0], runs):
            continue
        if rules.exclude and _matches(name, rules.exclude):
            continue
        yield name, seen


def _asked_of_git(root: Path, rules: SyncRules) -> Iterator[Found]:
    names = _git_files(root, "--cached", *(("--others", "--exclude-standard") if rules.untracked else ()))
    if rules.include:
        ignored = _git_files(root, "--others", "--ignored", "--exclude-standard")
        names += [name for name in ignored if _matches(name, rules.include)]
    for name in dict.fromkeys(names):
        seen = _looked(root, name)
        if seen is None:
            continue  # git knows it, and it has gone
        if stat.S_ISDIR(seen.st_mode):
            # A submodule is listed as one name, its folder.
            yield from ((f"{name}/{inner}", each) for inner, each in _asked_of_git(root / name, rules))
        else:
            yield name, seen


def _git_files(root: Path, *options: str) -> list[str]:
    # Bytes: a name may hold any but NUL.
    try:
        done = subprocess.run(["git", "-C", root, "ls-files", "-z", *options], capture_output=True, check=False)
    except FileNotFoundError:
        raise SyncError(f"git is not installed here, and {root} is a git repository: install it") from None
    if done.returncode:
        said = done.stderr.decode("utf-8", "replace").strip()
        raise SyncError(f"git cannot list the code in {root}: {said}")
    return [os.fsdecode(name) for name in done.stdout.split(b"\0") if name and not name.endswith(b"/")]


def _walked(root: Path) -> Iterator[Found]:
    for folder, folders, files in os.walk(root):
        here = Path(folder)
        folders[:] = sorted(
            name for name in folders if name not in _SKIPPED and not (here / name / "pyvenv.cfg").exists()
        )
        for name in sorted(files) + [name for name in folders if (here / name).is_symlink()]:
            path = (here / name).relative_to(root).as_posix()
            seen = _looked(root, path)
            # What is no code, such as a socket of an editor's, was never asked for.
            if seen is not None and (stat.S_ISREG(seen.st_mode) or stat.S_ISLNK(seen.st_mode)):
                yield path, seen


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


def _check_size(root: Path, files: Files, rules: SyncRules) -> None:
    sizes = {name: seen.st_size for name, seen in files.items()}
    total = sum(sizes.values())
    if total > rules.max_mib * _MIB:
        largest = sorted(sizes, key=lambda name: sizes[name], reverse=True)[:3]
        told = ", ".join(f"{name} ({sizes[name] / _MIB:.0f} MiB)" for name in largest)
        raise SyncError(
            f"the code in {root} is {total / _MIB:,.0f} MiB in {len(files):,} files, over sync.max_mib "
            f"({rules.max_mib}): the largest are {told}; leave them behind with sync.exclude, or raise sync.max_mib"
        )
