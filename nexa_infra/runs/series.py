"""metrics.jsonl: what a training appends while it runs, read as it grows, as series by step.

A line is a JSON object. Its numbers are metrics, those of nested objects by dotted names; `step`, `epoch` or
`iteration` says where they stand, else the line's number; `total_steps`, `steps`, `max_steps` or `epochs` how far it
goes. Of two values of one metric at one step the later one stands. What is no such line is passed over.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nexa_infra.runs.directory import without_waiting

AXES = ("step", "epoch", "iteration")
LINE = "line"  # the axis of a log whose lines do not say where they stand
_OF_STEPS = ("step", "iteration")
_TOTALS = {"total_steps": _OF_STEPS, "steps": _OF_STEPS, "max_steps": _OF_STEPS, "epochs": ("epoch",)}
_NO_METRICS = frozenset({*AXES, *_TOTALS})

# Points of one metric that are kept: of more, the lowest and highest of each stretch.
MOST_POINTS = 4096
# A log that has more metrics than this, or a longer line or name, is no training's.
MOST_METRICS = 64
MOST_LINE = 2**20
MOST_NAME = 200
# What of a log is read, and brought from a cluster, at the most, bytes; and what of it at one look.
MOST_LOG = 256 * 2**20
MOST_LOOK = 4 * 2**20
# Metrics that a line of progress names.
_MOST_SHOWN = 4

Point = tuple[float, float]  # step, value


@dataclass(frozen=True)
class Unsound:
    """A value that is no finite number."""

    metric: str
    value: float
    axis: str
    step: float
    offset: int  # of its line in the log, bytes

    def __str__(self) -> str:
        word = "NaN" if math.isnan(self.value) else "infinite"
        return f"{self.metric} is {word} at {self.axis} {number(self.step)}"


@dataclass(frozen=True)
class Progress:
    """How far a training is, by its log."""

    lines: int  # that were understood
    axis: str
    step: float
    total: float | None  # of the same axis; None where the log does not say
    latest: Mapping[str, float]  # each metric's newest value
    moment: float | None = None  # of the last new line, seconds since the epoch

    @property
    def share(self) -> float | None:
        """How much of it is done, 0 to 1; None where the log does not say how far it goes."""
        return None if self.total is None or self.total <= 0 else min(1.0, max(0.0, self.step / self.total))

    @property
    def place(self) -> str:
        """Where it stands: `step 40/100`."""
        return f"{self.axis} {number(self.step)}{'' if self.total is None else f'/{number(self.total)}'}"

    def __str__(self) -> str:
        shown = [f"{name} {value:.4g}" for name, value in list(self.latest.items())[:_MOST_SHOWN]]
        return ", ".join([self.place, *shown])


@dataclass(frozen=True)
class Series:
    """One metric by step, in the order of steps; of many points, the lowest and highest of each stretch."""

    name: str
    axis: str
    points: tuple[Point, ...]
    last: Point  # the one that was written last
    unsound: Unsound | None = None  # its newest value that is no finite number; the first, where several follow

    @property
    def finite(self) -> tuple[Point, ...]:
        """The points whose value is a finite number."""
        return tuple(point for point in self.points if math.isfinite(point[1]))


@dataclass(frozen=True)
class MetricsLog:
    """What a whole log holds."""

    progress: Progress
    series: tuple[Series, ...]
    marks: tuple[tuple[str, float], ...] = ()  # where later attempts began: axis, step


def number(value: float) -> str:
    """Write a step: `40`, `12,000`, `0.5`."""
    return f"{value:,.0f}" if abs(value) < 1e15 and value == int(value) else f"{value:,.6g}"


@dataclass
class _Metric:
    name: str
    axis: str
    points: dict[float, float] = field(default_factory=dict)
    last: Point = (0.0, 0.0)
    first_unsound: Unsound | None = None  # where the newest stretch of such values begins
    last_unsound: Unsound | None = None


class Recorder:
    """Takes a log's bytes as they come, in any pieces, and keeps what its whole lines say.

    `starts` are the offsets at which later attempts began, where they are known.
    """

    def __init__(self, starts: Iterable[int] = ()) -> None:
        self.taken = 0  # bytes
        self.lines = 0  # lines that were understood
        self._number = 0  # lines of any kind
        self._rest = b""
        self._torn = False  # within a line that is too long
        self._metrics: dict[str, _Metric] = {}
        self._places: dict[str, float] = {}
        self._totals: dict[str, float] = {}
        self._starts = sorted(starts, reverse=True)
        self._marks: list[tuple[str, float]] = []

    def take(self, data: bytes) -> None:
        """Take what follows."""
        offset = self.taken - len(self._rest)
        self.taken += len(data)
        *whole, self._rest = (self._rest + data).split(b"\n")
        for line in whole:
            self._number += 1
            if not self._torn and len(line) <= MOST_LINE:
                self._line(line, offset)
            self._torn = False
            offset += len(line) + 1
        if len(self._rest) > MOST_LINE:
            # What was dropped still counts, so that offsets hold.
            self._rest, self._torn = b"", True

    def pass_over(self, size: int, lines: int) -> None:
        """Go on behind `size` bytes that are not looked at, which hold `lines` line ends; what follows is torn."""
        self.taken += size
        self._number += lines
        self._rest, self._torn = b"", True

    def end(self) -> None:
        """Take what is left as a line, where it is one: a program may have written no last line end."""
        if self._rest and not self._torn and len(self._rest) <= MOST_LINE:
            self._number += 1
            self._line(self._rest, self.taken - len(self._rest))
        self._rest = b""

    def progress(self, moment: float | None = None) -> Progress | None:
        """Say how far the training is; None where nothing of its log was understood."""
        if not self.lines:
            return None
        known = [axis for axis in AXES if axis in self._places]
        # An epoch of so many says more than a step of nobody knows how many.
        axis = next((axis for axis in known if axis in self._totals), known[0] if known else LINE)
        step = self._places.get(axis, float(self._number))
        total = self._totals.get(axis, self._totals.get("step") if axis == LINE else None)
        latest = {each.name: each.last[1] for each in self._metrics.values()}
        return Progress(self.lines, axis, step, total, latest, moment)

    def unsound(self, since: int = 0) -> list[Unsound]:
        """Return the metrics with a value that is no finite number, from an offset on: the first of the newest."""
        found = []
        for each in self._metrics.values():
            candidates = (one for one in (each.first_unsound, each.last_unsound) if one is not None)
            if (chosen := next((one for one in candidates if one.offset >= since), None)) is not None:
                found.append(chosen)
        return found

    def log(self, moment: float | None = None) -> MetricsLog | None:
        """Return all of it; None where nothing was understood."""
        progress = self.progress(moment)
        if progress is None:
            return None
        series = (
            Series(each.name, each.axis, tuple(thinned(sorted(each.points.items()))), each.last, each.first_unsound)
            for each in self._metrics.values()
        )
        return MetricsLog(progress, tuple(series), tuple(self._marks))

    def _line(self, line: bytes, offset: int) -> None:
        data = _object(line)
        if data is None:
            return
        self.lines += 1
        values = _numbers(data)
        axis, step = LINE, float(self._number)
        for name in _NO_METRICS & values.keys():
            if not math.isfinite(value := values.pop(name)):
                continue
            if name in _TOTALS:
                self._totals.update(dict.fromkeys(_TOTALS[name], value))
            else:
                self._places[name] = value
                if axis == LINE or AXES.index(name) < AXES.index(axis):
                    axis, step = name, value
        if self._starts and offset >= self._starts[-1]:
            while self._starts and offset >= self._starts[-1]:
                self._starts.pop()
            self._marks.append((axis, step))
        for name, value in values.items():
            self._put(name, axis, step, value, offset)

    def _put(self, name: str, axis: str, step: float, value: float, offset: int) -> None:
        metric = self._metrics.get(name)
        if metric is None:
            if len(self._metrics) >= MOST_METRICS or len(name) > MOST_NAME:
                return
            # JSON may hold halves of characters, which no file can.
            shown = name if name.isascii() else name.encode("utf-8", "backslashreplace").decode()
            metric = self._metrics[name] = _Metric(shown, axis)
        if not math.isfinite(value):
            found = Unsound(metric.name, value, axis, step, offset)
            if metric.first_unsound is None or math.isfinite(metric.last[1]):
                metric.first_unsound = found
            metric.last_unsound = found
        metric.axis, metric.last = axis, (step, value)
        metric.points[step] = value
        if len(metric.points) > 2 * MOST_POINTS:
            metric.points = dict(thinned(sorted(metric.points.items())))


class LogReader:
    """Reads a log as it grows, each byte once; a log that has become shorter is read anew."""

    def __init__(self, path: Path, starts: Iterable[int] = ()) -> None:
        self.path = path
        self.size = 0  # of the log, bytes
        self.moment: float | None = None  # when it was last written, seconds since the epoch
        self._starts = tuple(starts)
        self.recorder = Recorder(self._starts)

    @property
    def full(self) -> bool:
        """Whether the log is longer than what is read of one."""
        return self.recorder.taken >= MOST_LOG

    def read(self, most: int = MOST_LOOK) -> int:
        """Take what has been appended, at most `most` bytes of it; return how many there were."""
        data = self._next(most)
        self.recorder.take(data)
        return len(data)

    def pass_over(self, size: int) -> None:
        """Go on behind `size` bytes, of which only the lines are counted."""
        while size > 0 and (data := self._next(min(size, MOST_LOOK))):
            self.recorder.pass_over(len(data), data.count(b"\n"))
            size -= len(data)

    def progress(self) -> Progress | None:
        """Say how far the training is, by what was read."""
        return self.recorder.progress(self.moment)

    def _next(self, most: int) -> bytes:
        try:
            with open(self.path, "rb", buffering=0, opener=without_waiting) as stream:
                found = os.fstat(stream.fileno())
                if not stat.S_ISREG(found.st_mode):
                    return b""
                if found.st_size < self.recorder.taken:
                    self.recorder = Recorder(self._starts)
                self.size, self.moment = found.st_size, found.st_mtime
                stream.seek(self.recorder.taken)
                return stream.read(max(0, min(most, MOST_LOG - self.recorder.taken)))
        except OSError:
            return b""


def read_log(path: Path, starts: Iterable[int] = ()) -> MetricsLog | None:
    """Read a whole log; None where there is none, or nothing of it was understood.

    `starts` are the offsets at which later attempts began.
    """
    reader = LogReader(path, starts)
    while reader.read():
        pass
    reader.recorder.end()
    return reader.recorder.log(reader.moment)


def glance(path: Path) -> Progress | None:
    """Say how far a training is, by the beginning and the end of its log alone."""
    reader = LogReader(path)
    reader.read(_GLANCE)
    reader.pass_over(min(reader.size, MOST_LOG) - 2 * _GLANCE)
    while reader.read(_GLANCE):
        pass
    reader.recorder.end()
    return reader.progress()


_GLANCE = 2**18


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> Sequence[Point]:
    """Return at most `most` points of many, in the order of steps.

    Of each stretch its first and last, its lowest and highest, and its first that is no finite number are kept.
    """
    if len(points) <= most:
        return points
    stretches = max(1, most // 5)
    kept: list[Point] = []
    for stretch in range(stretches):
        part = points[stretch * len(points) // stretches : (stretch + 1) * len(points) // stretches]
        finite = [point for point in part if math.isfinite(point[1])]
        chosen = {part[0], part[-1]}
        if finite:
            chosen |= {min(finite, key=_value), max(finite, key=_value)}
        if len(finite) < len(part):
            chosen.add(next(point for point in part if not math.isfinite(point[1])))
        kept.extend(sorted(chosen, key=_step))
    return kept


def _step(point: Point) -> float:
    return point[0]


def _value(point: Point) -> float:
    return point[1]


def _object(line: bytes) -> dict[str, Any] | None:
    """Read a line; one that stands behind what a killed attempt has torn is read, too."""
    text = line.decode("utf-8", "replace").strip()
    if not text.startswith("{"):
        return None
    if (found := _parsed(text)) is not None:
        return found
    start, tries = text.find("{", 1), 0
    while start > 0 and tries < 16:
        if (found := _parsed(text[start:])) is not None:
            return found
        start, tries = text.find("{", start + 1), tries + 1
    return None


def _parsed(text: str) -> dict[str, Any] | None:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def _numbers(data: Mapping[str, Any], above: str = "") -> dict[str, float]:
    """Return what is a number, by dotted names: true is none, and an integer may be too large for a float."""
    found: dict[str, float] = {}
    for name, value in data.items():
        kind = type(value)
        if kind is float:
            found[above + name] = value
        elif kind is int:
            try:
                found[above + name] = float(value)
            except OverflowError:
                found[above + name] = math.inf if value > 0 else -math.inf
        elif kind is dict:
            found |= _numbers(value, f"{above}{name}.")
    return found
