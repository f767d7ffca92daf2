"""Turn pydantic errors into sentences: the file's line, what is wrong there, what to write instead."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from penchant.algorithms import ALGORITHMS, AlgorithmConfig
from penchant.base.section import as_yaml, bounds
from penchant.base.text import closest, short
from penchant.config.schema import RunConfig
from penchant.config.yaml import Places, parse_yaml, place_of
from penchant.errors import ConfigError
from penchant.losses import LOSSES

# keys of other tools, and their names here
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
    "target": "lora.target_modules",
    "lora_target": "lora.target_modules",
    "lora_target_modules": "lora.target_modules",
    "use_dora": "lora.dora",
    "use_rslora": "lora.rslora",
    "loraplus_lr_ratio": "lora.lr_ratio",
    "adapter_name_or_path": "model.adapter",
    "model_name_or_path": "model.path",
    "model_path": "model.path",
    "dataset_path": "data.path",
    "dataset_name": "data.path",
    "output_dir": "output",
    "gradient_accumulation_steps": "train.tokens_per_step (accumulation follows from it and train.batch_size)",
    "bf16": "model.dtype",
    "loss_type": "loss.name",
    "max_prompt_length": "data.max_length (prompt and answer together)",
    "weight_decay_rate": "train.weight_decay",
    "batch": "train.batch_size",
    "steps": "train.max_steps",
    "model_name": "model.path",
    "model_id": "model.path",
    "base_model": "model.path",
    "dataset": "data.path",
    "train_file": "data.path",
    "eval_file": "data.eval_path",
    "run_name": "logging.name",
    "report_to": "logging.trackers",
    "rank": "lora.r",
    "load_in_4bit": "model.quantize",
    "load_in_8bit": "model.quantize",
    "quantization_bit": "model.quantize",
    "attn_implementation": "model.attention",
    "optim": "train.optimizer",
    "reward_funcs": "reward",
    "num_generations": "algorithm.samples",
    "max_completion_length": "algorithm.max_new_tokens",
    "epsilon_high": "algorithm.clip_high",
}


MANY_FOREIGN = 4  # unknown keys at the top level of another tool's config
MAX_ERRORS = 20  # errors of one section shown after the first


def explain_all(
    error: ValidationError,
    prefix: tuple[str, ...],
    places: Places,
    source: str,
    suggest: Callable[[str], str] | None = None,
) -> ConfigError:
    """A section's pydantic errors as sentences; `prefix` is the section's path, `suggest` gives advice on an unknown key."""
    found = error.errors()
    foreign = [str(e["loc"][0]) for e in found if e["type"] == "extra_forbidden" and len(e["loc"]) == 1]
    if not prefix and len(foreign) >= MANY_FOREIGN and any(e["type"] == "missing" for e in found):
        what = f"its keys are not Penchant's: {', '.join(foreign[:MANY_FOREIGN])}, ..."
        how = f"translate a config of TRL, LLaMA-Factory, Axolotl or ms-swift first: penchant import {source}"
        return ConfigError(source, what, how)
    errors: dict[tuple[str, str], ConfigError] = {}
    for e in found:
        p = _explain({**e, "loc": (*prefix, *e["loc"])}, places, source, suggest)
        earlier = errors.setdefault((p.where, p.what), p)
        if p.how != earlier.how:  # a union of types reports each of its members
            errors[p.where, p.what] = ConfigError(p.where, p.what, f"{earlier.how} or {p.how.removeprefix('give ')}")
    first, *others = errors.values()
    more = "".join(f"\n{p}" for p in others[:MAX_ERRORS])
    if len(others) > MAX_ERRORS:
        more += f"\nand {len(others) - MAX_ERRORS:,} more like these"
    if not first.how:
        return ConfigError(first.where, first.what + more)
    return ConfigError(first.where, first.what, first.how + more)


def with_place(error: ConfigError, places: Places, source: str) -> ConfigError:
    """The error at ``file:line`` if it names a key of the config, else unchanged."""
    path = tuple(error.where.split("."))
    if path[0] not in RunConfig.model_fields:
        return error
    return ConfigError(place_of(path, places, source), f"{error.where} {error.what}", error.how)


# parts of pydantic's path that are not keys: which member of a union it tried
NO_KEYS = re.compile(r"float|int|str|bool|\[key\]|constrained-\w+|(literal\[|list\[|dict\[|function).*")


def _explain(error: Any, places: Places, source: str, suggest: Callable[[str], str] | None) -> ConfigError:
    """One pydantic error as a sentence that a user can act on."""
    path = tuple(str(p) for p in error["loc"] if not NO_KEYS.fullmatch(str(p)))
    where, dotted = place_of(path, places, source), ".".join(path)
    kind, value = error["type"], error.get("input")
    type_names = {dict: "a mapping", list: "a list", bool: f"{as_yaml(value)} (a boolean)", type(None): "empty (null)"}
    value_text = type_names.get(type(value), short(repr(value)))
    if kind == "extra_forbidden":
        section = f"in {'.'.join(path[:-1])}" if path[:-1] else "at the top level"
        use_default = suggest is None or (path[0] == "loss" and path[-1] in SYNONYMS)
        hint = _suggest_key(path, places) if use_default else suggest(path[-1])  # type: ignore[misc]
        return ConfigError(where, f'unknown key "{short(path[-1])}" {section}', hint)
    if kind == "missing":
        return ConfigError(where, f"{dotted} is missing", f"add it: {_description(path)}")
    if kind == "dict_type" and str(error["loc"][-1]).startswith("dict["):  # one of several forms
        return ConfigError(where, f"{dotted} is {value_text}", "give a mapping")
    if kind in ("model_type", "dict_type"):
        how = "indent its keys below it"
        if where == "command line":
            first_key = next(iter(_fields_of((*path, ""))), "KEY")
            example = as_yaml(value) if isinstance(value, (int, float)) else "..."
            how = f"set its keys, as in {dotted}.{first_key}={example}"
        return ConfigError(where, f"{dotted} is {short(as_yaml(value))}", f"it is a section: {how}")
    if kind == "value_error" and not isinstance(value, bool):
        what, _, how = str(error["msg"]).removeprefix("Value error, ").partition("; ")
        where = _place_of_named_key(what, path, places) or where
        return ConfigError(where, f"{dotted}: {what}" if dotted else what, how)
    if isinstance(value, str) and kind.split("_")[0] in ("float", "finite", "int", "bool", "literal"):
        unquoted = _number_without_quotes(value)
        if unquoted is not None:
            return ConfigError(
                where, f"{dotted} is the text {short(repr(value))}", f"write {short(unquoted)} without quotes"
            )
    return ConfigError(where, f"{dotted} is {value_text}", f"give {_expected(error, path)}")


def _place_of_named_key(what: str, path: tuple[str, ...], places: Places) -> str:
    """The place of a section's keys that an error message names: the command line if any is set there, else the first place."""
    words = re.findall(r"\w+(?:\.\w+)*", what)
    named_places = [places[key] for word in words if (key := (*path, *word.split("."))) in places]
    return next((place for place in named_places if place == "command line"), next(iter(named_places), ""))


def sections_of(info: FieldInfo) -> list[type[BaseModel]]:
    """The section classes that a field can hold; none if it is a value."""
    kinds = (info.annotation, *getattr(info.annotation, "__args__", ()))
    sections = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
    return list(dict.fromkeys(ALGORITHMS.values())) if AlgorithmConfig in sections else list(sections)


def _fields_of(path: tuple[str, ...]) -> dict[str, FieldInfo]:
    """The keys of the section that a key path is in; if it has several forms, the keys of all of them."""
    sections: list[Any] = [RunConfig]
    for part in (p for p in path[:-1] if not p.isdigit()):  # a number is an index into a list of sections
        infos = [s.model_fields[part] for s in sections if part != "loss" and part in s.model_fields]
        sections = [section for info in infos for section in sections_of(info)]
    return {name: info for s in reversed(sections) for name, info in s.model_fields.items()}


def _description(path: tuple[str, ...]) -> str:
    info = _fields_of(path).get(path[-1])
    return (info.description if info is not None else None) or "see recipes/ for an example"


def _number_without_quotes(text: str) -> str | None:
    """A quoted number or boolean without its quotes; None for any other text."""
    try:
        value, _ = parse_yaml(text, "")
    except ConfigError:
        return None
    return text.strip() if isinstance(value, (bool, int, float)) else None


def _example(path: tuple[str, ...]) -> str:
    """An example value for a numeric key: its default, if it has one."""
    loss_fields = (s.params.model_fields.values() for s in LOSSES.values())
    candidates = [i for f in loss_fields for i in f if (i.alias or "") == path[-1]] if path[0] == "loss" else []
    info = next(iter(candidates), None) or _fields_of(path).get(path[-1])
    default = None if info is None else info.default
    if isinstance(default, (int, float)) and not isinstance(default, bool):
        return as_yaml(default)
    return "5e-6" if path[-1] == "lr" else "0.1"


EXPECTED = {
    "int": "a whole number",
    "bool": "true or false",
    "list": "a list",
}


def _expected(error: Any, path: tuple[str, ...]) -> str:
    kind = error["type"].split("_")[0]  # float_parsing, int_type, string_too_short
    if kind == "string":
        return f"text ({_description(path)})"
    if kind in ("float", "finite"):
        return f"a number such as {_example(path)}"
    message = str(error["msg"]).removeprefix("Input should be ")
    if kind not in ("greater", "less"):
        return EXPECTED.get(kind, message)
    info = _fields_of(path).get(path[-1])
    limits = bounds(info) if info is not None else ""
    share = "," in limits and limits.endswith(("< 1", "<= 1"))
    expectation = f"a number {limits.replace(', ', ' and ') if share else message}"
    optional = info is not None and type(None) in getattr(info.annotation, "__args__", ())
    return expectation + (", or null for none" if optional else "")


def full_key(word: str, places: Places) -> str:
    """The full key for a word without its section or from another tool; empty if there is none.

    Args:
        places: of the keys that are set; a key of `algorithm` is meant only if that section is set, else one of `loss`.
    """
    if word in SYNONYMS:
        return SYNONYMS[word]
    if word in RunConfig.model_fields:
        return word
    has_algorithm = any(p[0] == "algorithm" for p in places)
    sections = [
        n for n, info in RunConfig.model_fields.items() for s in sections_of(info)[:1] if word in s.model_fields
    ]
    if any(word == (i.alias or n) for s in LOSSES.values() for n, i in s.params.model_fields.items()):
        sections = [*(n for n in sections if n != "algorithm"), "loss"] if not has_algorithm else sections
    return f"{sections[0]}.{word}" if sections else ""


def _suggest_key(path: tuple[str, ...], places: Places) -> str:
    word = path[-1]
    if word in SYNONYMS:
        return f'did you mean "{SYNONYMS[word]}"?'
    names = list(_fields_of(path))
    similar, other_key = closest(word, names), full_key(word, places)
    at_top = len(path) == 1  # a bare name such as lr: the key that has it comes before a section that sounds like it
    if guess := (other_key or similar) if at_top else (similar or other_key):
        return f'did you mean "{guess}"?'
    return f"there are {', '.join(sorted(names))}"
