"""The price book: what an hour of a GPU or of a core costs, and who says so."""

from __future__ import annotations

import csv
import difflib
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from decimal import Decimal, InvalidOperation
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Literal

from nexa_infra.errors import PriceError
from nexa_infra.runs.prices import Price
from nexa_infra.spec.cluster import Cluster
from nexa_infra.spec.fields import suggestion
from nexa_infra.spec.job import SlurmJob

COLUMNS = ("gpu_type", "aliases", "usd_per_hour", "unit", "provider", "source", "date")
CPU = "cpu"

_REMEDY = "or set job.cost_per_gpu_hour"
# The most that an hour may cost in a book: above it, a number is a slip.
_MOST_USD = 1_000_000
_VENDORS = frozenset({"nvidia", "tesla", "geforce", "amd", "instinct"})
# How a card is mounted, and the kind of its memory: neither changes which card the book means.
_FORMS = frozenset(
    {"sxm", "sxm2", "sxm3", "sxm4", "sxm5", "sxm6", "pcie", "oam", "hbm2", "hbm2e", "hbm3", "hbm3e", "gpu"}
)
_MEMORY = re.compile(r"(\d+)(?:g|gb|gib)?")


def spelling(text: str) -> str:
    """Return the form in which two spellings of one GPU type are equal.

    Case, separators, vendor names and form factors are dropped; a size of memory is `80gb` however
    it was written. Every other word stays, so that a slice (`a100_1g.5gb`) or a sister card
    (`rtx_a1000`) never passes for the card whose name it holds.
    """
    words = re.findall(r"[^\s_/-]+", text.lower())
    while words and words[0] in _VENDORS:
        del words[0]
    if len(words) > 1 and words[0].isalpha() and words[1][0].isdigit():
        words[:2] = [words[0] + words[1]]  # `rtx 5090`, `mi-300x`
    kept = words[:1]
    for word in words[1:]:
        if word in {"gb", "gib"} and len(kept) > 1 and kept[-1].endswith("gb"):
            continue  # `80 gb`: the number has become `80gb`
        if found := _MEMORY.fullmatch(word):
            kept.append(f"{int(found[1])}gb")
        elif word not in _FORMS:
            kept.append(word)
    return " ".join(kept)


@dataclass(frozen=True)
class PriceBook:
    """Prices by GPU type and provider; the first row of a type is its default.

    A bare `a100` is the 80 GB card, in the bundled book: a projected cost is a ceiling, so of two
    cards that a name may mean it takes the dearer. `a100-40gb` says the other one.
    """

    rows: tuple[Price, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)  # another spelling -> the type as the rows have it
    origin: str = "the price book"
    preferred: str | None = None  # the provider whose row is taken where it has one

    @cached_property
    def types(self) -> tuple[str, ...]:
        """The GPU types that have a price, as the book spells them."""
        return tuple(dict.fromkeys(row.item for row in self.rows if row.unit == "gpu-hour"))

    @cached_property
    def _spellings(self) -> dict[str, str]:
        known = {spelling(name): item for name, item in self.aliases.items()}
        return known | {spelling(item): item for item in self.types}

    def names(self, gpu_type: str) -> frozenset[str]:
        """Return every name that the book has for a GPU type, and the one that is given."""
        item = self._spellings.get(spelling(gpu_type))
        known = {alias for alias, name in self.aliases.items() if name == item} | ({item} if item else set())
        return frozenset({gpu_type, *known})

    def find(self, gpu_type: str | None, provider: str | None = None) -> Price:
        """Return the price of a GPU type, or of a core where `gpu_type` is None.

        Without `provider` it is the preferred provider's, where the book has one and that has such
        a row, and else the type's first row.

        Raises:
            PriceError: the book has no such type, or none of this provider; the message names the
                nearest that it has.
        """
        if gpu_type is None:
            rows = [row for row in self.rows if row.unit == "core-hour"]
            if not rows:
                raise PriceError(f"{self.origin} has no price of a core-hour: set job.cost_per_core_hour")
        else:
            item = self._spellings.get(spelling(gpu_type))
            if item is None:
                raise PriceError(self._unknown(gpu_type))
            rows = [row for row in self.rows if row.unit == "gpu-hour" and row.item == item]
        if provider is not None:
            chosen = [row for row in rows if row.provider.lower() == provider.lower()]
            if not chosen:
                told = ", ".join(row.provider for row in rows)
                raise PriceError(f"{self.origin} has no price of {rows[0].item} from {provider!r}, only from {told}")
            return chosen[0]
        preferred = (self.preferred or "").lower()
        return next((row for row in rows if row.provider.lower() == preferred), rows[0])

    def _unknown(self, gpu_type: str) -> str:
        close = difflib.get_close_matches(spelling(gpu_type), self._spellings, n=5, cutoff=0.5)
        names = list(dict.fromkeys(self._spellings[found] for found in close))[:3]
        hint = f"did you mean {' or '.join(names)}? The book has {', '.join(self.types)}"
        if not names:
            hint = f"the book has {', '.join(self.types)}" if self.types else "the book has no GPU"
        return f"no price is known for the GPU type {gpu_type!r}: {hint}; choose one of them, {_REMEDY}"


def load_price_book(path: Path | None = None) -> PriceBook:
    """Read a price book: `path`, else the file that NEXA_PRICE_BOOK names, else the bundled one.

    Rows of the provider that NEXA_PRICE_PROVIDER names are preferred.

    Raises:
        PriceError: the file cannot be read, or a line of it makes no sense; the message names both.
    """
    # Settings bring pydantic-settings along, which `import nexa_infra` does without.
    from nexa_infra.settings import settings

    chosen = path or settings().price_book
    if chosen is None:
        bundled = resources.files("nexa_infra.monitoring").joinpath("prices.csv")
        book = parse_price_book(bundled.read_text(encoding="utf-8"), "the price book")
    else:
        try:
            text = Path(chosen).read_text(encoding="utf-8-sig")
        except OSError as error:
            raise PriceError(f"the price book {chosen} cannot be read: {error.strerror or error}") from error
        except UnicodeDecodeError as error:
            raise PriceError(f"the price book {chosen} is not UTF-8: byte {error.start}") from error
        book = parse_price_book(text, str(chosen))
    preferred = settings().price_provider
    providers = list(dict.fromkeys(row.provider for row in book.rows))
    if preferred is not None and preferred.lower() not in {name.lower() for name in providers}:
        raise PriceError(
            f"NEXA_PRICE_PROVIDER is {preferred!r}, of which {book.origin} has no row"
            f"{suggestion(preferred, providers)}: it has {', '.join(providers)}"
        )
    return replace(book, preferred=preferred)


def parse_price_book(text: str, origin: str = "the price book") -> PriceBook:
    """Read a price book's CSV, whose columns are `COLUMNS` in any order.

    `aliases` are separated by spaces or `|`; `usd_per_hour` is above 0; `unit` is `gpu-hour`, or
    `core-hour` on rows whose type is `cpu`; `date` is the day that the price was read.

    Raises:
        PriceError: a line makes no sense; the message names `origin`, the line and the column.
    """
    rows: list[Price] = []
    aliases: dict[str, str] = {}
    owners: dict[str, str] = {}
    seen: dict[tuple[str, str], int] = {}
    for line, cells in _lines(text, origin):
        try:
            row = _row(cells)
            names = cells["aliases"].replace("|", " ").split()
            if (first := seen.setdefault((row.item, row.provider.lower()), line)) != line:
                raise ValueError(f"gpu_type: {row.item} from {row.provider} already stands on line {first}")
            for name in (row.item, *names):
                if (owner := owners.setdefault(spelling(name), row.item)) != row.item:
                    raise ValueError(f"aliases: {name!r} already means {owner}")
        except ValueError as error:
            raise PriceError(f"{origin}:{line}: {error}") from error
        aliases.update(dict.fromkeys(names, row.item))
        rows.append(row)
    if not rows:
        raise PriceError(f"{origin}: it has no row")
    return PriceBook(tuple(rows), aliases, origin)


def price_for(
    job: SlurmJob, cluster: Cluster | None, book: PriceBook | None = None, *, today: date | None = None
) -> Price:
    """Return the price of what a job asks for: its own, else its cluster's, else the book's.

    A cluster that sells Slurm's billing units has a price of these, whatever the job asks for. Else a
    job without GPUs is priced by core-hour. The book, where none is given, is loaded only if it is
    needed; an explicit price is dated `today`.

    Raises:
        PriceError: there is no such price, or the job asks for GPUs without saying which.
    """
    unit: Literal["gpu-hour", "core-hour"] = "gpu-hour" if job.gpus else "core-hour"
    key = "cost_per_gpu_hour" if job.gpus else "cost_per_core_hour"
    item = (job.gpu or "gpu") if job.gpus else CPU
    for provider, usd in (("job", getattr(job, key)), ("cluster", getattr(cluster, key, None))):
        if usd is not None:
            day = (today or datetime.now(UTC).date()).isoformat()
            return Price(
                item=item, unit=unit, usd_per_hour=usd, provider=provider, source=f"{provider}.{key}", date=day
            )
    if cluster is not None and cluster.cost_per_billing_hour is not None:
        return Price(
            item="billing",
            unit="billing-hour",
            usd_per_hour=cluster.cost_per_billing_hour,
            provider="cluster",
            source="cluster.cost_per_billing_hour, TRESBillingWeights",
            date=(today or datetime.now(UTC).date()).isoformat(),
        )
    if job.gpus and job.gpu is None:
        raise PriceError(
            f"{job.gpus} GPU{'s' * (job.gpus > 1)} a node are asked for without saying which: "
            "set job.gpu_type, or job.cost_per_gpu_hour"
        )
    return (book or load_price_book()).find(job.gpu if job.gpus else None)


def _lines(text: str, origin: str) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield a book's rows, with their line numbers; blank lines are passed over."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    try:
        for line in reader:
            cells = [cell.strip() for cell in line]
            if not any(cells):
                continue
            if header is None:
                header = cells
                if sorted(header) != sorted(COLUMNS):
                    raise PriceError(f"{origin}:{reader.line_num}: {_header_complaint(header)}")
                continue
            if len(cells) != len(header):
                told = f"{len(cells)} cells, where the header has {len(header)}"
                raise PriceError(f"{origin}:{reader.line_num}: {told}: quote what holds a comma")
            yield reader.line_num, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise PriceError(f"{origin}:{reader.line_num}: this is no CSV: {error}") from error


def _header_complaint(header: list[str]) -> str:
    for name in header:
        if name not in COLUMNS:
            return f"unknown column {name!r}{suggestion(name, COLUMNS)}: the columns are {', '.join(COLUMNS)}"
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        return f"the header lacks {', '.join(missing)}"
    return "the header names a column twice"


def _row(cells: Mapping[str, str]) -> Price:
    """Read a row; a ValueError says which column makes no sense."""
    for column in COLUMNS:
        if column != "aliases" and not cells[column]:
            raise ValueError(f"{column}: it is empty")
    item, unit = cells["gpu_type"], cells["unit"]
    if unit not in {"gpu-hour", "core-hour"}:
        raise ValueError(f"unit: {unit!r} is neither gpu-hour nor core-hour")
    if (unit == "core-hour") != (item == CPU):
        raise ValueError(f"unit: {CPU!r} is priced by core-hour, and nothing else is; this is {item!r} by {unit}")
    if not spelling(item):
        raise ValueError(f"gpu_type: {item!r} names no card")
    return Price(
        item=item,
        unit="core-hour" if unit == "core-hour" else "gpu-hour",
        usd_per_hour=_usd(cells["usd_per_hour"]),
        provider=cells["provider"],
        source=cells["source"],
        date=_day(cells["date"]),
    )


def _usd(text: str) -> Decimal:
    try:
        usd = Decimal(text)
    except InvalidOperation:
        raise ValueError(f"usd_per_hour: {text!r} is no number: write 3.25, without a currency sign") from None
    if not usd.is_finite() or not 0 < usd <= _MOST_USD:
        free = "; where hardware is free, set job.cost_per_gpu_hour: 0" if usd.is_zero() else ""
        raise ValueError(f"usd_per_hour: {text!r} is no price above 0 and up to {_MOST_USD:,}{free}")
    return usd


def _day(text: str) -> str:
    try:
        if date.fromisoformat(text).isoformat() == text:
            return text
    except ValueError:
        pass
    raise ValueError(f"date: {text!r} is no day: write YYYY-MM-DD")
