"""Bringing the code over: a snapshot, named by its content, that no later edit changes."""

from __future__ import annotations

import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nexa_infra.errors import HostError, SyncError
from nexa_infra.hosts.base import Host
from nexa_infra.hosts.connections import ssh_host
from nexa_infra.hosts.local import LocalHost
from nexa_infra.hosts.login import Login
from nexa_infra.hosts.ssh import SshHost
from nexa_infra.operations.provenance import names_hash, provenance_of, tree_hash
from nexa_infra.operations.selection import Files, changed, chosen, whole_folders
from nexa_infra.operations.snapshots import Claim, claim, dropped_on_failure, finish, snapshots_locked
from nexa_infra.runs.record import Snapshot
from nexa_infra.settings import settings
from nexa_infra.spec.run import SyncRules

__all__ = ["repository_of", "snapshots_locked", "sync_repository"]

# An address of IPv6 stands in brackets.
_REMOTE = re.compile(r"(?:([^:/]+)@)?(\[[^]/@]+\]|[^]:/@[-][^]:/@[]*):(.*)", re.DOTALL)
# In the staging folder nobody looks at files before they are whole, so that each is written under its own name.
_RSYNC = ("-a", "-r", "--no-owner", "--no-group", "--inplace", "--files-from=-", "--from0")
# Two changes of a file that are closer than this may have the same time, on some file systems; seconds.
_TICK_SECONDS = 2.0


def sync_repository(
    destination: str | Path,
    *,
    include_runs: bool = False,
    root: str | Path | None = None,
    rules: SyncRules | None = None,
    host: Host | None = None,
) -> Snapshot:
    """Copy this code to `destination`/snapshots/<hash>, unless it is there already.

    `destination` is a path here, `host:path` or `user@host:path`, with ports, keys and jump hosts as
    ~/.ssh/config says; with `host`, a path on it. On another host a path may be relative to where one
    logs in, or begin with `~`.

    `root` is the code's folder; unset, the git repository that holds the working directory, or the
    working directory. Git is asked which files are code: the tracked ones and, unless `rules` say
    otherwise, those that it neither tracks nor ignores. `include_runs` brings run directories too.

    The copy is made under another name, with hard links to the files that the last snapshots have as
    well, verified on the host, and renamed. What is there already takes one round trip. A snapshot of
    which a trial has changed a file is put right.

    Raises:
        SyncError: there is nothing to copy, it is larger than `rules.max_mib`, it changes while it is
            copied, or `destination` cannot take it.
        HostError: the host cannot be reached; rsync is missing, or failed.
    """
    where, directory = (host, str(destination)) if host else _read(destination)
    if not where.remote:
        directory = str(Path(directory).expanduser().resolve())
    source = Path(root).resolve() if root is not None else repository_of(Path.cwd())
    target = None if where.remote else Path(directory)
    if target is not None and source.is_relative_to(target / "snapshots"):
        raise SyncError(f"{source} is itself a snapshot: run from the code's own folder")
    begun = time.time()
    home = settings().home.expanduser().resolve()
    files = chosen(source, rules or SyncRules(), target=target, home=home, include_runs=include_runs)
    # git is asked, and the host is logged in to, while files are read.
    with ThreadPoolExecutor(2) as threads:
        origin = threads.submit(provenance_of, source)
        ready = threads.submit(_log_in, where)
        name = _hash(source, files)
        ready.result()
        claimed = claim(where, directory, name)
        if not claimed.whole:
            with dropped_on_failure(where, claimed, name):
                _copy(where, source, files, claimed, name, begun)
        known = origin.result()
    return Snapshot(
        hash=name,
        path=f"{claimed.directory}/snapshots/{name}",
        root=str(source),
        files=len(files),
        size=sum(seen.st_size for seen in files.values()),
        commit=known.commit,
        branch=known.branch,
        dirty=known.dirty,
        patch=known.patch,
    )


def repository_of(folder: Path) -> Path:
    """Return the git repository that holds a folder, or the folder itself."""
    folder = folder.resolve()
    return next((place for place in (folder, *folder.parents) if (place / ".git").exists()), folder)


def _read(destination: str | Path) -> tuple[Host, str]:
    """Read a destination as scp does: a colon before the first slash ends a host's name."""
    text = str(destination)
    if isinstance(destination, Path) or ":" not in text.partition("/")[0]:
        return LocalHost(), text
    found = _REMOTE.fullmatch(text)
    if found is None:
        raise SyncError(f"{text!r} names no host: say user@host:path, or ./path for a path here with a colon in it")
    user, host, path = found.groups()
    if not path:
        raise SyncError(f"{text!r} names no path: say {text}path, or {text}. for the folder that one logs in to")
    if path.startswith((":", "//")):
        raise SyncError(f"{text!r} is no place to copy to over SSH: say user@host:path")
    return ssh_host(Login(host=host.strip("[]"), user=user)), path


def _log_in(host: Host) -> None:
    """Open the connection to a host; where it is open, the first thing that is asked is the claim."""
    if isinstance(host, SshHost) and not host.sessions:
        host.script(":")


def _hash(source: Path, files: Files) -> str:
    try:
        return tree_hash(source, files)
    except OSError as error:
        if other := changed(source, files):
            raise SyncError(_changing(source, other)) from error
        name = os.fsdecode(error.filename) if error.filename else source
        raise SyncError(f"{name} cannot be read: {error.strerror}") from error


def _copy(host: Host, source: Path, files: Files, claimed: Claim, name: str, begun: float) -> None:
    """Copy the files to the staging folder, and make a snapshot of it.

    Whatever rsync writes it compares with what it read, by a checksum of the whole file. So contents are read
    again there only where something else is in doubt: it linked a file by its size and time alone, or a file
    was changed so short a time before it was hashed here that another change may have left its time as it is.
    """
    names = names_hash(files)
    links = [f"--link-dest=../{link}" for link in claimed.links]
    doubtful = bool(links) or any(seen.st_ctime > begun - _TICK_SECONDS for seen in files.values())
    # The second time every name is told, and what may be linked is compared by its content.
    for listed, options, read in (
        (whole_folders(source, files), links, doubtful),
        (files, ["--checksum", *links], True),
    ):
        try:
            host.rsync(
                f"{source}/",
                host.there(f"{claimed.staging}/"),
                options=[*_RSYNC, *options],
                # rsync takes a name that begins with # or ; for a comment.
                stdin="\0".join(f"./{name}" for name in listed),
            )
        except HostError as error:
            if other := changed(source, files):
                raise SyncError(_changing(source, other)) from error
            raise
        if other := changed(source, files):
            raise SyncError(_changing(source, other))
        if finish(host, claimed, name, names=names, read=read):
            return
    raise SyncError(
        f"what was copied to {claimed.directory} on {host.name} is not what is in {source}: does its file system "
        "keep links, executable bits and all names?"
    )


def _changing(source: Path, files: list[str]) -> str:
    return f"the code in {source} changed while it was copied ({files[0]}): run again once it is still"
