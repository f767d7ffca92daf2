"""The base of every typed section of a config, and how a key's values and bounds are written."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from penchant.base.machine import DEVICES, INDEXED

SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def _a_place(given: str) -> str:
    kind, colon, number = given.partition(":")
    if kind not in DEVICES or (colon and not (kind in INDEXED and number.isascii() and number.isdigit())):
        raise ValueError(f"is {given!r}; give {', '.join(DEVICES)}, or one of several GPUs: cuda:1")
    return given


Place = Annotated[str, AfterValidator(_a_place)]  # of a model beside the trained one


class Section(BaseModel):
    """A config section: strict, frozen, unknown keys refused; every field carries a one-line `description`."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


def as_yaml(value: Any) -> str:
    """A setting's value as YAML would have it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def bounds(info: FieldInfo) -> str:
    """The range of a number: ``> 0, <= 16,777,216``; empty where it has none."""
    found = [(sign, getattr(m, name)) for m in info.metadata for name, sign in SIGNS.items() if hasattr(m, name)]
    return ", ".join(f"{sign} {int(at):,}" if at == int(at) else f"{sign} {at:g}" for sign, at in found)
