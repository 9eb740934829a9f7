"""What old runs have left in a cluster's workdir, and its removal: one script measures it, one removes a thing.

Only plain folders of one's own that lie directly in `runs/` and `snapshots/`, and files in `images/`, under names that
this package gives, are ever removed. The host needs GNU find, awk, grep and xargs.
"""

from __future__ import annotations

import re
import secrets
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from nexa_infra.errors import HostError, NexaError, UnknownStateError
from nexa_infra.hosts.base import Completed, Host
from nexa_infra.hosts.shell import join, quote
from nexa_infra.monitoring.report_text import clean as printable
from nexa_infra.operations import clean
from nexa_infra.operations.clean import Leftover, NotRemovedError, Staying
from nexa_infra.operations.manage import home
from nexa_infra.runs.index import known_runs, run_at
from nexa_infra.scheduling.slurm.client import SlurmClient, queue_command, read_answer, section, sections
from nexa_infra.scheduling.slurm.tasks import queue_of
from nexa_infra.scheduling.slurm.text import QueueRow
from nexa_infra.spec.cluster import Cluster

# What a client that was killed has left is nobody's after this long, whatever a person asks for; seconds.
REMAINS_SECONDS = 86400.0
# Millions of files on a busy file system take their time, in silence; seconds.
PATIENCE = 3600.0

_RUN = r"[0-9]{8}-[0-9]{6}-[a-z0-9-]+"
_SNAPSHOT = r"[0-9a-f]{16}"
_IMAGE = r"[0-9a-f]{64}"
_OF_AN_IMAGE = rf"{_IMAGE}\.(sif|log|sif\.[A-Za-z0-9._-]+)"
_REMAINS = r"\.(deleting|staging)-[A-Za-z0-9._-]+"
# What the scripts end with where something stays, and where there is no workdir yet.
_STAYS = 65
_ABSENT = 66

# links: a line for each run's link to its code, `code FOLDER TARGET`, those included that are links themselves or lie
# elsewhere; `hidden` where a folder cannot be looked into. Names may hold anything: their newlines become spaces.
_COMMON = r"""
LC_ALL=C
export LC_ALL
me=$(id -u)
stays() {
    printf '%s\n' "$1" >&2
    exit 65
}
links() {
    {
        [ ! -d runs ] || find ./runs -mindepth 2 -maxdepth 2 -name code ! -path './runs/.deleting-*' -type l \
            -printf 'code %P %l\0' || printf 'hidden\0'
        for each in ./runs/* "$@"; do
            case $each in
                ./runs/*) [ -L "$each" ] || continue ;;
            esac
            [ -L "$each/code" ] && printf 'code - %s\0' "$(readlink -- "$each/code")"
        done
    } | tr '\n\0' ' \n'
}
# A line for each digest that a run's record holds; those that `links` knows no run of count for everybody.
wants() {
    [ ! -d runs ] || find ./runs -mindepth 2 -maxdepth 2 -name run.json ! -path './runs/.deleting-*' ! -readable \
        -printf 'masked\n' || printf 'masked\n'
    [ ! -d runs ] || find ./runs -mindepth 2 -maxdepth 2 -name run.json ! -path './runs/.deleting-*' \
        -exec grep -HosE '"sha256:[0-9a-f]{64}"' '{}' +
    for each in ./runs/* "$@"; do
        case $each in
            ./runs/*) [ -L "$each" ] || continue ;;
        esac
        grep -hosE '"sha256:[0-9a-f]{64}"' -- "$each/run.json"
    done
    true
}
"""

_ENTER = r"""
[ -e "$workdir" ] || exit 66
cd -P -- "$workdir" || exit 1
for each in runs snapshots; do
    [ ! -L "$each" ] || stays "$each is a link, which is not followed"
done
"""

# size: `size PATH BYTES INODES CTIME`, of what may go; a file that has several names counts for a part in each.
_LOOK = r"""
look() {
    printf 'now %s\n' "$now"
    used='' made='' remains=''
    if [ -d runs ]; then
        cd ./runs || exit 1
        find . -mindepth 1 -maxdepth 1 -type d -uid "$me" -regextype posix-extended -regex "\./$a_run" \
            -printf 'ours %f\n'
        used=$(find . -mindepth 1 -maxdepth 3 -regextype posix-extended \
            '(' -type d -path './*/*' ! -name status ! -name submissions -prune ')' -o \
            '(' ! -name lock ! -name .sbatch.lock -regex "\./$a_run/$of_a_run" -printf '%y %T@ %P\n' ')' |
            awk '{
                split($3, part, "/")
                if ($2 + 0 > newest[part[1]] + 0) newest[part[1]] = $2
                if ($1 == "f" && part[2] == "run.json") whole[part[1]] = 1
            }
            END { for (run in whole) print "used", run, newest[run] }')
        cd .. || exit 1
    fi
    if [ -d snapshots ]; then
        cd ./snapshots || exit 1
        made=$(find . -mindepth 1 -maxdepth 1 -type d -uid "$me" -regextype posix-extended -regex "\./$a_snapshot" \
            -printf 'snapshot %f %T@\n')
        cd .. || exit 1
    fi
    if [ -d images ] && [ ! -L images ]; then
        cd ./images || exit 1
        find . -mindepth 1 -maxdepth 1 ! -type d -uid "$me" -regextype posix-extended -regex "\./$of_an_image" \
            -printf 'image %f %s %T@ %A@\n'
        cd .. || exit 1
    fi
    remains=$(find ./runs ./snapshots -mindepth 1 -maxdepth 1 -type d -uid "$me" -regextype posix-extended \
        -regex "\./(runs|snapshots)/$remains_of_a_crash" -printf '%H/%f\n' | cut -c 3-)
    printf '%s\n' "$used" "$made"
    {
        printf '%s\n' "$used" | awk -v limit="$limit" '$1 == "used" && $3 < limit + 0 { print "runs/" $2 }'
        printf '%s\n' "$made" | awk -v limit="$limit" '$1 == "snapshot" && $3 < limit + 0 { print "snapshots/" $2 }'
        printf '%s\n' "$remains"
    } | xargs -r sh -c 'exec find "$@" -printf "%s %n %y %C@ %H\n"' sh |
        awk '{
            part = $3 == "d" ? 1 : 1 / $2
            bytes[$5] += $1 * part
            inodes[$5] += part
            if ($4 + 0 > newest[$5] + 0) newest[$5] = $4
        }
        END { for (path in bytes) printf "size %s %.0f %.0f %s\n", path, bytes[path], inodes[path], newest[path] }'
}
"""

# In runs/ or snapshots/, as `place` says; `doomed` is the name under which it goes.
_REMOVE = r"""
since=$(($(date +%s) - grace))
mine() {
    [ ! -L "$name" ] && [ -n "$(find "./$name" -prune -type d -uid "$me" 2>/dev/null)" ]
}
hold() {
    flock "$@" 9 2>/dev/null || [ $? -ne 1 ]
}
hide_run() {
    { [ -f "$name/run.json" ] && [ ! -L "$name/run.json" ]; } || stays "it holds no run.json"
    lock=$name/submissions/.sbatch.lock
    { [ ! -L "$name/submissions" ] && [ ! -L "$lock" ]; } || stays "its submissions are a link"
    # Whoever submits holds this lock, and sbatch inherits it. Where there is none, nobody ever has.
    if { true >>"$lock"; } 2>/dev/null; then
        exec 9>>"$lock"
        hold -n || stays "it is being submitted"
    elif [ -e "$lock" ]; then
        stays "its lock cannot be opened"
    fi
    young=$(find "./$name/run.json" "./$name/status" "./$name/submissions" -maxdepth 1 -type f \
        ! -name lock ! -name .sbatch.lock -newermt "@$since" -print -quit 2>/dev/null)
    [ -z "$young" ] || stays "it was used just now"
    queue=$(squeue -h -u "$(id -un)" -o %j 2>&1) || stays "squeue cannot say how its jobs stand: $queue"
    ! printf '%s\n' "$queue" | grep -q "^nexa-$name-" || stays "its jobs are in the queue again"
    mv -T -- "$name" "$doomed" || exit 1
    exec 9>&-
}
hide_snapshot() {
    [ -z "$(find "./$name" -prune -newermt "@$since")" ] || stays "it is in use again"
    uses=$(cd .. && links "$@" 2>/dev/null) || exit 1
    ! printf '%s\n' "$uses" | grep -Eq "^hidden\$|[ /]$name\$" || stays "it is in use again"
    mv -T -- "$name" "$doomed" || exit 1
    rm -f -- ".verified/$name"
}
hide_remains() {
    [ -z "$(find "./$name" -prune -newerct "@$(($(date +%s) - day))")" ] || stays "it is in use"
    [ "$name" = "$doomed" ] || mv -T -- "$name" "$doomed" || exit 1
    case $name in .staging-*) rm -f -- ".verified/${name#.staging-}" ;; esac
}
# A builder's lock is as old as its build: the heartbeat beside it says that it goes on.
remove_image() {
    [ -z "$(find . -mindepth 1 -maxdepth 1 -name "$image.*" '(' -newermt "@$since" -o -newerat "@$since" ')' \
        -print -quit)" ] || stays "it was used just now"
    uses=$(cd .. && wants "$@" 2>/dev/null) || exit 1
    ! printf '%s\n' "$uses" | grep -Eq "^masked\$|sha256:$image\"\$" || stays "it is in use again"
    find . -mindepth 1 -maxdepth 1 ! -type d -uid "$me" -name "$image.*" -exec rm -f -- '{}' + || exit 1
}
[ ! -L "$place" ] || stays "$place is a link, which is not followed"
cd "./$place" 2>/dev/null || exit 66
if [ "$kind" = image ]; then
    image=${name%.sif}
    remove_image "$@"
    exit 0
fi
mine || stays "it is no folder of yours"
if [ "$place" = snapshots ]; then
    # Whoever takes up a snapshot holds this lock as well.
    exec 9>>../snapshots.lock || exit 1
    hold -w 60 || stays "snapshots.lock is held by another process"
fi
"hide_$kind" "$@"
exec 9>&-
# What was made read-only goes, too.
find "./$doomed" -type d ! -perm -700 -exec chmod u+rwx {} \; 2>/dev/null
rm -rf -- "./$doomed" || exit 1
"""
_OF_A_RUN = (
    r"(run\.json|cancelled|left|sacct\.txt|results\.csv|cost_report\.(json|md)|(status|submissions)(/[A-Za-z0-9._-]+)?)"
)


@dataclass(frozen=True)
class Workdir:
    """What was found in a cluster's workdir; moments are by its clock, seconds since the epoch."""

    now: float
    runs: Mapping[str, float]  # one's own: when it was last used
    snapshots: Mapping[str, float]  # likewise
    sizes: Mapping[str, tuple[int, int, float]]  # of what may go: bytes, inodes, and when anything in it changed last
    images: Mapping[str, tuple[int, int, float]]  # SIFs with their logs: bytes, files, and when any was used last
    digests: Mapping[str, Set[str]]  # the digests that each run's record holds; those of `-` are used elsewhere
    masked: bool  # whether a record in runs/ cannot be read
    code: Mapping[str, Set[str]]  # the snapshots that each folder in runs/ uses; those of `-` are used elsewhere
    hidden: bool  # whether a folder in runs/ cannot be looked into
    queue: Sequence[QueueRow]


def leftovers_on(cluster: Cluster, host: Host, older: float) -> tuple[list[Leftover], list[Staying]]:
    """Return what was last used more than `older` seconds ago on a cluster, runs first, and the runs that stay.

    Nothing is changed there. `used` is by this machine's clock.

    Raises:
        UnknownStateError: squeue cannot say which runs have jobs: nothing may be removed.
        NexaError: the workdir cannot be looked at.
        HostError: the host cannot be reached.
    """
    older = min(max(older, clean.GRACE_SECONDS, 0.0), 1e10)
    # Nothing that a folder is called can print a mark which nobody knows.
    files, queue, links, wants = (f"{name}_{secrets.token_hex(8)}" for name in ("files", "queue", "links", "wants"))
    names = {"a_run": _RUN, "a_snapshot": _SNAPSHOT, "remains_of_a_crash": _REMAINS, "of_a_run": _OF_A_RUN}
    names["of_an_image"] = _OF_AN_IMAGE
    text = _opening(cluster, _elsewhere(cluster), older=f"{older:.0f}", **names)
    text += f"{_LOOK}now=$(date +%s)\nlimit=$((now - older))\n{_ENTER}"
    text += section(files, "(look 2>/dev/null)")
    text += section(queue, queue_command("nexa-"))
    text += section(links, '(links "$@" 2>/dev/null)')
    text += section(wants, '([ ! -d images ] || wants "$@" 2>/dev/null)')
    begun = time.time()
    done = SlurmClient(host).script(text, timeout=PATIENCE)
    if done.returncode == _ABSENT:
        return [], []
    if done.returncode:
        raise NexaError(f"{printable(cluster.workdir)} on {host.name} cannot be looked at: {_words(done)}")
    found = sections(done.stdout)
    if {files, queue, links, wants} - found.keys() or found[files][1]:
        what = f"{host.name} did not tell what is in {printable(cluster.workdir)}"
        raise HostError(f"{what}: does it have GNU find, awk and xargs?")
    try:
        rows = read_answer(found[queue], "nexa-").rows
    except UnknownStateError as error:
        raise UnknownStateError(f"nothing is removed from {printable(cluster.workdir)}: {error}") from error
    looked = read_workdir(found[files][0], found[links][0], found[wants][0], rows)
    return sort_out(looked, Path(cluster.workdir), older, begun - looked.now)


def read_workdir(files: str, links: str, wants: str, queue: Sequence[QueueRow]) -> Workdir:
    """Read what the script printed of a workdir."""
    told: dict[str, list[list[str]]] = defaultdict(list)
    for line in files.splitlines():
        word, *fields = line.split(" ")
        told[word].append(fields)
    ours = {name for (name,) in told["ours"]}
    code: dict[str, set[str]] = defaultdict(set)
    for line in links.split("\n"):
        if ends := re.search(rf"(?:[ /]|^)({_SNAPSHOT})$", line):
            run = re.match(rf"code ({_RUN})/code ", line)
            code[run[1] if run else "-"].add(ends[1])
    digests: dict[str, set[str]] = defaultdict(set)
    for line in wants.split("\n"):
        if asked := re.fullmatch(rf"(?:\./runs/({_RUN})/run\.json:)?.*\"sha256:({_IMAGE})\"", line):
            digests[asked[1] or "-"].add(asked[2])
    images: dict[str, tuple[int, int, float]] = {}
    for name, size, *moments in told["image"]:
        digest = name.partition(".")[0]
        bytes_, count, last = images.get(digest, (0, 0, 0.0))
        images[digest] = (bytes_ + int(size), count + 1, max(last, *map(float, moments)))
    return Workdir(
        now=float(told["now"][0][0]),
        runs={name: float(used) for name, used in told["used"] if name in ours},
        snapshots={name: float(used) for name, used in told["snapshot"]},
        sizes={path: (int(size), int(inodes), float(newest)) for path, size, inodes, newest in told["size"]},
        images=images,
        digests=digests,
        masked="masked" in wants.split("\n"),
        code=code,
        hidden="hidden" in links.split("\n"),
        queue=queue,
    )


def sort_out(found: Workdir, base: Path, older: float, skew: float) -> tuple[list[Leftover], list[Staying]]:
    """Say what goes and which old runs stay; `skew` is how far this machine's clock is ahead, seconds."""
    gone: list[Leftover] = []
    stays: list[Staying] = []
    limit = found.now - older

    def leftover(kind: clean.Kind, path: str, used: float) -> Leftover:
        size, inodes, _ = found.sizes.get(path, (0, 1, used))
        return Leftover(kind, base / path, size, inodes, used + skew)

    going: set[str] = set()
    for name, used in found.runs.items():
        if used >= limit:
            continue
        jobs = [row for row in found.queue if row.name.startswith(f"nexa-{name}-") and queue_of([row]).active]
        if jobs:
            stays.append(Staying(base / "runs" / name, _in_queue({row.array_id for row in jobs})))
        else:
            going.add(name)
            gone.append(leftover("run", f"runs/{name}", used))
    for path, (_, _, newest) in found.sizes.items():
        if re.fullmatch(_REMAINS, path.partition("/")[2]) and newest < found.now - REMAINS_SECONDS:
            gone.append(leftover("remains", path, newest))
    kept = {each for name, hashes in found.code.items() if name not in going for each in hashes}
    unused = {name: used for name, used in found.snapshots.items() if name not in kept and used < limit}
    if unused and found.hidden:
        stays.append(Staying(base / "snapshots", "a folder in runs/ cannot be looked into, and may use them"))
    else:
        gone.extend(leftover("snapshot", f"snapshots/{name}", used) for name, used in unused.items())
    asked = {each for name, digests in found.digests.items() if name not in going for each in digests}
    idle = {name: image for name, image in found.images.items() if name not in asked and image[2] < limit}
    if idle and found.masked:
        stays.append(Staying(base / "images", "a run.json in runs/ cannot be read, and may ask for them"))
    else:
        for name, (size, files, used) in idle.items():
            gone.append(Leftover("image", base / "images" / f"{name}.sif", size, files, used + skew))
    # Runs go first: a snapshot or an image stays as long as a run that uses it.
    return sorted(gone, key=lambda each: (each.kind in {"snapshot", "image"}, each.used)), stays


def remove_on(host: Host, cluster: Cluster, leftover: Leftover) -> None:
    """Delete a run directory, a snapshot, an image or what a crash left on a cluster, unless it is in use again.

    Raises:
        NexaError: it is in use, or is none of these; it stays.
        NotRemovedError: some of it could not be deleted, and is left under a name of no run.
        HostError: the host cannot be reached; what is left of it will be found.
    """
    path, kind = leftover.path, leftover.kind
    place, name = path.parent.name, path.name
    known = {"run": ("runs", _RUN), "snapshot": ("snapshots", _SNAPSHOT), "image": ("images", rf"{_IMAGE}\.sif")}
    folder, pattern = known.get(kind, (place, _REMAINS))
    named = re.fullmatch(pattern, name) and place == folder and (place != "images" or kind == "image")
    named = named and place in {"runs", "snapshots", "images"}
    if not named or path.parent != Path(cluster.workdir) / place:
        raise NexaError(f"{printable(str(path))} is nothing of this package's in {cluster.name}'s workdir: it stays")
    doomed = name if name.startswith(".deleting-") else f".deleting-{name.removeprefix('.')}-{secrets.token_hex(4)}"
    text = _opening(cluster, kind=kind, place=place, name=name, doomed=doomed, grace=f"{clean.GRACE_SECONDS:.0f}",
                    day=f"{REMAINS_SECONDS:.0f}")  # fmt: skip
    done = SlurmClient(host).script(f"{text}{_ENTER}{_REMOVE}", timeout=PATIENCE)
    if done.returncode == _ABSENT:
        raise NexaError(f"{printable(str(path))} is not there any more")
    if done.returncode == _STAYS:
        raise NexaError(f"{printable(str(path))} stays: {_words(done)}")
    if done.returncode:
        raise NotRemovedError(f"{printable(str(path))} could not be removed: {_words(done)}")


def _opening(cluster: Cluster, places: Iterable[str] = (), **values: str) -> str:
    if not cluster.workdir.startswith("/"):
        raise NexaError(f"{cluster.name}: the workdir {cluster.workdir} is no absolute path: nothing is removed")
    assignments = "".join(f"{name}={quote(value)}\n" for name, value in {"workdir": cluster.workdir, **values}.items())
    return f"set -- {join(places)}\n{assignments}{_COMMON}"


def _elsewhere(cluster: Cluster) -> Iterator[str]:
    """Yield this client's runs that use a cluster's snapshots, and do not lie beside them."""
    for entry in known_runs(home()):
        try:
            run = run_at(entry.directory)
        except (NexaError, OSError, ValidationError):
            continue
        there = Path(run.directory).parent
        if run.cluster and Path(run.workdir) == Path(cluster.workdir) and there != Path(run.workdir) / "runs":
            yield run.directory


def _in_queue(ids: Set[str]) -> str:
    listed = ", ".join(sorted(ids, key=int)[:5])
    more = f" and {len(ids) - 5:,} more" if len(ids) > 5 else ""
    return f"its {'job' if len(ids) == 1 else 'jobs'} {listed}{more} {'is' if len(ids) == 1 else 'are'} in the queue"


def _words(done: Completed) -> str:
    said = [re.sub(r"^\S*sh: (?:line )?\d+: ", "", line) for line in done.stderr.splitlines() if line.strip()]
    return printable("; ".join(said[-3:]))[-500:] or f"exit code {done.returncode}"
