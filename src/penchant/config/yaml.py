"""YAML 1.2 with the line of every key, and keys that are set one by one."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from penchant.base.text import closest_file
from penchant.errors import ConfigError
from penchant.losses.section import LossModifiers

Places = dict[tuple[str, ...], str]  # where a key stands: "file:line"
BY_NAME = ("loss", "algorithm")  # sections that may be written as a name alone
TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars: 1e-5 is a number, yes and on are words, 010 is ten."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [r for r in rules if r[0].removeprefix(TAG) not in ("float", "bool", "int", "timestamp")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what either version of YAML reads as another kind: the text 0E0."""


for _kind, _pattern, _first in (
    (
        "float",
        r"[-+]?(\d+\.\d*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF)|\.(nan|NaN|NAN))",
        "-+.0123456789",
    ),
    ("int", r"[-+]?\d+", "-+0123456789"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
):
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(TAG + _kind, re.compile(f"^({_pattern})$"), list(_first))  # type: ignore[attr-defined]
_Loader.add_constructor(TAG + "int", lambda _, node: int(node.value))


def parse_yaml(text: str, source: str) -> tuple[Any, Places]:
    """What a YAML text holds, and where each of its keys stands."""
    try:
        loader = _Loader(text)  # a SafeLoader
        node = loader.get_single_node()
        places = _lines(node, source) if node is not None else {}
        return loader.construct_document(node) if node is not None else None, places
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark is not None else source
        raise ConfigError(
            where, f"not valid YAML ({getattr(error, 'problem', error)})", "check indentation and colons"
        ) from error


def _lines(node: yaml.Node, source: str, prefix: tuple[str, ...] = ()) -> Places:
    """``{key path: "file:line"}``; duplicate keys raise."""
    places: Places = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = (*prefix, str(key.value))
            if path in places:
                raise ConfigError(f"{source}:{key.start_mark.line + 1}", f"{'.'.join(path)} is set twice", "keep one")
            places[path] = f"{source}:{key.start_mark.line + 1}"
            places |= _lines(value, source, path)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            places[(*prefix, str(i))] = f"{source}:{value.start_mark.line + 1}"
            places |= _lines(value, source, (*prefix, str(i)))
    return places


def place_of(path: tuple[str, ...], places: Mapping[tuple[str, ...], str], source: str) -> str:
    """Where the key, or the nearest section around it, or a key in it, stands."""
    around = (places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in places)
    inside = (place for p, place in places.items() if p[: len(path)] == path)
    return next(around, next(inside, source))


def read_mapping(path: str | Path, shape: str) -> tuple[dict[str, Any], Places]:
    """The mapping that a YAML file holds, and where each of its keys stands: ``{key path: "file:line"}``.

    Args:
        shape: what such a file must look like, for a message.

    Raises:
        ConfigError: no such file, not YAML, a key twice, or something other than a mapping.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        near = closest_file(path, [p.name for p in path.parent.glob("*.y*ml")])
        raise ConfigError(
            str(path), "no such file", f"did you mean {Path(near).name}?" if near else "give the path of a YAML config"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"cannot be read ({error})", "give a UTF-8 YAML file") from error
    values, places = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        what = "is empty" if values is None else f"holds a {type(values).__name__} at the top"
        raise ConfigError(str(path), what, shape)
    return values, places


def plain_values(value: Any) -> Any:
    """Nested mappings as dicts with text keys, paths as text: what a YAML file would have given."""
    if isinstance(value, Mapping):
        return {str(k): plain_values(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_values(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def apply_overrides(values: dict[str, Any], places: Places, overrides: Sequence[str]) -> Places:
    """Set ``key.path=value`` in `values`, in place.

    Returns:
        `places` with the overridden keys on the command line.
    """
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals or not key.strip():
            raise ConfigError(
                "command line", f"{text!r} is not an override", "write key.path=value, e.g. train.lr=1e-5"
            )
        value, _ = parse_yaml(raw, "command line")
        places = set_key(values, places, tuple(key.strip().split(".")), value, "command line")
    return places


def set_key(values: dict[str, Any], places: Places, path: tuple[str, ...], value: Any, where: str) -> Places:
    """Set one key in `values`, in place; sections that are not there are made.

    Args:
        where: where the value stands, for messages.

    Returns:
        `places` with the key at `where`.

    Raises:
        ConfigError: something on the way is a value.
    """
    at = values
    for i, part in enumerate(path[:-1]):
        if at.get(part) is None:
            at[part] = {}
        if part in BY_NAME and isinstance(at[part], str):
            at[part] = {"name": at[part]}
        at = at[part]
        if not isinstance(at, dict):
            what = f"{'.'.join(path[: i + 1])} is a value, not a section, so {'.'.join(path)} cannot be set"
            raise ConfigError(where, what, "see `penchant config` for the keys that there are")
    if path[-2:] == ("loss", "name") and at.get("name", "dpo") != value:
        # another loss starts from its own defaults: a beta that was meant for the file's loss is not meant for it
        given = {p[-1] for p, place in places.items() if p[:-1] == path[:-1] and place == "command line"}
        for key_of_file in [k for k in at if k not in {*LossModifiers.model_fields, *given}]:
            del at[key_of_file]
    at[path[-1]] = value
    also = any(p[0] == "loss" and place == where for p, place in places.items())
    if path in (("algorithm",), ("algorithm", "name")) and value is not None and "loss" in values and not also:
        del values["loss"]  # an algorithm takes the place of the file's loss
        places = {p: place for p, place in places.items() if p[0] != "loss"}
    return {p: place for p, place in places.items() if p[: len(path)] != path} | {path: where}


def dump_yaml(value: Any, **how: Any) -> str:
    """YAML that `parse_yaml` reads back as it is; `how` is PyYAML's."""
    return str(yaml.dump(value, Dumper=_Dumper, **how))


def dump_config(config: BaseModel) -> str:
    """YAML that loads back to an equal config, every default spelled out."""
    return dump_yaml(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
