"""The folder of snapshots on a host: what is there, and how a snapshot is taken up, made and mended, a script each.

The host needs a POSIX shell, coreutils, find, xargs and rsync. A copy is verified under another name and renamed;
`.verified/<hash>` lists its files since. Where one of them is gone, or its ctime is newer than the list, all of them
are verified again: any write to a file, its replacement or removal is noticed, whatever times and sizes say. What
trials added is left, and not looked at.
"""

from __future__ import annotations

import fcntl
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from nexa_infra.errors import HostError, SyncError
from nexa_infra.hosts.base import Host
from nexa_infra.hosts.shell import join, quote

# Sets `found` to the tree hash of the folder that the shell is in, as `provenance.tree_hash` does; `digest LIST` is
# told the files, sorted. sha256sum begins a line with a backslash where it had to escape the name.
DIGEST = r"""
LC_ALL=C
export LC_ALL
list() {
    find . ! -type d -print0 | sort -z
}
digest() {
    found=$({
        sha256sum <"$1" | cut -c 1-64
        xargs -0 stat -c %A -- <"$1" | cut -c 1,4 | tr sS x-
        xargs -0 sh -c 'exec find "$@" -prune -type f -exec sha256sum {} +' sh <"$1" | sed 's/^\\//; s/ .*//'
        xargs -0 sh -c 'exec find "$@" -prune -type l -exec readlink -z {} +' sh <"$1"
    } 2>/dev/null | sha256sum | cut -c 1-16)
}
"""
_COMMON = (
    DIGEST
    + r"""
dir=$1 hash=$2 token=$3
fail() {
    echo "$1" >&2
    exit 1
}
# Whoever removes snapshots holds this lock as well (`snapshots_locked`). A file system that has none does without.
lock() {
    exec 9>>snapshots.lock || exit 1
    flock -w 60 9 2>/dev/null || [ $? -ne 1 ] || fail "$PWD/snapshots.lock is held by another process"
}
# In snapshots/: what has not been touched since it was listed is whole. What was is verified again, and listed as of
# before that, so that nothing which happens meanwhile is missed.
whole() {
    [ -d "$1" ] && [ ! -L "$1" ] && [ -s ".verified/$1" ] && cd "$1" || return 1
    found=$1
    touched=$(xargs -0 sh -c 'list=$1; shift; exec find "$@" -prune -cnewer "$list"' sh "../.verified/$1" \
        <"../.verified/$1" 2>&1 | head -n 1)
    if [ -n "$touched" ]; then
        found=
        cp "../.verified/$1" "../.verified/$token.again" && digest "../.verified/$token.again"
        if [ "$found" = "$1" ]; then
            mv -f "../.verified/$token.again" "../.verified/$1"
        else
            rm -f "../.verified/$token.again"
        fi
    fi
    cd .. && [ "$found" = "$1" ]
}
# In snapshots/: removes a staging folder, of which every folder may be read-only.
drop() {
    [ -d "$1" ] && [ ! -L "$1" ] || return 0
    find "$1" -type d ! -perm -700 -exec chmod u+rwx {} \;
    rm -rf "./$1"
}
"""
)
# Answers `whole`, or the snapshots to link against; then the directory, absolute.
_CLAIM = r"""
case $dir in
    /*) ;;
    "~"*) fail "there is no user ${dir%%/*} there" ;;
    *) dir=${PWD%/}/$dir ;;
esac
command -v rsync >/dev/null || exit 69
[ -d "$dir" ] || mkdir -p -m 700 -- "$dir" || exit 1
cd -- "$dir" || exit 1
dir=$PWD
[ -n "$(ls -A)" ] || printf '*\n' >.gitignore || exit 1
mkdir -p -m 700 snapshots snapshots/.verified || exit 1
lock
cd snapshots || exit 1
if whole "$hash"; then
    touch -c "$hash"
    state=whole
else
    { : >".verified/$token"; } && mkdir ".staging-$token" || exit 1
    state=$(ls -1t | grep -Ex '[0-9a-f]{16}' | grep -vx "$hash" | head -n 3 | tr '\n' ' ')
fi
printf '%s\n%s' "$state" "$dir"
"""
# NAMES is the SHA-256 of the list of files. The staged copy is verified, and gets its name or mends what has it:
# answers `done`; or `different`, and the staging folder is empty again.
_FINISH = r"""
names=$4 how=$5
cd -- "$dir/snapshots/.staging-$token" || exit 1
made=.verified/$token
list >"../$made" || exit 1
found=$hash
case $(sha256sum <"../$made") in
    "$names "*) [ "$how" = listed ] || digest "../$made" ;;
    *) found= ;;
esac
if [ "$found" != "$hash" ]; then
    cd .. && rm -f "$made" && drop ".staging-$token" && mkdir ".staging-$token" || exit 1
    printf 'different'
    exit
fi
cd -- "$dir" || exit 1
lock
cd snapshots || exit 1
if [ ! -e "$hash" ] && [ ! -L "$hash" ]; then
    # First the list: a client that ends between the two leaves no snapshot that nothing was verified of.
    mv -f "$made" ".verified/$hash" && mv -T ".staging-$token" "$hash" || exit 1
elif ! whole "$hash"; then
    [ -d "$hash" ] && [ ! -L "$hash" ] || fail "$PWD/$hash is in the way: it is no folder"
    rsync -a --no-owner --no-group --checksum --omit-dir-times --force ".staging-$token/" "$hash/" || exit 1
    cd "$hash" || exit 1
    digest "../$made"
    cd .. || exit 1
    [ "$found" = "$hash" ] || fail "$PWD/$hash is damaged, and cannot be mended"
    mv -f "$made" ".verified/$hash" || exit 1
fi
touch -c "$hash"
exec 9>&-
printf 'done'
rm -f "$made"
drop ".staging-$token"
# What clients that were killed have left, a day ago or more; and the lists of snapshots that have gone.
for made in .verified/*; do
    old=${made##*/}
    [ -d "$old" ] || [ -n "$(find "$made" -prune -mtime -1)" ] || { drop ".staging-$old" && rm -f "$made"; }
done
"""
_DROP = r"""
cd -- "$dir/snapshots" && rm -f ".verified/$token" && drop ".staging-$token"
"""
_HOME = re.compile(r"(~(?:\w[\w.-]*)?(?:/|$))(.*)", re.ASCII | re.DOTALL)
_NO_RSYNC = 69
_SHELL = re.compile(r"^\S*sh: (?:line )?\d+: ")


@contextmanager
def snapshots_locked(folder: Path) -> Iterator[None]:
    """Hold what a folder of snapshots is locked by: none is removed while a run takes one up."""
    with folder.with_suffix(".lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@dataclass(frozen=True)
class Claim:
    """What a host says of a snapshot that is asked for: it is there, and marked as used now, or where to copy to."""

    directory: str  # absolute: what holds snapshots/
    whole: bool
    links: tuple[str, ...] = ()  # other snapshots, the last used first
    token: str = ""

    @property
    def staging(self) -> str:
        """Where a copy is made."""
        return f"{self.directory}/snapshots/.staging-{self.token}"


def claim(host: Host, directory: str, name: str) -> Claim:
    """Take up a snapshot, in one round trip; where it is not there whole, a staging folder is.

    `directory` may be relative to where one logs in, or begin with `~`; it is made where it is missing.

    Raises:
        SyncError: it cannot be made or written.
        HostError: the host cannot be reached, or has no rsync.
    """
    token = secrets.token_hex(8)
    state, _, place = _run(host, _CLAIM, directory, name, token).partition("\n")
    if state == "whole":
        return Claim(place, whole=True)
    return Claim(place, whole=False, links=tuple(state.split()), token=token)


def finish(host: Host, claimed: Claim, name: str, *, names: str, read: bool) -> bool:
    """Verify the staged copy, and give it its name; False where it is not what it should be.

    `names` is the `names_hash` of what should be there. Contents are read again on the host where `read`
    says so: it is not needed where rsync has written all of them, and so compared all of them already.

    Raises:
        SyncError: what has the name is damaged, and cannot be mended.
        HostError: the host cannot be reached.
    """
    how = "read" if read else "listed"
    return _run(host, _FINISH, claimed.directory, name, claimed.token, names, how) == "done"


@contextmanager
def dropped_on_failure(host: Host, claimed: Claim, name: str) -> Iterator[None]:
    """Remove the staged copy where what is done with it fails."""
    try:
        yield
    except BaseException:
        # Where it cannot be removed now, the next sync or `clean` removes it.
        with suppress(HostError, SyncError):
            _run(host, _DROP, claimed.directory, name, claimed.token)
        raise


def _run(host: Host, script: str, directory: str, *words: str) -> str:
    # The shell knows whose home `~ada` is, as long as neither that nor the slash after it is quoted.
    found = _HOME.fullmatch(directory)
    home, rest = found.groups() if found else ("", directory)
    place = home + quote(rest) if rest else home
    done = host.script(f"set -- {place} {join(words)}\n{_COMMON}{script}")
    if done.returncode == _NO_RSYNC:
        remedy = "ask its administrators for it" if host.remote else "apt-get install rsync (or your system's own)"
        raise HostError(f"rsync is not installed on {host.name}: {remedy}")
    if done.returncode:
        said = [_SHELL.sub("", line) for line in done.stderr.splitlines() if line.strip()]
        raise SyncError(f"{directory} on {host.name} cannot take the code: {'; '.join(said[-3:]) or 'it said nothing'}")
    return done.stdout
