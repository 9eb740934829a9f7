"""The ranks of a torchrun job: what gang.sh recorded of each, and which of them failed first."""

from __future__ import annotations

import math
import re
import signal
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

# Failures this close together have one cause, seconds: the others of a gang fail by the first one's absence.
TOGETHER_SECONDS = 60.0

# What a rank says that has failed because another one has gone.
_CONSEQUENCE = re.compile(
    r"connection (?:closed|reset|refused)|connectFullMesh|broken pipe|remote process exited|socket timeout|"
    r"timed out waiting|watchdog|nccl(?:internal|remote|system) ?error|NCCL communicator was aborted|"
    r"DistNetworkError|RendezvousClosed|heartbeat",
    re.IGNORECASE,
)
# The tag that torch puts before each line of a rank's traceback.
_TAG = re.compile(r"^\[rank\d+\]:[ ]?", re.MULTILINE)
_LAST_LINE = re.compile(r"[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit|Warning|Timeout)?(?::|$)")


@dataclass(frozen=True)
class RankEnd:
    """How one process of a rank ended; moments are seconds since the epoch, by its node's clock."""

    rank: int
    restart: int
    node: str
    code: int
    moment: float

    @property
    def signal(self) -> str | None:
        """The signal that ended it, such as SIGKILL."""
        try:
            return signal.Signals(self.code - 128).name if self.code > 128 else None
        except ValueError:
            return None


@dataclass(frozen=True)
class Gang:
    """What an attempt's nodes recorded."""

    nodes: tuple[str, ...] = ()  # those that came, in order of their numbers
    started: frozenset[int] = frozenset()  # ranks that have started, in any restart
    restarts: int = 0
    endpoint: str = ""  # where they were to meet; empty for a single node
    ends: tuple[RankEnd, ...] = ()  # in order of time

    @property
    def failures(self) -> tuple[RankEnd, ...]:
        """The ends of the last restart that were no good ones, in order of time."""
        return tuple(end for end in self.ends if end.code and end.restart == self.restarts)


@dataclass(frozen=True)
class Failure:
    """The rank that failed first, and its last words."""

    end: RankEnd
    words: str  # its traceback, or the last lines of its log

    def __str__(self) -> str:
        again = f" (restart {self.end.restart})" if self.end.restart else ""
        where = f"rank {self.end.rank} on {self.end.node}{again}"
        error = error_of(self.words)
        # Python had ended by it; then threads of a library's that were still at work ended the process once more.
        aborted = self.end.signal == "SIGABRT" and error and self.words.endswith(_STILL_AT_WORK)
        if self.end.signal is not None and not aborted:
            return f"{where} was ended by {self.end.signal}"
        return f"{where} failed: {error}" if error else f"{where} ended with exit code {self.end.code}"


_STILL_AT_WORK = "terminate called without an active exception"
_WORDS = ("node\t", "start\t", "end\t")


def read_gang(records: Iterable[tuple[int, str]]) -> Gang:
    """Read what each node recorded: its number, and its file's text; a line that was cut is left out."""
    nodes: dict[int, str] = {}
    started: set[int] = set()
    ends: list[RankEnd] = []
    restarts, endpoint = 0, ""
    for number, text in records:
        for line in text.split("\n")[:-1]:
            # What a crash tore has no newline, so the next line stands behind it, on the same one.
            words = line[max(0, *(line.rfind(word) for word in _WORDS)) :].split("\t")
            try:
                if words[0] == "node" and len(words) == 4:
                    nodes[number] = words[1]
                    endpoint = words[3] or endpoint
                elif words[0] == "start" and len(words) == 5:
                    restarts = max(restarts, int(words[2]))
                    started.add(int(words[1]))
                elif words[0] == "end" and len(words) == 5 and math.isfinite(float(words[4])):
                    node = nodes.get(number, "?")
                    ends.append(RankEnd(int(words[1]), int(words[2]), node, int(words[3]), float(words[4])))
            except ValueError:
                continue
    ends.sort(key=lambda end: end.moment)
    return Gang(tuple(nodes[number] for number in sorted(nodes)), frozenset(started), restarts, endpoint, tuple(ends))


def read_records(folder: Path) -> list[tuple[int, str]]:
    """Read the files that an attempt's nodes wrote; none where it was no gang's."""
    found = []
    for path in folder.glob("node-*"):
        number = path.name.removeprefix("node-")
        if re.fullmatch(r"[0-9]{1,9}", number):
            found.append((int(number), path.read_text(encoding="utf-8", errors="replace")))
    return found


def candidates(gang: Gang, most: int = 8) -> tuple[RankEnd, ...]:
    """Return the ends that may have been the first failure, likeliest first.

    A rank that torchrun ended by SIGTERM failed by another's failure; one that another signal ended failed by itself,
    but for SIGABRT, by which libraries end what another rank has left alone.
    """
    failures = gang.failures
    own = [end for end in failures if end.signal != "SIGTERM"] or list(failures)
    if not own:
        return ()
    # Ranks that torchrun ended long ago, because a node came or went, say nothing of what failed now.
    near = [end for end in failures if abs(end.moment - own[0].moment) <= TOGETHER_SECONDS]
    return tuple(sorted(near, key=lambda end: (end.signal == "SIGTERM", not _by_signal(end), end.moment))[:most])


def _by_signal(end: RankEnd) -> bool:
    return end.signal not in {None, "SIGTERM", "SIGABRT"}


def first_failure(gang: Gang, logs: Mapping[int, str]) -> Failure | None:
    """Say which rank failed first; `logs` holds the ends of the candidates' logs, by rank.

    Among those that ended by an error of their own, one whose last words are that another had gone comes last.
    """
    chosen: RankEnd | None = None
    for end in candidates(gang):
        chosen = chosen or end
        log = logs.get(end.rank, "")
        said = error_of(log) if end.signal is None else last_words(log)
        if _by_signal(end) or (end.signal != "SIGTERM" and not _CONSEQUENCE.search(said)):
            chosen = end
            break
    return Failure(chosen, last_words(logs.get(chosen.rank, ""))) if chosen else None


def last_words(log: str, lines: int = 20) -> str:
    """Return the last traceback of a log whole, or its last lines."""
    text = _TAG.sub("", log).rstrip()
    begin = text.rfind("Traceback (most recent call last)")
    found = text[begin:].splitlines() if begin >= 0 else text.splitlines()[-lines:]
    return "\n".join(line for line in found if line.strip())[-4000:]


def error_of(log: str) -> str:
    """Return the line of the last traceback that names its error; empty where there is none."""
    begin = log.rfind("Traceback (most recent call last)")
    if begin < 0:
        return ""
    for text in _TAG.sub("", log[begin:]).splitlines()[1:]:
        if text and not text[0].isspace() and _LAST_LINE.match(text):
            return text.strip()[:400]
    return ""


def no_rendezvous(gang: Gang, nodes: int, seconds: int) -> str | None:
    """Say that the nodes of a gang have not found each other, where all came and none of its ranks ever started."""
    if nodes == 1 or not gang.nodes or gang.started:
        return None
    came = ", ".join(gang.nodes) if len(gang.nodes) == nodes else f"{', '.join(gang.nodes)} alone of {nodes} nodes"
    return (
        f"no rendezvous: {came} came, and they did not all meet at {gang.endpoint} within {seconds} s "
        "(launcher.rdzv_timeout): see that they can reach it, or set launcher.rdzv_endpoint or launcher.interface"
    )
