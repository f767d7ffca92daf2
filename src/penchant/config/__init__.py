"""Load a typed config from YAML, with line numbers in errors and suggestions for unknown keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from penchant.base.functions import is_own
from penchant.base.section import recorded
from penchant.config.explain import SYNONYMS, explain_all, with_place  # noqa: F401
from penchant.config.schema import (  # noqa: F401
    HOLD_OUT_KEYS,
    LOSS_AND_ALGORITHM,
    RunConfig,
    default_settings,
    merge_settings,
    result_settings,
    with_absolute_paths,
)
from penchant.config.yaml import (  # noqa: F401
    BY_NAME,
    RESOLVED,
    Places,
    apply_overrides,
    check_values,
    dump_config,
    expand_source_list,
    parse_yaml,
    place_of,
    plain_values,
    read_mapping,
    set_key,
)
from penchant.errors import ConfigError
from penchant.losses.section import LossConfig, LossModifiers, LossProblem


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML config and apply ``key.path=value`` overrides.

    Raises:
        ConfigError: with ``file:line: what, how to fix`` for every problem found.
    """
    return load_config_with_places(path, overrides)[0]


def load_config_with_places(path: str | Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, Places]:
    """Like `load_config`, with the place of each key that is set: ``{key path: "file:line" or "command line"}``."""
    values, places = read_mapping(path, "run")
    places = expand_source_list(values, places)
    places = apply_overrides(values, places, overrides)
    with recorded() if Path(path).name == RESOLVED else nullcontext():
        return build(values, places, str(path)), places


def config_from_mapping(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """Like `load_config`, from a mapping, for Python callers."""
    plain = plain_values(values)
    return build(plain, apply_overrides(plain, expand_source_list(plain, {}), overrides), "config")


def build(values: dict[str, Any], places: Places, source: str) -> RunConfig:
    """Validate values and build the config.

    Args:
        places: ``{key path: "file:line"}`` for messages; source: the place of keys that have none.
    """
    places = expand_source_list(values, places)
    check_values(values, places, source)
    values = _resolve_own_files(values, places, source)
    _check_loss(values, places, source)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise explain_all(error, (), places, source) from error
    except ConfigError as error:
        raise with_place(error, places, source) from error


def _resolve_own_files(values: dict[str, Any], places: Places, source: str) -> dict[str, Any]:
    """Resolve the user's own losses, algorithm and layout, looked up next to the config file, then in the working folder."""

    def resolved_name(name: Any, path: tuple[str, ...]) -> Any:
        if not isinstance(name, str) or not is_own(name):
            return name
        file, _, function = name.rpartition(":")
        beside = Path(place_of(path, places, source).rpartition(":")[0]).parent / file
        target = beside if beside.is_file() else Path(file).expanduser()
        return f"{target.resolve()}:{function}" if target.is_file() else name

    def resolved_section(value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, str):
            return resolved_name(value, path)
        if not isinstance(value, Mapping):
            return value
        section = {**value, "name": resolved_name(value["name"], (*path, "name"))} if "name" in value else dict(value)
        if isinstance(section.get("mix"), list):
            section["mix"] = [resolved_section(m, (*path, "mix", str(i))) for i, m in enumerate(section["mix"])]
        return section

    data = values.get("data")
    if isinstance(data, Mapping) and "shape" in data:
        values = {**values, "data": {**data, "shape": resolved_name(data["shape"], ("data", "shape"))}}
    return {k: resolved_section(v, (k,)) if k in BY_NAME else v for k, v in values.items()}


def _check_loss(values: Mapping[str, Any], places: Places, source: str) -> None:
    """Check the loss section separately, since its errors have their own places, in schedules and entries of a mix."""
    loss = values.get("loss")
    if isinstance(loss, list):
        raise with_place(ConfigError("loss", "is a list", "write one loss, or loss: {mix: [...]}"), places, source)
    if not isinstance(loss, (str, Mapping)):
        return
    resolved = isinstance(loss, Mapping) and LossModifiers.model_fields.keys() <= loss.keys()  # by `dump_config`
    if values.get("algorithm") is not None and not resolved:
        message, _, how = LOSS_AND_ALGORITHM.partition("; ")
        raise ConfigError(place_of(("loss",), places, source), message, how)
    section = {"name": loss} if isinstance(loss, str) else {k: v for k, v in loss.items() if k != "ref_ema"}
    try:
        LossConfig.from_mapping(section)
    except LossProblem as problem:
        raise explain_all(problem.error, problem.path, places, source, problem.suggestion) from problem
    except ConfigError as error:
        raise with_place(error, places, source) from error
