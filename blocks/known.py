"""A block that knows its fields: a misspelt one is an error, where Prefect's own keep it silently."""

from __future__ import annotations

from typing import Any

from prefect.blocks.core import Block
from pydantic import ConfigDict, model_validator

from nexa_infra.spec.fields import suggestion


class KnownFieldsBlock(Block):
    """A block without unknown fields; the base of this package's blocks, itself never saved."""

    # An error must not repeat what was typed: it may be a passphrase.
    model_config = ConfigDict(hide_input_in_errors=True)

    _block_type_name = "Nexa Infra Base"

    @model_validator(mode="before")
    @classmethod
    def _no_unknown_field(cls, given: Any) -> Any:
        if isinstance(given, dict):
            for name in given:
                # Prefect adds block_type_slug, and names of its own with an underscore.
                if name not in cls.model_fields and name != "block_type_slug" and not name.startswith("_"):
                    raise ValueError(f"there is no field {name!r}{suggestion(name, cls.model_fields)}")
        return given
