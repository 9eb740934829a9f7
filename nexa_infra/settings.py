"""Defaults from the environment (NEXA_*) and from .env."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from nexa_infra.errors import ConfigError, Problem


class Settings(BaseSettings):
    """What may be set for a machine or a project; each name is NEXA_ and the field's, in capitals."""

    model_config = SettingsConfigDict(env_prefix="NEXA_", env_file=".env", extra="ignore")

    home: Path = Field(default=Path(".nexa"), description="the local default's workdir: runs/, snapshots/")
    price_book: Path | None = Field(default=None, description="a price book in place of the bundled one, CSV")
    price_provider: str | None = Field(default=None, description="whose prices to prefer, as the price book has it")
    catalog: Path | None = Field(default=None, description="an image catalog in place of the project's own, YAML")
    kill_wait: float = Field(default=3.0, ge=0, description="seconds between TERM and KILL on the local default")
    patience: float = Field(default=14400, gt=0, description="how long a cluster that does not answer is waited for, s")
    grace_seconds: float = Field(default=10.0, ge=0, description="time between two look-ups of a lost answer, s")
    poll_seconds: float = Field(default=0.2, gt=0, description="time between two looks at a local run")


@cache
def settings() -> Settings:
    """Read the settings, once a process.

    Raises:
        ConfigError: one of them is not what it must be; the message names the variable.
    """
    try:
        return Settings()
    except ValidationError as error:
        raise ConfigError(
            *(
                Problem(
                    f"NEXA_{'_'.join(map(str, each['loc'])).upper()}",
                    f"is {each['input']!r}: {each['msg']}; change it in the environment or in .env",
                    file="settings",
                )
                for each in error.errors()
            )
        ) from error
