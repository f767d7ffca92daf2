"""Pydantic's errors as sentences: the file's line, what is wrong there, what to write instead."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from penchant.algorithms import ALGORITHMS, AlgorithmConfig
from penchant.base.section import as_yaml
from penchant.base.text import closest, short
from penchant.config.schema import RunConfig
from penchant.config.yaml import Places, place_of
from penchant.errors import ConfigError

# what users of other tools write, and what it is called here
SYNONYMS = {
    "learning_rate": "train.lr",
    "per_device_train_batch_size": "train.batch_size",
    "train_batch_size": "train.batch_size",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "max_seq_length": "data.max_length",
    "max_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "lr_scheduler_type": "train.schedule",
    "warmup_ratio": "train.warmup_fraction",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "model_name_or_path": "model.path",
    "model_path": "model.path",
    "dataset_path": "data.path",
    "dataset_name": "data.path",
    "output_dir": "output",
    "gradient_accumulation_steps": "train.tokens_per_step (accumulation follows from it and train.batch_size)",
    "bf16": "model.dtype",
    "loss_type": "loss.name",
}


def explain_all(
    error: ValidationError,
    prefix: tuple[str, ...],
    places: Places,
    source: str,
    suggest: Callable[[str], str] | None = None,
) -> ConfigError:
    """A section's pydantic errors as sentences; `prefix` is where the section stands, `suggest` answers an unknown key."""
    found: dict[tuple[str, str], ConfigError] = {}
    for e in error.errors():
        p = _explain({**e, "loc": (*prefix, *e["loc"])}, places, source, suggest)
        known = found.get((p.where, p.what))
        if known is not None:  # a union of types reports each of its members
            p = ConfigError(p.where, p.what, f"{known.how} or {p.how.removeprefix('give ')}")
        found[p.where, p.what] = p
    first, *others = found.values()
    more = "".join(f"\n{p}" for p in others)
    if not first.how:
        return ConfigError(first.where, first.what + more)
    return ConfigError(first.where, first.what, first.how + more)


def with_place(error: ConfigError, places: Places, source: str) -> ConfigError:
    """The same error at ``file:line`` where it names a key of the config."""
    path = tuple(error.where.split("."))
    if path[0] not in RunConfig.model_fields:
        return error
    return ConfigError(place_of(path, places, source), f"{error.where} {error.what}", error.how)


# parts of pydantic's path that are no keys: which member of a union it tried
NO_KEYS = re.compile(r"float|int|str|bool|constrained-\w+|(literal\[|list\[|function).*")


def _explain(error: Any, places: Places, source: str, suggest: Callable[[str], str] | None) -> ConfigError:
    """One pydantic error as a sentence a person can act on."""
    path = tuple(str(p) for p in error["loc"] if not NO_KEYS.fullmatch(str(p)))
    where, dotted = place_of(path, places, source), ".".join(path)
    kind, value = error["type"], error.get("input")
    if kind == "extra_forbidden":
        section = ".".join(path[:-1]) or "the top level"
        hint = _suggest_key(path) if suggest is None else suggest(path[-1])
        return ConfigError(where, f'unknown key "{path[-1]}" in {section}', hint)
    if kind == "missing":
        return ConfigError(where, f"{dotted} is missing", f"add it: {_description(path)}")
    if kind in ("model_type", "dict_type"):
        return ConfigError(where, f"{dotted} is {as_yaml(value)}", "it is a section: indent its keys below it")
    if kind == "value_error" and not isinstance(value, bool):
        what, _, how = str(error["msg"]).removeprefix("Value error, ").partition("; ")
        return ConfigError(where, f"{dotted}: {what}" if dotted else what, how)
    kinds = {dict: "a mapping", list: "a list", bool: f"{as_yaml(value)} (a boolean)", type(None): "null"}
    shown = kinds.get(type(value), short(repr(value)))
    return ConfigError(where, f"{dotted} is {shown}", f"give {_wanted(error, path)}")


def sections_of(info: FieldInfo) -> list[type[BaseModel]]:
    """The forms that a section has; none where the field is a value."""
    kinds = (info.annotation, *getattr(info.annotation, "__args__", ()))
    found = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
    return list(dict.fromkeys(ALGORITHMS.values())) if AlgorithmConfig in found else list(found)


def _fields_of(path: tuple[str, ...]) -> dict[str, FieldInfo]:
    """The keys of the section that a key path lies in; of all of them, where a section has several forms."""
    sections: list[Any] = [RunConfig]
    for part in path[:-1]:
        infos = [s.model_fields[part] for s in sections if part != "loss" and part in s.model_fields]
        sections = [section for info in infos for section in sections_of(info)]
    return {name: info for s in reversed(sections) for name, info in s.model_fields.items()}


def _description(path: tuple[str, ...]) -> str:
    info = _fields_of(path).get(path[-1])
    return (info.description if info is not None else None) or "see recipes/ for an example"


WANTED = {
    "float": "a number such as 5e-6",
    "finite": "a number such as 5e-6",
    "int": "a whole number",
    "bool": "true or false",
    "list": "a list",
}


def _wanted(error: Any, path: tuple[str, ...]) -> str:
    kind = error["type"].split("_")[0]  # float_parsing, int_type, string_too_short
    if kind == "string":
        return f"text ({_description(path)})"
    message = str(error["msg"]).removeprefix("Input should be ")
    return WANTED.get(kind) or ("a number " if kind in ("greater", "less") else "") + message


def _suggest_key(path: tuple[str, ...]) -> str:
    word = path[-1]
    if word in SYNONYMS:
        return f'did you mean "{SYNONYMS[word]}"?'
    names = list(_fields_of(path))
    if near := closest(word, names):
        return f'did you mean "{near}"?'
    for name, info in RunConfig.model_fields.items():
        inner = sections_of(info)
        if inner and word in inner[0].model_fields:
            return f'did you mean "{name}.{word}"?'
    return f"there are {', '.join(sorted(names))}"
