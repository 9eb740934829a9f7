"""Text that fits where it is shown: amounts, cells, tables, lines of a terminal."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import ROUND_HALF_UP, Context, Decimal

from nexa_infra.spec.points import Value, ranges, written

__all__ = [
    "COLUMNS",
    "UNKNOWN",
    "assignments",
    "clean",
    "code",
    "counted",
    "escape",
    "fence",
    "fits",
    "link",
    "markdown_table",
    "measured",
    "money",
    "quantity",
    "ranges",
    "rate",
    "shorten",
    "shown",
    "text_table",
    "width",
    "wrap",
]

COLUMNS = 80
UNKNOWN = "unknown"

_LONGEST_CELL = 64
_ESCAPED = re.compile(r"[\\|`*\[\]<>&~$@]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.", re.IGNORECASE)
_PLAIN_CODE = re.compile(r"[\w./:@+=,-]+(?: [\w./:@+=,-]+)*")
_PLAIN_URL = re.compile(r"https?://[\w./:?#%=&~+-]+")
_WIDE = frozenset("WF")


def money(usd: Decimal | None) -> str:
    """Write USD so that it is read at a glance: `$1,234.56`, `$0.31`, `$0.0003`, `unknown`."""
    if usd is None:
        return UNKNOWN
    return f"${_digits(usd, 2, least=2 if usd < 1 else 0, cents=True)}"


def rate(usd: Decimal) -> str:
    """Write a price an hour, which is never rounded."""
    if abs(usd.adjusted()) >= 15:
        return f"${usd:e}"
    whole, _, cents = f"{usd.normalize():f}".partition(".")
    return f"${whole}.{cents:0<2}"


def quantity(amount: Decimal | float | None) -> str:
    """Write hours or a ratio to three significant digits: `1,235`, `12`, `0.0067`, `unknown`."""
    if amount is None:
        return UNKNOWN
    return _digits(amount if isinstance(amount, Decimal) else Decimal(str(amount)), 3)


def _digits(amount: Decimal, significant: int, *, least: int = 0, cents: bool = False) -> str:
    if not amount:
        return "0.00" if least else "0"
    size = amount.adjusted()
    if not -10 < size < 12:
        return f"{amount:.1e}"
    places = 2 if cents and size >= 0 else max(least, significant - 1 - size, 0)
    text = f"{amount.quantize(Decimal(1).scaleb(-places), ROUND_HALF_UP, Context(prec=60)):,f}"
    whole, _, rest = text.partition(".")
    if cents and size >= 0:
        return text
    rest = rest[:least] + rest[least:].rstrip("0")
    return f"{whole}.{rest}" if rest else whole


def counted(number: int, noun: str) -> str:
    """Write a number with its noun: `1 trial`, `1,000 trials`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def measured(value: float | None) -> str:
    """Write a metric: six significant digits."""
    return "" if value is None else f"{value:.6g}"


def shown(value: Value) -> str:
    """Write a parameter's value; an empty text as two quotes."""
    return written(value) or '""'


def assignments(parameters: Mapping[str, Value]) -> str:
    """Write a trial's parameters on one line."""
    return " ".join(f"{name}={shown(value)}" for name, value in parameters.items())


def clean(text: str) -> str:
    """Return text as one line without anything that moves the cursor or is not seen: such characters as escapes."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )


def _cells(character: str) -> int:
    # Terminals differ from Python's tables on symbols and emoji, so these count as wide; and so that no
    # terminal shows more than was counted, a combining mark counts as well.
    if character < "\u1100":
        return 1
    wide = unicodedata.east_asian_width(character) in _WIDE or unicodedata.category(character) == "So"
    return 2 if wide or character >= "\U0001d300" else 1


def width(text: str) -> int:
    """Return how many cells a clean text takes in a terminal, at the most."""
    return sum(map(_cells, text))


def _fitting(text: str, limit: int) -> int:
    """Return how many characters of a text fit into `limit` cells."""
    used = 0
    for position, character in enumerate(text):
        used += _cells(character)
        if used > limit:
            return position
    return len(text)


def shorten(text: str, limit: int, *, keep_end: bool = False) -> str:
    """Return clean text in at most `limit` cells; what is left out becomes `…`.

    `keep_end` leaves out the middle, so that a path still shows its last part.
    """
    # A cell holds at most one character, so what lies beyond the limit at both ends is never shown.
    if len(text) > 2 * limit + 2:
        text = text[: limit + 1] + text[-limit - 1 :]
    text = clean(text)
    if width(text) <= limit:
        return text
    room = limit - 1
    tail = ""
    if keep_end:
        tail = text[::-1][: _fitting(text[::-1], room * 2 // 3)][::-1]
    head = text[: _fitting(text, room - width(tail))]
    return f"{head}…{tail}"


def wrap(text: str, limit: int, *, lines: int = 8) -> list[str]:
    """Break text at spaces into at most `lines` lines of at most `limit` cells."""
    words = clean(" ".join(text.split())[: limit * lines * 2]).split(" ")
    found: list[str] = []
    line = ""
    for word in words:
        rest = word
        if line and width(line) + 1 + width(rest) <= limit:
            line = f"{line} {rest}"
            continue
        if line:
            found.append(line)
        while width(rest) > limit:
            cut = _fitting(rest, limit)
            found.append(rest[:cut])
            rest = rest[cut:]
        line = rest
    if line:
        found.append(line)
    if len(found) > lines:
        found = [*found[: lines - 1], shorten(f"{found[lines - 1]} …", limit)]
    return found


def fits(*lines: Sequence[str]) -> bool:
    """Say whether a table fits a terminal with no cell shortened."""
    return sum(2 + max(width(clean(cell)) for cell in column) for column in zip(*lines)) <= COLUMNS


def text_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield a table's lines for a terminal: all columns to the right but the last, which gets what room is left."""
    lines = [header, *rows]
    least = 8  # cells of the last column, at any rate
    most = COLUMNS if fits(*lines) else (COLUMNS - least) // len(header) - 2
    cells = [[shorten(cell, most) for cell in line[:-1]] for line in lines]
    sizes = [max(map(width, column)) for column in zip(*cells)]
    room = COLUMNS - sum(sizes) - 2 * len(header)
    for line, row in zip(lines, cells):
        padded = (" " * (2 + size - width(cell)) + cell for cell, size in zip(row, sizes))
        yield f"{''.join(padded)}  {shorten(line[-1], room)}".rstrip()


def escape(text: str, limit: int = _LONGEST_CELL) -> str:
    """Return text that Markdown shows as it is, in a table's cell too.

    By backslashes: Prefect's page does not read numeric entities.
    """
    return _ESCAPED.sub(r"\\\g<0>", shorten(text, limit))


def code(text: str) -> str:
    """Return a path, an id or a name in Markdown's code style, where it is plain enough for that."""
    return f"`{text}`" if _PLAIN_CODE.fullmatch(text) else escape(text, 1000)


def link(url: str) -> str:
    """Return an address in Markdown, a link where it is a plain one."""
    return url if _PLAIN_URL.fullmatch(url) else escape(url, 1000)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Iterable[int] = ()) -> Iterator[str]:
    """Yield a table's lines in Markdown; the cells are escaped already, columns in `right` are set to the right."""
    aligned = set(right)
    yield f"| {' | '.join(header)} |"
    yield f"|{'|'.join('---:' if column in aligned else '---' for column in range(len(header)))}|"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def fence(lines: Sequence[str]) -> Iterator[str]:
    """Yield lines as a block of code that nothing in them can close."""
    longest = max((len(found) for line in lines for found in re.findall("`+", line)), default=0)
    mark = "`" * max(3, longest + 1)
    yield mark
    for line in lines:
        yield shorten(line.expandtabs(4), 200)
    yield mark
