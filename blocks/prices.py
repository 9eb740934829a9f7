"""The block that holds a price list of one's own."""

from __future__ import annotations

import csv
import io
from datetime import date as Day
from decimal import Decimal
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from nexa_infra.blocks.known import KnownFieldsBlock
from nexa_infra.errors import PriceError
from nexa_infra.monitoring.prices import COLUMNS, CPU, PriceBook, parse_price_book


class PriceRow(BaseModel):
    """What an hour of one thing costs, and who says so."""

    model_config = ConfigDict(extra="forbid")

    gpu_type: str = Field(
        min_length=1,
        title="GPU type",
        description="The GPU's type, or cpu for a core.",
        examples=["h100"],
        json_schema_extra={"position": 0},
    )
    usd_per_hour: float = Field(
        gt=0,
        allow_inf_nan=False,
        title="USD an hour",
        description="USD for an hour of one GPU, or of one core.",
        json_schema_extra={"position": 1},
    )
    provider: str = Field(
        default="own", min_length=1, description="Whose price it is.", json_schema_extra={"position": 2}
    )
    source: str = Field(
        default="price list", min_length=1, description="Where it was read.", json_schema_extra={"position": 3}
    )
    date: Day = Field(description="The day that it was read.", json_schema_extra={"position": 4})
    aliases: list[str] = Field(
        default=[], description="Other spellings of the type.", json_schema_extra={"position": 5}
    )


class PriceList(KnownFieldsBlock):
    """Prices of GPUs and cores, in place of the bundled price book.

    Attributes:
        rows: One price a row. Of several rows of a type, the first is its default.
    """

    _block_type_name = "Price List"
    _block_type_slug = "price-list"
    _description = "What an hour of a GPU or of a core costs, with its provider, source and date."
    _logo_url = "https://upload.wikimedia.org/wikipedia/commons/3/35/Emoji_u1f4b5.svg"  # type: ignore[assignment]
    _documentation_url = "https://github.com/skypilot-org/skypilot-catalog"  # type: ignore[assignment]

    rows: list[PriceRow] = Field(min_length=1, title="Prices")

    @model_validator(mode="after")
    def _readable(self) -> Self:
        try:
            self.to_book()
        except PriceError as error:
            raise ValueError(str(error)) from error
        return self

    @classmethod
    def from_csv(cls, text: str) -> Self:
        """Read a price book's CSV, such as the bundled `monitoring/prices.csv`.

        Raises:
            PriceError: a line makes no sense; the message names the line and the column.
        """
        book = parse_price_book(text, "the price list")
        spellings: dict[str, list[str]] = {}
        for alias, item in book.aliases.items():
            spellings.setdefault(item, []).append(alias)
        rows = [
            PriceRow(
                gpu_type=price.item,
                usd_per_hour=float(price.usd_per_hour),
                provider=price.provider,
                source=price.source,
                date=Day.fromisoformat(price.date),
                aliases=spellings.pop(price.item, []),  # told once, on the type's first row
            )
            for price in book.rows
        ]
        return cls(rows=rows)

    def to_book(self) -> PriceBook:
        """Return the engine's price book.

        Raises:
            PriceError: two rows contradict each other; the message counts the rows from line 2, as in the CSV.
        """
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, COLUMNS)
        table.writeheader()
        for row in self.rows:
            item = row.gpu_type.strip()
            table.writerow(
                {
                    "gpu_type": item,
                    "aliases": "|".join(row.aliases),
                    # By its text, which is what was typed; never in the form 1e-05.
                    "usd_per_hour": f"{Decimal(str(row.usd_per_hour)):f}",
                    "unit": "core-hour" if item == CPU else "gpu-hour",
                    "provider": row.provider,
                    "source": row.source,
                    "date": row.date.isoformat(),
                }
            )
        return parse_price_book(text.getvalue(), "the price list")
