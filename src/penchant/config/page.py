"""Text of `penchant config` and docs/config.md, which list every config key, generated from the schema."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from penchant.algorithms import ALGORITHMS
from penchant.base.section import as_yaml, bounds
from penchant.base.text import closest
from penchant.config import RunConfig, config_from_mapping
from penchant.config.explain import sections_of
from penchant.errors import ConfigError
from penchant.losses.section import LossModifiers
from penchant.rewards.builtin import WITH_OPTIONS, RewardConfig

_PLAIN = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "null", Any: "anything"}

# settings that are rejected; the page shows the actual error messages
REJECTED: tuple[tuple[str, ...], ...] = (
    ("data.validation_rows=50", "data.validation_fraction=0.1"),
    ("reference.ema=0.99", "reference.sync_every=64"),
    ("reference.sync_mixup=0.5",),
    ("reference.kind=cached", "reference.ema=0.99"),
    ("reward=sentiment",),
    ("algorithm=rloo",),
    ("algorithm=grpo", "reward=words", "algorithm.samples=1"),
    ("algorithm=online_dpo", "reward=words", "algorithm.epochs=2"),
    ("algorithm=ppo", "reward=words", "algorithm.value_init=reward"),
    ("algorithm=reward_model", "reward=words"),
    ("algorithm=rloo", "reward=words", "loss=ipo"),
    ("algorithm=rloo", "reward=words", "evaluation.reward=words"),
    ("evaluation.reward=words", "evaluation.kl_prompts=0"),
    ("trust.kl=[20.0, 5.0]",),
    ("train.batch_size=0",),
    ("train.lr=fast",),
    ("train.batchsize=8",),
    ("learning_rate=1e-5",),
    ("loss=dpoo",),
    ("loss.mix=[{name: dpo}, {name: dpo}]",),
)


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a config, as text: its full path, what it takes, its default ("required" if there is none), its meaning.

    `choices` are all of its values, if they can be listed.
    """

    path: str
    takes: str
    default: str
    meaning: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """One section, or one form of a section: its title, its purpose, its keys."""

    title: str
    about: str
    keys: tuple[Key, ...]


def takes(info: FieldInfo) -> str:
    """What a field accepts: its type in words, its choices, its range."""
    return ", ".join(filter(None, (_type_in_words(info.annotation), bounds(info))))


def _type_in_words(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _type_in_words(inner[0])
    if origin is Literal:
        return " or ".join(str(v) for v in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_in_words(i) for i in inner)
    if origin is list:
        return "list of sections" if _is_section(inner[0]) else f"list of {_type_in_words(inner[0])}"
    if origin is dict:
        return f"mapping of {_type_in_words(inner[0])} to {_type_in_words(inner[1])}"
    return _PLAIN.get(kind, getattr(kind, "__name__", str(kind)))


def choices(kind: Any) -> tuple[str, ...]:
    """All values of a type, as written in a config; empty if they cannot be listed."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind is bool:
        return ("true", "false")
    if origin is Literal:
        return tuple(map(as_yaml, inner))
    if origin in (Union, types.UnionType):
        by_member = [("null",) if member is type(None) else choices(member) for member in inner]
        return tuple(value for values in by_member for value in values) if all(by_member) else ()
    return ()


def _keys(section: type[BaseModel], prefix: str) -> tuple[Key, ...]:
    keys: list[Key] = []
    for name, info in section.model_fields.items():
        kind: Any = info.annotation
        if kind is not None and _is_section(kind):
            keys += _keys(kind, f"{prefix}{name}.")
            continue
        default = "required" if info.is_required() else as_yaml(info.get_default(call_default_factory=True))
        keys.append(Key(prefix + (info.alias or name), takes(info), default, info.description or "", choices(kind)))
        inner: Any = get_args(info.annotation)[0] if get_origin(info.annotation) is list else None
        if inner is not None and _is_section(inner):
            keys += _keys(inner, f"{prefix}{name}.N.")
    return tuple(keys)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").strip().splitlines()[0]


def parts() -> Iterator[Part]:
    """Yield the config's sections in order."""
    for name, info in RunConfig.model_fields.items():
        if name == "loss":
            method = Key(
                "loss.name",
                "one of `penchant losses`, or path.py:function",
                "dpo",
                "which loss; its hyperparameters are further keys of this section",
            )
            mix = Key("loss.mix", "list of losses, each with a weight", "", "several losses, in place of loss.name")
            yield Part(
                "loss",
                "What is minimized: docs/losses.md lists every loss's own keys.",
                (method, *_keys(LossModifiers, "loss."), mix),
            )
        elif name == "algorithm":
            names_by_fields: dict[tuple[str, ...], list[str]] = {}
            for algorithm, kind in ALGORITHMS.items():
                names_by_fields.setdefault(tuple(kind.model_fields), []).append(algorithm)
            for names in names_by_fields.values():
                kind = ALGORITHMS[names[0]]
                if len({ALGORITHMS[n] for n in names}) > 1:
                    kind = kind.__mro__[1]  # their common base class
                name_key = Key("algorithm.name", " or ".join(names), "required", "which algorithm, or path.py:Class")
                others = _keys(kind, "algorithm.")[1:]
                yield Part(f"algorithm: {', '.join(names)}", _first_line(kind), (name_key, *others))
        elif name == "reward":
            accepted = "text, list, or mapping of text to number or options"
            settings = {k.path: k for k in _keys(RewardConfig, "reward.")}
            options = [
                replace(key, path=f"reward.{kind}.{key.path}")
                for kind, section in WITH_OPTIONS.items()
                for key in _keys(section, "")
            ]
            keys = [Key("reward", accepted, "null", info.description or ""), settings["reward.device"]]
            yield Part("reward", _first_line(RewardConfig), (*keys, settings["reward.timeout"], *options))
        elif name == "output":
            yield Part("output", "Where the run goes.", (Key("output", "text", "required", info.description or ""),))
        else:
            (section, *_) = sections_of(info)
            keys = [k for k in _keys(section, f"{name}.") if k.path != "evaluation.reward"]
            if name == "evaluation":
                description = section.model_fields["reward"].description or ""
                keys.append(Key("evaluation.reward", "as reward", "null", description))
            yield Part(name, _first_line(section), tuple(keys))


def text(key: str | None = None) -> str:
    """Describe every key, the keys of a section, or one key.

    Raises:
        ConfigError: there is no such key.
    """
    lines: list[str] = []
    for part in parts():
        keys = [k for k in part.keys if key is None or k.path == key or k.path.startswith(f"{key}.")]
        lines += ["", f"{part.title.upper()}  {part.about}"] if keys else []
        for k in keys:
            default = {"": "", "required": " (required)"}.get(k.default, f" (default: {k.default})")
            lines += [f"  {k.path}: {k.takes}{default}", f"      {k.meaning}"]
    if not lines:
        names = sorted({k.path for p in parts() for k in p.keys})
        suggestion = closest(str(key), names) or next((n for n in names if n.rpartition(".")[2] == key), "")
        how = (
            f"did you mean {suggestion}?"
            if suggestion
            else f"there are the sections {', '.join(RunConfig.model_fields)}"
        )
        raise ConfigError("config", f"{key!r} is not a config key", how)
    return "\n".join(lines[1:])


def error_for(settings: tuple[str, ...]) -> str:
    """The error message for a config with these settings.

    Raises:
        AssertionError: the config is accepted, so the page would be wrong.
    """
    base: Mapping[str, Any] = {"model": {"path": "m"}, "data": {"path": "d.jsonl"}, "output": "o"}
    try:
        config_from_mapping(base, settings)
    except ConfigError as error:
        return f"{error.what}" + (f"; {error.how}" if error.how else "")
    raise AssertionError(f"{' '.join(settings)} is accepted")


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def markdown() -> str:
    """The text of docs/config.md."""
    lines = [
        "# Every key of a config",
        "",
        "Written by `penchant config --markdown` from the schema; a test compares the two. `penchant config SECTION` or `penchant config train.lr` prints a part of it.",
        "",
        "Any key can be set on the command line too: `penchant train run.yaml train.lr=1e-4`. A value of the wrong type or out of range,",
        "or an unknown key, is refused before anything is loaded, with the file's line and, for a mistyped name, the nearest one.",
        "",
    ]
    for part in parts():
        lines += [f"## {part.title}", "", part.about.replace("docs/losses.md", "[losses.md](losses.md)"), ""]
        lines += ["| key | takes | default | meaning |", "|---|---|---|---|"]
        lines += [
            f"| `{k.path}` | {_cell(k.takes)} | {_cell(f'`{k.default}`' if k.default not in ('', 'required') else k.default)} | {_cell(k.meaning)} |"
            for k in part.keys
        ]
        lines.append("")
    lines += [
        "## What is refused",
        "",
        "Settings that contradict each other, and common slips, with the error message that each gets:",
        "",
    ]
    lines += ["| settings | answer |", "|---|---|"]
    lines += [f"| `{' '.join(settings)}` | {_cell(error_for(settings))} |" for settings in REJECTED]
    return "\n".join(lines) + "\n"
