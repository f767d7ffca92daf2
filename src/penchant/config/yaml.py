"""Read and write YAML 1.2, with the line of every key, and set single keys."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel
from yaml.composer import ComposerError
from yaml.parser import ParserError
from yaml.reader import ReaderError
from yaml.scanner import ScannerError

from penchant.base.files import YAML_BYTES, YAML_DEPTH, YAML_DUMPER, YAML_LOADER, yaml_root
from penchant.base.text import closest, closest_file, one_line, short
from penchant.errors import ConfigError
from penchant.losses.section import LossModifiers

Places = dict[tuple[str, ...], str]  # where a key is: "file:line"
BY_NAME = ("loss", "algorithm")  # sections that may be written as a name alone
TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars: 1e-5 is a number, yes and on are words, 010 is ten."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [r for r in rules if r[0].removeprefix(TAG) not in ("float", "bool", "int", "timestamp")]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _FastLoader(YAML_LOADER):  # type: ignore[misc]
    """`_Loader` on libyaml."""

    yaml_implicit_resolvers = {first: [*rules] for first, rules in _Loader.yaml_implicit_resolvers.items()}  # noqa: RUF012


class _Dumper(YAML_DUMPER):  # type: ignore[misc]
    """SafeDumper that quotes texts that either version of YAML would read as another type, such as 0E0."""


def _int(_: Any, node: yaml.Node) -> int:
    try:
        return int(node.value)
    except ValueError as error:  # also if it has more digits than Python reads
        problem = f"{short(node.value, 20)} is not a number that can be used"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark, note="give a number") from error


def _bool(_: Any, node: yaml.Node) -> bool:
    value = yaml.SafeLoader.bool_values.get(str(node.value).lower())
    if value is None:
        problem = f"{short(str(node.value), 20)} is neither true nor false"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark, note="write true or false")
    return value


_SIDES: tuple[Any, ...] = (_Loader, _FastLoader, _Dumper)
for _side in _SIDES:
    for _kind, _pattern, _first in (
        (
            "float",
            r"[-+]?(\d+\.\d*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF)|\.(nan|NaN|NAN))",
            "-+.0123456789",
        ),
        ("int", r"[-+]?\d+", "-+0123456789"),
        ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ):
        _side.add_implicit_resolver(TAG + _kind, re.compile(f"^({_pattern})$"), list(_first))
    if _side is not _Dumper:
        _side.add_constructor(TAG + "int", _int)
        _side.add_constructor(TAG + "bool", _bool)


def _compose(text: str) -> tuple[Any, yaml.Node | None]:
    """`yaml_root` by libyaml, ten times as fast; if that fails, by PyYAML's own loader, which reads the text or raises."""
    try:
        return yaml_root(text, _FastLoader)
    except (ReaderError, ScannerError, ParserError, ComposerError):
        return yaml_root(text, _Loader)


def parse_yaml(text: str, source: str, *, yaml_1_1: bool = False) -> tuple[Any, Places]:
    """The value of a YAML text, and the place of each of its keys.

    Args:
        yaml_1_1: values that are plain yes, no, on or off are booleans.
    """
    try:
        loader, node = _compose(text)
        places: Places = {}
        if node is None:
            return None, places
        if yaml_1_1:
            _read_words_as_booleans(node)
        _collect_places(node, source, (), places)
        return loader.construct_document(node), places
    except (yaml.YAMLError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark is not None else source
        what = one_line(str(getattr(error, "problem", None) or error), 200)
        how = getattr(error, "note", None) or "check indentation and colons"
        raise ConfigError(where, f"not valid YAML ({what})", how) from error


def _read_words_as_booleans(node: yaml.Node) -> None:
    if isinstance(node, yaml.ScalarNode):
        is_plain = node.tag == TAG + "str" and not node.style
        node.tag = TAG + "bool" if is_plain and node.value.lower() in yaml.SafeLoader.bool_values else node.tag
    elif isinstance(node, yaml.CollectionNode):
        for item in node.value:
            _read_words_as_booleans(item[1] if isinstance(item, tuple) else item)


def _collect_places(node: yaml.Node, source: str, prefix: tuple[str, ...], places: Places) -> None:
    """Put ``{key path: "file:line"}`` into `places`; duplicate keys raise."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else ()
    if isinstance(node, yaml.SequenceNode):
        pairs = [(None, value) for value in node.value]
    for i, (key, value) in enumerate(pairs):
        where = f"{source}:{(key or value).start_mark.line + 1}"
        if key is not None and not isinstance(key, yaml.ScalarNode):
            raise ConfigError(where, "a key is a list or a mapping", "keys are words: check indentation and colons")
        path = (*prefix, str(i) if key is None else str(key.value))
        if path in places:
            raise ConfigError(where, f"{'.'.join(path)} is set twice", "keep one")
        places[path] = where
        _collect_places(value, source, path, places)


def place_of(path: tuple[str, ...], places: Mapping[tuple[str, ...], str], source: str) -> str:
    """The place of a key, else of a key inside it (an override creates its section), else of the nearest section around it."""
    if path in places:
        return places[path]
    inside = (place for p, place in places.items() if p[: len(path)] == path)
    around = (places[path[:n]] for n in range(len(path) - 1, 0, -1) if path[:n] in places)
    return next(inside, next(around, source))


DATA_ENDINGS = (".csv", ".tsv", ".jsonl", ".parquet", ".gz", ".xlsx")
RESOLVED = "config.resolved.yaml"  # in a run's folder


def _data_file_error(path: Path) -> ConfigError:
    how = f"write one for this file with `penchant init --data {path}`"
    return ConfigError(str(path), "is a data file, and a config (YAML) is expected here", how)


class Kind(NamedTuple):
    """What a config describes: its command, the keys that only such a config has at the top, and its shape for messages."""

    command: str
    keys: frozenset[str]
    shape: str


KINDS = {
    "pipeline": Kind(
        "pipeline",
        frozenset({"stages"}),
        "a pipeline is a mapping with output, stages and, if you like, defaults and compare; see recipes/pipeline.yaml",
    ),
    "sweep": Kind(
        "sweep",
        frozenset({"base", "grid", "runs", "search"}),
        "a sweep is a mapping with output, base and one or more of grid, runs and search; see docs/sweep.md",
    ),
    "run": Kind("train", frozenset({"model"}), "a config is a mapping with model, data and output; see recipes/"),
    # may have any of the keys above
    "foreign": Kind("import", frozenset(), "another tool's config is a mapping of its keys"),
}


def read_mapping(path: str | Path, kind: str) -> tuple[dict[str, Any], Places]:
    """The mapping in a YAML file, and the place of each of its keys: ``{key path: "file:line"}``.

    Args:
        kind: what the file must describe, one of `KINDS`; a sweep may also be started from a run's config.

    Raises:
        ConfigError: the file does not exist, is not YAML, sets a key twice, does not hold a mapping, or describes another kind.
    """
    path = Path(path)
    if path.suffix.lower() in DATA_ENDINGS and path.is_file():
        raise _data_file_error(path)
    try:
        with path.open("rb") as file:
            text = file.read(YAML_BYTES + 1).decode("utf-8-sig")
    except FileNotFoundError as error:
        suggestion = closest_file(path, [p.name for p in path.parent.glob("*.y*ml")])
        runs = {p.parent.name: str(p) for p in path.parent.glob(f"*/{RESOLVED}")}
        run = runs.get(closest(path.name, runs, 0.7), "")
        suggestion = "" if run and not path.suffix else Path(suggestion).name if suggestion else ""
        how = f"did you mean {suggestion or run}?" if suggestion or run else "give the path of a YAML config"
        raise ConfigError(str(path), "no such file", how) from error
    except IsADirectoryError as error:
        config_path = path / RESOLVED
        how = f"its config is {config_path}" if config_path.is_file() else "give the YAML file of a config"
        raise ConfigError(str(path), "is a folder", how) from error
    except (OSError, ValueError) as error:
        raise ConfigError(str(path), f"cannot be read ({error})", "give a UTF-8 YAML file") from error
    if path.suffix.lower() == ".json" and not text.lstrip().startswith("{"):
        raise _data_file_error(path)
    if path.suffix == ".py":
        how = "write the arguments that it sets, such as those of DPOConfig, into a YAML file"
        raise ConfigError(str(path), "is a Python script, and a config (YAML) is expected here", how)
    # other tools read YAML 1.1
    values, places = parse_yaml(text, str(path), yaml_1_1=kind == "foreign")
    if not isinstance(values, dict):
        what = "is empty" if values is None else f"holds a {type(values).__name__} at the top"
        raise ConfigError(str(path), what, KINDS[kind].shape)
    found = next((name for name in (kind, *KINDS) if KINDS[name].keys & values.keys()), kind)
    if kind not in ("foreign", found) and (found, kind) != ("run", "sweep"):
        what = f"is a {found}'s config, and a {kind}'s is expected here"
        how = f"for a {found}, use `penchant {KINDS[found].command} {shlex.quote(str(path))}`"
        raise ConfigError(str(path), what, how)
    return values, places


def plain_values(value: Any, depth: int = 0) -> Any:
    """Nested mappings as dicts with text keys, and paths as text, as a YAML file would give them."""
    if depth > YAML_DEPTH:
        how = "see `penchant config` for the keys there are"
        raise ConfigError("config", f"is nested deeper than {YAML_DEPTH}", how)
    if isinstance(value, Mapping):
        return {str(k): plain_values(v, depth + 1) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_values(v, depth + 1) for v in value]
    return str(value) if isinstance(value, Path) else value


MAX_INT, MAX_FLOAT = 2**63 - 1, 1e30  # fp32 holds up to 3e38
MAX_TEXT = 4096  # characters: the longest path on Linux
FREE_TEXTS = (("data", "template_options"), ("reward",))  # variables of a template; words and patterns of rewards


def check_values(value: Any, places: Places, source: str, path: tuple[str, ...] = ()) -> None:
    """Reject values that no setting can have: numbers beyond 64 bits, inf and NaN, texts that cannot be a path.

    Raises:
        ConfigError: with the key's place.
    """
    if isinstance(value, Mapping):
        for key, inner in value.items():
            check_values(str(key), places, source, path)
            check_values(inner, places, source, (*path, str(key)))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            check_values(inner, places, source, (*path, str(i)))
    what, how = "", "give a number within the range of a float"
    if isinstance(value, float) and not math.isfinite(value):
        what, how = f"is {value}", "give a finite number"
    elif isinstance(value, (int, float)):
        if abs(value) > (MAX_FLOAT if isinstance(value, float) else MAX_INT):
            what = "is beyond every range"
        elif 0 < abs(value) < 1 / MAX_FLOAT:
            what = "is nearly zero and not zero"
    elif isinstance(value, str):
        how = "give a shorter text without control characters"
        if len(value) > (YAML_BYTES if any(path[: len(p)] == p for p in FREE_TEXTS) else MAX_TEXT):
            what = f"has {len(value):,} characters"
        elif re.search("[\0\ud800-\udfff]", value):
            what = "holds a NUL or half a character"
    if what:
        raise ConfigError(place_of(path, places, source), f"{'.'.join(path)} {what}".strip(), how)


def apply_overrides(values: dict[str, Any], places: Places, overrides: Sequence[str]) -> Places:
    """Set ``key.path=value`` in `values`, in place.

    Returns:
        `places` with the overridden keys at "command line".
    """
    for text in overrides:
        key, equals, raw = text.partition("=")
        if not equals or not key.strip():
            how = "write key.path=value, e.g. train.lr=1e-5"
            raise ConfigError("command line", f"{short(text)!r} is not an override", how)
        value, _ = parse_yaml(raw, "command line")
        places = set_key(values, places, tuple(key.strip().split(".")), value, "command line")
    return places


def expand_source_list(values: dict[str, Any], places: Places) -> Places:
    """Turn a list given as `data` into `data.sources`, in place; return the adjusted places."""
    if not isinstance(values.get("data"), list):
        return places
    values["data"] = {"sources": values["data"]}
    return {
        ("data", "sources", *key[1:]) if key[0] == "data" and key[1:] else key: place for key, place in places.items()
    }


def set_key(values: dict[str, Any], places: Places, path: tuple[str, ...], value: Any, where: str) -> Places:
    """Set one key in `values`, in place; missing sections are created.

    Args:
        where: the place of the value, for messages.

    Returns:
        `places` with the key at `where`.

    Raises:
        ConfigError: a part of the path is not a section.
    """
    section = values
    for i, part in enumerate(path[:-1]):
        if section.get(part) is None:
            section[part] = {}
        if part in BY_NAME and isinstance(section[part], str):
            section[part] = {"name": section[part]}
        section = section[part]
        if isinstance(section, list):
            what = f"{'.'.join(path[: i + 1])} is a list, so {'.'.join(path)} cannot be set"
            raise ConfigError(where, what, "give the whole list, or change it in the file")
        if not isinstance(section, dict):
            what = f"{'.'.join(path[: i + 1])} is a value, not a section, so {'.'.join(path)} cannot be set"
            raise ConfigError(where, what, "see `penchant config` for all keys")
    if path[-2:] == ("loss", "name") and section.get("name", "dpo") != value:
        # another loss starts from its own defaults: a beta in the file was meant for the file's loss
        overridden = {p[-1] for p, place in places.items() if p[:-1] == path[:-1] and place == "command line"}
        for key in [k for k in section if k not in {*LossModifiers.model_fields, *overridden}]:
            del section[key]
    section[path[-1]] = value
    loss_set_too = any(p[0] == "loss" and place == where for p, place in places.items())
    if path in (("algorithm",), ("algorithm", "name")) and value is not None and "loss" in values and not loss_set_too:
        del values["loss"]  # an algorithm replaces the file's loss
        places = {p: place for p, place in places.items() if p[0] != "loss"}
    return {p: place for p, place in places.items() if p[: len(path)] != path} | {path: where}


def dump_yaml(value: Any, **how: Any) -> str:
    """YAML that `parse_yaml` reads back unchanged; `how` is passed to PyYAML."""
    return str(yaml.dump(value, Dumper=_Dumper, **how))


def dump_config(config: BaseModel) -> str:
    """YAML that loads back to an equal config, every default spelled out."""
    return dump_yaml(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
