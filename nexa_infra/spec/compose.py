"""YAML text as plain Python, each scalar as it was written and each part with the line that it stands in.

The file is composed, not constructed: no type is guessed but null and boolean, no tag is followed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.cyaml import CParser  # type: ignore[attr-defined]
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from nexa_infra.errors import ConfigError, Problem
from nexa_infra.spec.fields import Boolean, KeyPath, key_text, shown

# A config has five levels; what nests deeper is a mistake or an attack.
DEEPEST = 64
# What aliases may add to the values that are written out. An anchor bomb adds billions.
MOST_BY_ALIAS = 200_000

# The words of YAML 1.2's core schema.
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLEANS = frozenset({"true", "True", "TRUE", "false", "False", "FALSE"})

# What YAML's own character set leaves out: controls, surrogates, and two that are no characters.
_NOT_PRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SURROGATE = re.compile("[\ud800-\udfff]")

# Where a part was asked for: a line of the file (1, 2, …), or the text of an override.
Place = int | str


class PlacedDict(dict[str, Any]):
    """A mapping that knows where each of its keys stands."""

    __slots__ = ("places",)

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[str, Place] = {}


class PlacedList(list[Any]):
    """A list that knows where each of its items stands."""

    __slots__ = ("places",)

    def __init__(self) -> None:
        super().__init__()
        self.places: list[Place] = []


@dataclass(frozen=True)
class Finding:
    """A complaint about one part of a tree, before it is a `Problem`."""

    path: KeyPath
    message: str
    place: Place | None = None
    kind: str = ""  # pydantic's name for it, where it is pydantic's


@dataclass
class Tree:
    """A composed document: its data, the place of its first value, and what is wrong with its form."""

    data: Any
    start: Place
    findings: list[Finding] = field(default_factory=list)

    def place(self, path: KeyPath) -> Place:
        """Return where a part stands, or the nearest part above it that the tree has."""
        here, place = self.data, self.start
        for step in path:
            try:
                place, here = here.places[step], here[step]
            except (AttributeError, LookupError, TypeError):
                break
        return place


def compose(text: str, source: str, override: str | None = None) -> Tree:
    """Compose one YAML document.

    `source` is the file as messages name it. With `override`, the text is that override's value,
    and its places are the override's text.

    Raises:
        ConfigError: the text is not YAML, holds more than one document, nests too deep, or grows
            beyond reason by its aliases. Lesser faults are the tree's `findings`.
    """
    if found := _NOT_PRINTABLE.search(text):
        line = text.count("\n", 0, found.start()) + 1
        told = f"holds the character U+{ord(found[0]):04X}, which YAML does not allow: remove it"
        if 0 < ord(found[0]) < 256:
            told += f', or write "\\x{ord(found[0]):02x}" in double quotes'
        raise ConfigError(problem(source, override or line, (), told))
    try:
        return _Composer(source, override).compose(_c_events(text))
    except YAMLError:
        # libyaml refuses a colon inside plain flow scalars, which YAML 1.2 allows: {time: 08:00:00}.
        # The pure parser's answer stands, and so does its complaint.
        pass
    try:
        return _Composer(source, override).compose(YAML(typ="safe", pure=True).parse(text))
    except YAMLError as error:
        raise ConfigError(_unreadable(error, source, override)) from error


def _c_events(text: str) -> Iterator[Any]:
    parser = CParser(text)
    try:
        while (event := parser.get_event()) is not None:
            yield event
    finally:
        parser.dispose()


@dataclass
class _Open:
    """A mapping or list whose end is not reached."""

    container: PlacedDict | PlacedList
    anchor: str | None
    line: int
    before: int  # values counted before it
    key: str | None = None
    key_line: int = 0
    waiting: bool = False  # a key has been read, its value has not
    keep: bool = True  # whether that value is kept: not a duplicate's, not a merge's


class _Composer:
    """Builds the tree from parser events, without recursion, so that no nesting overflows a stack."""

    def __init__(self, source: str, override: str | None) -> None:
        self.source = source
        self.override = override
        self.findings: list[Finding] = []
        self.stack: list[_Open] = []
        self.anchors: dict[str, tuple[Any, int]] = {}
        self.counted = 0
        self.by_alias = 0
        self.root: Any = None
        self.root_line: int | None = None

    def compose(self, events: Iterable[Any]) -> Tree:
        documents = 0
        for event in events:
            line = event.start_mark.line + 1
            if isinstance(event, ScalarEvent):
                self._scalar(event, line)
            elif isinstance(event, AliasEvent):
                self._alias(event.anchor, line)
            elif isinstance(event, (MappingStartEvent, SequenceStartEvent)):
                self._open(event, line)
            elif isinstance(event, (MappingEndEvent, SequenceEndEvent)):
                self._close()
            elif isinstance(event, DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise self._error("holds a second document, after --- or ...: one file is one config", line)
        return Tree(self.root, self._place(self.root_line or 1), self.findings)

    def _scalar(self, event: Any, line: int) -> None:
        text, plain = event.value, not event.style
        if _SURROGATE.search(text):
            text = self._joined(text, line)
        top = self.stack[-1] if self.stack else None
        if top and isinstance(top.container, PlacedDict) and not top.waiting:
            self._key(top, text, plain, line, event.ctag)
            if event.anchor is not None:
                self.anchors[event.anchor] = (text, 1)
            return
        value: Any = text
        if event.ctag is not None:
            self._tagged(event.ctag, line)
        elif plain and text in _NULLS:
            value = None
        elif plain and text in _BOOLEANS:
            value = Boolean(text)
        self.counted += 1
        if event.anchor is not None:
            self.anchors[event.anchor] = (value, 1)
        self._add(value, line)

    def _joined(self, text: str, line: int) -> str:
        """Join the halves that JSON writes a character in, as it does those past U+FFFF."""
        try:
            return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")
        except UnicodeDecodeError:
            told = "holds one half of a character alone (\\ud800 to \\udfff): write the character itself"
            raise self._error(told, line) from None

    def _key(self, top: _Open, text: str, plain: bool, line: int, tag: Any) -> None:
        keys = top.container.places
        top.key, top.key_line, top.waiting, top.keep = text, line, True, True
        if tag is not None:
            self._tagged(tag, line)
        if plain and text == "<<":
            top.keep = False
            told = "merge keys (<<) are not read: write the keys out, or give a whole value by an alias (key: *name)"
            self._find(told, line, parent=True)
        elif plain and text in _NULLS:
            top.keep = False
            self._find("a key is missing before ':' (null is no key): write its name", line, parent=True)
        elif isinstance(keys, dict) and text in keys:
            top.keep = False
            first = "" if self.override else f", first in line {keys[text]}"
            self._find(f"stands twice here{first}: keep one of the two", line)

    def _alias(self, name: str, line: int) -> None:
        if any(part.anchor == name for part in self.stack):
            raise self._error(f"the alias *{name} stands inside its own anchor, which has no end: remove it", line)
        if name not in self.anchors:
            known = f": the anchors are {', '.join('&' + one for one in self.anchors)}" if self.anchors else ""
            raise self._error(f"the alias *{name} has no anchor &{name} above it{known}", line)
        value, size = self.anchors[name]
        self.counted += size
        self.by_alias += size
        if self.by_alias > MOST_BY_ALIAS:
            raise self._error(
                f"the aliases of this file grow to more than {MOST_BY_ALIAS:,} values here: write the values out", line
            )
        top = self.stack[-1] if self.stack else None
        if top and isinstance(top.container, PlacedDict) and not top.waiting:
            raise self._error(f"an alias cannot be a key: write the key that *{name} means", line)
        self._add(value, line)

    def _open(self, event: Any, line: int) -> None:
        top = self.stack[-1] if self.stack else None
        if top and isinstance(top.container, PlacedDict) and not top.waiting:
            raise self._error("a key is one word: put text that opens with [ or { in quotes", line)
        if len(self.stack) >= DEEPEST:
            raise self._error(f"nests deeper than {DEEPEST} levels: a config has five", line, self._path()[:4])
        if event.ctag is not None:
            self._tagged(event.ctag, line)
        container = PlacedDict() if isinstance(event, MappingStartEvent) else PlacedList()
        self.stack.append(_Open(container, event.anchor, line, self.counted))

    def _close(self) -> None:
        done = self.stack.pop()
        self.counted += 1
        if done.anchor is not None:
            self.anchors[done.anchor] = (done.container, self.counted - done.before)
        self._add(done.container, done.line)

    def _add(self, value: Any, line: int) -> None:
        if not self.stack:
            self.root, self.root_line = value, line
            return
        top = self.stack[-1]
        if isinstance(top.container, PlacedList):
            top.container.append(value)
            top.container.places.append(self._place(line))
            return
        if top.keep and top.key is not None:
            top.container[top.key] = value
            top.container.places[top.key] = self._place(top.key_line)
        top.waiting = False

    def _path(self, parent: bool = False) -> KeyPath:
        """Return the path of what is being read; with `parent`, of the mapping that it stands in."""
        path: list[str | int] = []
        for part in self.stack:
            if isinstance(part.container, PlacedList):
                path.append(len(part.container))
            elif part.waiting and part.key is not None:
                path.append(part.key)
        return tuple(path[:-1] if parent else path)

    def _tagged(self, tag: Any, line: int) -> None:
        written = re.sub(r"^tag:yaml\.org,2002:", "!!", str(tag))
        told = f"the YAML tag {shown(written)[1:-1]} is not followed: remove it, values are read as they are written"
        self._find(told, line)

    def _find(self, message: str, line: int, parent: bool = False) -> None:
        self.findings.append(Finding(self._path(parent), message, self._place(line)))

    def _place(self, line: int) -> Place:
        return self.override or line

    def _error(self, message: str, line: int, path: KeyPath | None = None) -> ConfigError:
        return ConfigError(problem(self.source, self._place(line), self._path() if path is None else path, message))


def problem(source: str | None, place: Place | None, path: KeyPath, message: str) -> Problem:
    """Make a complaint; one about an override names the override in the file's stead."""
    if isinstance(place, str):
        return Problem(key_text(path), message, f"override {place}")
    return Problem(key_text(path), message, source, place)


# What the parsers say, and what it means to who wrote the file. `{where}` is where the part began.
_MEANINGS = (
    (r"found character '\\t'", "a tab stands where spaces are meant: indent with spaces"),
    (r"found character '(.)'", "a value cannot begin with {0}: put it in quotes"),
    (r"mapping values are not allowed", "a second ': ' stands in this line: quote the value, or mend the indentation"),
    (r"could not find expected ':'", "what stands{where} is no 'key: value': a ':' is missing, or the indentation off"),
    (r"expected ',' or '\]'", "the list that opens{where} with [ is not closed, or a comma is missing"),
    (r"expected ',' or '\}'", "the mapping that opens{where} with {{ is not closed, or a comma is missing"),
    (r"expected '<document start>'", "this line stands outside the mapping above it: mend its indentation"),
    (r"expected the node content", "something is opened and not closed, or a value is missing"),
    (r"found unexpected end of stream", "the quote that opens{where} is not closed"),
    (r"expected <block end>", "the indentation does not fit the lines above it"),
    (r"found unknown escape character", "a backslash in double quotes needs a letter that YAML knows: use '…' quotes"),
)


def _unreadable(error: YAMLError, source: str, override: str | None) -> Problem:
    mark = getattr(error, "problem_mark", None)
    line = mark.line + 1 if mark is not None else 1
    said = str(error.problem if isinstance(error, MarkedYAMLError) and error.problem else error).splitlines()[0]
    context = getattr(error, "context_mark", None)
    told = f"the parser says: {said}"
    for pattern, meaning in _MEANINGS:
        if found := re.search(pattern, said):
            where = f" in line {context.line + 1}" if context and not override else ""
            told = meaning.format(*found.groups(), where=where)
            break
    return problem(source, override or line, (), f"is not YAML: {told}")
