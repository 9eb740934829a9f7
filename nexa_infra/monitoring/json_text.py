"""Records as plain JSON: the standard library alone, for a steward writes them too."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import fields, is_dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

from nexa_infra.runs.prices import Price


def plain(amount: Decimal) -> str:
    """Write a Decimal without exponent and trailing zeros: `0.0529`, `12`."""
    if not amount:
        return "0"
    return f"{amount:f}".rstrip("0").rstrip(".") if amount.as_tuple().exponent else f"{amount:f}"


def json_text(record: object, left_out: Collection[str] = ()) -> str:
    """Write a record for programs: its fields in their order, but for some of them; amounts as text."""
    data = {name: value for name, value in as_data(record).items() if name not in left_out}
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def as_data(value: Any) -> Any:
    """Return a value as JSON has it: records and mappings as objects, amounts and moments as text."""
    if is_dataclass(value):
        found = {field.name: as_data(getattr(value, field.name)) for field in fields(value)}
        if isinstance(value, Price):
            found["usd_per_hour"] = str(value.usd_per_hour)  # a price is shown as it was read
        return found
    if isinstance(value, Decimal):
        return plain(value)
    if isinstance(value, datetime):
        text = value.isoformat()
        return f"{text[:-6]}Z" if text.endswith("+00:00") else text
    if isinstance(value, Mapping):
        return {name: as_data(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_data(one) for one in value]
    return value
