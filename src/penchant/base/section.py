"""The base of every typed section of a config: strict, frozen, unknown keys refused."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A config section; every field carries a one-line `description`."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")
