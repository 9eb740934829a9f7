"""A client's copy of a run directory that is on another host: made there from here, and kept up here from there."""

from __future__ import annotations

import base64
import io
import re
import secrets
import tarfile
from collections.abc import Sequence
from pathlib import Path

from nexa_infra.errors import HostError, SubmitError
from nexa_infra.hosts.framing import write_file
from nexa_infra.hosts.shell import quote
from nexa_infra.runs.directory import write_atomically
from nexa_infra.runs.record import Run

# Clocks of file servers differ: files that changed this long before the last look are brought again, seconds.
SLACK_SECONDS = 120
TAIL_BYTES = 8192

_MARK = "==nexa files=="
_NAMES = re.compile(
    r"(?:status|submissions|claims)/[\w][\w.-]*|trials/\d+/metrics\.json|(?:cancelled|left|sacct\.txt|run\.json)"
)


def push_script(run: Run) -> str:
    """Return a script that makes the run directory from the client's copy, whole or not at all."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as archive:
        archive.add(run.files.path, arcname=".", filter=_as_made)
    parent, name = str(Path(run.directory).parent), Path(run.directory).name
    staged = f".staging-{secrets.token_hex(8)}"
    workdir = quote(run.workdir)
    return f"""
umask 077
mkdir -p -- {workdir} {quote(parent)} || exit 73
[ -e {workdir}/.gitignore ] || printf '*\\n' >{workdir}/.gitignore
cd -- {quote(parent)} && mkdir -- {staged} || exit 73
if base64 -d <<'NEXA_FILES' | tar -xzf - -C {staged} && chmod 700 -- {staged} && mv -T -- {staged} {quote(name)}
{base64.encodebytes(packed.getvalue()).decode()}NEXA_FILES
then exit 0; fi
rm -rf -- {staged}
[ -e {quote(name)}/run.json ] || exit 74
"""


def _as_made(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Leave out what belongs to this client alone."""
    if Path(member.name).name in {"lock", "tails"}:
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def changed_files(since: float | None, *, places: Sequence[str] = ("status", "submissions")) -> str:
    """Return shell that packs the run's files that have changed since a moment, seconds since the epoch there."""
    newer = "" if since is None else f"-newermt @{since - SLACK_SECONDS:.0f} "
    where = " ".join(quote(place) for place in places)
    return (
        f"printf '%s\\n' {quote(_MARK)}\n"
        f"find {where} -type f ! -name '.*' ! -name lock {newer}-print0 2>/dev/null"
        " | tar -czf - --null -T - 2>/dev/null\ntrue\n"
    )


def metrics_files() -> str:
    """Return shell that packs every trial's metrics."""
    return (
        f"printf '%s\\n' {quote(_MARK)}\n"
        "find trials -mindepth 2 -maxdepth 2 -type f -name metrics.json -size -16384k -print0 2>/dev/null"
        " | tar -czf - --null -T - 2>/dev/null\ntrue\n"
    )


def unpack(run: Run, stdout: str) -> str:
    """Put the files of an answer into the client's copy; return what came before them."""
    before, mark, packed = stdout.partition(f"{_MARK}\n")
    if not mark:
        raise HostError(f"the answer about run {run.id} lacks its files")
    data = packed.encode("utf-8", "surrogateescape")
    if not data:
        return before
    base = run.files.path
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                content = archive.extractfile(member) if member.isfile() else None
                if content is not None and _NAMES.fullmatch(name):
                    _put(base / name, content.read())
    except (tarfile.TarError, EOFError) as error:
        raise HostError(f"the files of run {run.id} did not come whole: {error}") from error
    return before


def _put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    staged.write_bytes(content)
    staged.replace(path)


def words_script(run: Run, failed: Sequence[tuple[int, int]]) -> str:
    """Return a script that prints the ends of some attempts' standard error, in order."""
    lines = [f"cd -- {quote(run.directory)} || exit 66"]
    for trial, attempt in failed:
        lines.append(f"tail -c {TAIL_BYTES} -- trials/{trial}/attempt-{attempt}.err 2>/dev/null | base64 -w0; echo")
    return "\n".join(lines)


def keep_words(run: Run, failed: Sequence[tuple[int, int]], stdout: str) -> None:
    """Keep what `words_script` has printed."""
    for (trial, attempt), line in zip(failed, stdout.split("\n"), strict=False):
        path = run.files.tail(trial, attempt)
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, base64.b64decode(line).decode("utf-8", "replace"))


def publish_script(run: Run, paths: Sequence[Path]) -> str:
    """Return a script that writes some of the client's files into the run directory."""
    lines = [f"cd -- {quote(run.directory)} || exit 66"]
    lines.extend(write_file(path.relative_to(run.files.path).as_posix(), path.read_bytes()) for path in paths)
    return "\n".join(lines)


def check_pushed(run: Run, code: int, stderr: str) -> None:
    """Raise where the run directory could not be made."""
    if code:
        words = stderr.strip()[-300:] or f"it ended with {code}"
        raise SubmitError(f"the run directory {run.directory} could not be made: {words}")
