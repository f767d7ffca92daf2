"""Base class of config sections, and formatting of values and bounds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict
from pydantic.fields import FieldInfo

from penchant.base.machine import DEVICES, INDEXED

SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


def _parse_device(device_name: str) -> str:
    kind, colon, number = device_name.partition(":")
    if kind not in DEVICES or (colon and not (kind in INDEXED and re.fullmatch("0|[1-9][0-9]{0,2}", number))):
        raise ValueError(f"is {device_name!r}; give {', '.join(DEVICES)}, or one of several GPUs: cuda:1")
    return device_name


Place = Annotated[str, AfterValidator(_parse_device)]  # device of a model other than the trained one


class Section(BaseModel):
    """A config section: strict, frozen, unknown keys refused; every field has a one-line `description`."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


RECORDED: ContextVar[bool] = ContextVar("recorded", default=False)


@contextmanager
def recorded() -> Iterator[None]:
    """Accept a run's recorded config as is: `refuse_idle` would refuse keys that earlier versions accepted."""
    token = RECORDED.set(True)
    try:
        yield
    finally:
        RECORDED.reset(token)


def refuse_idle(section: BaseModel, idle: Mapping[str, str], prefix: str = "") -> None:
    """Refuse keys that have no effect but are not at their default.

    Args:
        idle: keys without effect, each with the condition and the fix: ``without environment; set environment, or leave {}
            out``, where ``{}`` stands for the key.
        prefix: put before keys in the message, if it is not about the section itself.

    Raises:
        ValueError: there is such a key; meant for validators.
    """
    if RECORDED.get():
        return
    for name, reason in idle.items():
        info = type(section).model_fields[name]
        if getattr(section, name) != info.get_default(call_default_factory=True):  # a resolved config has every key
            key = info.alias or name
            raise ValueError(f"{prefix}{key} has no effect {reason.format(key)}")


def as_yaml(value: Any) -> str:
    """Format a setting's value as YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def bounds(info: FieldInfo) -> str:
    """The range of a number: ``> 0, <= 16,777,216``; empty if it has none."""
    limits = [(sign, getattr(m, name)) for m in info.metadata for name, sign in SIGNS.items() if hasattr(m, name)]
    return ", ".join(f"{sign} {int(limit):,}" if limit == int(limit) else f"{sign} {limit:g}" for sign, limit in limits)
