"""Read a sweep's config: the keys that vary, their values, and the runs that result."""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from penchant.algorithms import ALGORITHMS
from penchant.base.text import closest
from penchant.config import (
    HOLD_OUT_KEYS,
    SYNONYMS,
    Places,
    RunConfig,
    apply_overrides,
    expand_source_list,
    merge_settings,
    parse_yaml,
    place_of,
    plain_values,
    read_mapping,
    set_key,
)
from penchant.config.several import Member, check_folders, read_output, read_section, read_values
from penchant.errors import ConfigError
from penchant.losses import LOSSES
from penchant.metrics.names import higher_is_better
from penchant.sweep.cluster import ClusterConfig, read_cluster
from penchant.sweep.halving import Halving, check_metric, read_halving
from penchant.sweep.search import Range, SearchConfig

LONGEST_LABEL = 40  # most characters of a value in a folder's name

_SECTIONS = {
    name: {f for a in (i.annotation, *getattr(i.annotation, "__args__", ())) for f in getattr(a, "model_fields", ())}
    for name, i in RunConfig.model_fields.items()
    if name not in ("loss", "algorithm", "reward")
}
_LOSS_KEYS = {i.alias or n for s in LOSSES.values() for n, i in s.params.model_fields.items()}


# (key that varies, value, its label in a folder's name, its place in the file)
Setting = tuple[str, Any, str, str]


def long_key(key: str, base: Mapping[str, Any], where: str) -> str:
    """Expand a short key to its full path: ``seed`` to ``train.seed``, ``beta`` to ``loss.beta``.

    Raises:
        ConfigError: the key is unknown or ambiguous.
    """
    if "." in key or key in RunConfig.model_fields:
        return key
    if key in SYNONYMS:
        raise ConfigError(where, f'unknown key "{key}"', f'did you mean "{SYNONYMS[key]}"?')
    method = "algorithm" if base.get("algorithm") is not None else "loss"
    sections = [name for name, keys in _SECTIONS.items() if key in keys]
    algorithms = {i.alias or n for c in ALGORITHMS.values() for n, i in c.model_fields.items()}
    if key in (algorithms if method == "algorithm" else _LOSS_KEYS) or key == "name":
        sections.append(method)
    if len(sections) == 1:
        return f"{sections[0]}.{key}"
    if sections:
        raise ConfigError(where, f'"{key}" may be {" or ".join(f"{f}.{key}" for f in sections)}', "write it out")
    known_keys = sorted({f for keys in _SECTIONS.values() for f in keys} | _LOSS_KEYS | algorithms)
    suggestion = closest(key, known_keys)
    how = f'did you mean "{suggestion}"?' if suggestion else "write it out: section.key"
    raise ConfigError(where, f'unknown key "{key}"', how)


def grid(section: Any, places: Places, source: str, base: Mapping[str, Any]) -> dict[str, list[Setting]]:
    """Return the axes of a sweep's `grid` section, by key."""
    place = place_of(("grid",), places, source)
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise ConfigError(place, f"grid is {section!r}", "indent keys with lists below it: loss.beta: [0.1, 0.3]")
    axes: dict[str, list[Setting]] = {}
    for path, values in _leaves(section, ("grid",)):
        key_place = place_of(path, places, source)
        key = long_key(".".join(path[1:]), base, key_place)
        if not isinstance(values, list) or not values:
            raise ConfigError(key_place, f"grid.{key} is {values!r}", "give a list of values")
        if key in axes:
            raise ConfigError(key_place, f"{key} is in the grid twice", "keep one")
        axes[key] = axis(key, values, [place_of((*path, str(i)), places, key_place) for i in range(len(values))])
    return axes


def _leaves(values: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*path, key))
        else:
            yield (*path, key), value


def axis(key: str, values: Sequence[Any], places: Sequence[str]) -> list[Setting]:
    """The settings of one key, with distinct labels.

    Raises:
        ConfigError: a value is listed twice.
    """
    for i, value in enumerate(values):
        if any(value == other and type(value) is type(other) for other in values[:i]):
            raise ConfigError(places[i], f"{key}: {value!r} is listed twice", "keep one")
    labels: list[str] = []
    for value in values:
        value_label = label(value)
        labels.append(value_label if value_label not in labels else f"{value_label}_{len(labels) + 1}")
    return [(key, *each) for each in zip(values, labels, places, strict=True)]


def label(value: Any) -> str:
    """Format a value as part of a folder's name."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, dict):
        return "_".join(label(v) for v in value.values())[:LONGEST_LABEL] or "none"
    if isinstance(value, list):
        return "_".join(label(v) for v in value)[:LONGEST_LABEL] or "none"
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", str(value)).strip("_.")[-LONGEST_LABEL:] or "none"


# ---- A sweep's config: a base config, what varies in it, and the resulting runs, each named after its values ----

KEYS = ("output", "base", "grid", "runs", "search", "halving", "metric", "direction", "cluster")
SEED = "train.seed"
BASE = "base"  # the name of the one variant of a sweep without `runs`

_NAME = re.compile(r"[A-Za-z0-9_+-][A-Za-z0-9_.+-]*")


@dataclass(frozen=True)
class SweepRun(Member):
    """One run of a sweep.

    Args:
        setting: its name without the seed; runs of one setting share a row of the table.
        varied: ``{key path: value}`` that distinguishes it from the other runs.
    """

    setting: str
    varied: Mapping[str, Any]

    @cached_property
    def config(self) -> RunConfig:
        """The run's config, checked."""
        return self.build_config(copy.deepcopy(self.values))

    @property
    def seed(self) -> int:
        return self.config.train.seed


@dataclass(frozen=True)
class Sweep:
    """A whole sweep, checked as far as possible without data and models.

    Args:
        runs: in training order; empty for a search.
        metric, higher: the metric that ranks settings, and whether higher is better.
        cluster: where the runs are trained; halving: rule for stopping settings early, or None; search: its settings, or None.
        trial: makes a search's run from its number and ``{key: value}``.
    """

    source: str
    output: Path
    runs: tuple[SweepRun, ...]
    metric: str
    higher: bool
    metric_place: str
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    halving: Halving | None = None
    search: SearchConfig | None = None
    trial: Callable[[int, Mapping[str, Any]], SweepRun] | None = field(default=None, compare=False)


def load_sweep(config_or_path: Mapping[str, Any] | str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep from a YAML file or a mapping, or make one from a run's config and override lists.

    Args:
        overrides: ``key.path=value`` for the sweep's own keys or the base's; ``key.path=a,b,c`` makes the key vary.

    Raises:
        ConfigError: with ``file:line: what, how to fix``. Every run's config is checked.
        CheckpointError, DiskError: a folder cannot be used.
    """
    values, places, source = read_values(config_or_path, "sweep")
    if not set(values) & {"base", "grid", "runs", "search"} and "model" in values:
        values, places = _sweep_of_run(values, places)
    sweep_overrides, base_overrides = _split_overrides(overrides)
    places = apply_overrides(values, places, sweep_overrides)
    output = read_output(values, KEYS, places, source, "sweep", '"base": base')
    base, base_places = _base(values, places, source)
    axes = grid(values.get("grid"), places, source, base)
    for text in base_overrides:
        key, choices = _parse_axis(text)
        key = long_key(key, base, "command line") if "." not in key else key
        if len(choices) > 1 or key in axes:
            axes[key] = axis(key, choices, ["command line"] * len(choices))
        else:
            base_places = apply_overrides(base, base_places, [text])
    factory = _RunFactory(base, base_places, source, output)
    if values.get("search") is not None:
        return _search(values, places, source, factory, axes)
    variants = _variants(values.get("runs"), places, source)
    if not axes and list(variants) == [BASE]:
        how = "add a grid: {loss.beta: [0.1, 0.3]}, or runs, or loss.beta=0.1,0.3"
        raise ConfigError(source, "nothing varies", how)
    runs = tuple(factory.run(*combination) for combination in _combinations(variants, axes))
    _check_names(runs, source)
    for run in runs:
        _check_run(run)
    configs = [r.config for r in runs]
    metric, higher, place = _metric(values, places, source, configs)
    cluster = read_cluster(values, places, source, configs)
    settings = {r.setting: r.config for r in reversed(runs)}
    halving = read_halving(values, places, source, settings, metric, higher)
    check_folders(factory.output, runs)
    return Sweep(source, factory.output, runs, metric, higher, place, cluster, halving)


def _sweep_of_run(values: dict[str, Any], places: Places) -> tuple[dict[str, Any], Places]:
    """Use a run's config as a sweep's base. The sweep's output is the run's output with ``-sweep`` appended."""
    base = {k: v for k, v in values.items() if k != "output"}
    sweep: dict[str, Any] = {"base": base}
    if isinstance(values.get("output"), str):
        sweep["output"] = f"{values['output']}-sweep"
    return sweep, {("base", *p): place for p, place in places.items()}


def _split_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split overrides into those of the sweep's own keys and those of its base."""
    sweep_overrides, base_overrides = [], []
    for text in overrides:
        top_key = text.split("=")[0].split(".")[0].strip()
        if top_key in KEYS and top_key != "base":
            sweep_overrides.append(text)
        else:
            base_overrides.append(text.removeprefix("base."))
    return sweep_overrides, base_overrides


def _parse_axis(text: str) -> tuple[str, list[Any]]:
    """Split ``key=a,b,c`` at the commas outside brackets, braces and quotes."""
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError("command line", f"{text!r} is not an override", "write key.path=value, or key.path=a,b,c")
    try:
        choices, _ = parse_yaml(f"[{raw}]", "command line")
    except ConfigError:
        choices = [raw]  # not a list; an invalid value is reported when it is set
    return key.strip(), choices


def _base(values: Mapping[str, Any], places: Places, source: str) -> tuple[dict[str, Any], Places]:
    """The base config: inline, or from a file, looked up beside the sweep's file first."""
    base = values.get("base")
    place = place_of(("base",), places, source)
    if isinstance(base, str):
        sibling = Path(source).parent / base
        base, base_places = read_mapping(sibling if sibling.exists() else base, "run")
        base = plain_values(base)
    else:
        base_places = {p[1:]: place for p, place in places.items() if p[0] == "base" and p[1:]}
    if not isinstance(base, dict) or not base:
        raise ConfigError(place, "base is missing", "add it: the path of a run's config, or its sections")
    if "stages" in base:
        raise ConfigError(place, "base is a pipeline", "give a run's config")
    base.pop("output", None)
    return base, expand_source_list(base, base_places)


# ---- What varies ----


def _variants(section: Any, places: Places, source: str) -> dict[str, tuple[dict[str, Any], Places]]:
    """The `runs` section: the keys that each named variant overrides in the base."""
    if section is None:
        return {BASE: ({}, {})}
    place = place_of(("runs",), places, source)
    if not isinstance(section, dict) or not section:
        raise ConfigError(place, "runs is not a mapping", "write runs: {dpo: {loss: dpo}, ipo: {loss: {name: ipo}}}")
    variants = {}
    for name, values in section.items():
        variant_place = place_of(("runs", name), places, source)
        if not _NAME.fullmatch(name):
            raise ConfigError(variant_place, f"runs.{name}: not a name", "use letters, digits, _, -, + and .")
        if values is not None and not isinstance(values, dict):
            raise ConfigError(variant_place, f"runs.{name} is {values!r}", "it is a section: indent its keys below it")
        if "output" in (values or {}):
            raise ConfigError(
                variant_place, f"runs.{name}.output is set", "leave it out: its folder is the sweep's and its name"
            )
        own_places = {p[2:]: where for p, where in places.items() if p[:2] == ("runs", name) and p[2:]}
        variants[name] = (values or {}, own_places)
    return variants


def _combinations(
    variants: Mapping[str, tuple[dict[str, Any], Places]], axes: Mapping[str, list[Setting]]
) -> Iterator[tuple[str, tuple[dict[str, Any], Places], list[Setting]]]:
    """Variant and settings of every run. Seeds vary slowest, so that an interrupted sweep has trained all settings equally often."""
    other_axes = [a for key, a in axes.items() if key != SEED]
    seeds: list[tuple[Setting, ...]] = [(s,) for s in axes[SEED]] if SEED in axes else [()]
    for seed in seeds:
        for name, override in variants.items():
            for settings in itertools.product(*other_axes):
                yield name, override, [*settings, *seed]


@dataclass(frozen=True)
class _RunFactory:
    """Makes runs from one base config."""

    base: dict[str, Any]
    places: Places
    source: str
    output: Path

    def run(self, variant: str, override: tuple[dict[str, Any], Places], settings: Sequence[Setting]) -> SweepRun:
        ends = [key.split(".")[-1] for key, *_ in settings]  # the last part names a key, the whole key if two share it
        short_keys = {key: end if ends.count(end) == 1 else key for (key, *_), end in zip(settings, ends, strict=True)}
        prefix = [variant] if variant != BASE else []
        values, places = (
            merge_settings(copy.deepcopy(self.base), copy.deepcopy(override[0])),
            {**self.places, **override[1]},
        )
        # the loss's name first, because setting it drops the settings of another loss
        for key, value, _, place in sorted(settings, key=lambda s: not s[0].endswith("name")):
            places = set_key(values, places, tuple(key.split(".")), copy.deepcopy(value), place)
        pieces = [(key, t if key in ("loss", "loss.name") else f"{short_keys[key]}-{t}") for key, _, t, _ in settings]
        name = "-".join([*prefix, *(piece for _, piece in pieces)])
        setting = "-".join([*prefix, *(piece for key, piece in pieces if key != SEED)]) or "all"
        varied = ({"run": variant} if variant != BASE else {}) | {key: value for key, value, *_ in settings}
        data, train = values.get("data"), self.base.get("train")
        if isinstance(data, dict) and data.get("split_seed") is None and not data.get("eval_path"):
            # hold out the same rows for every train.seed, so that runs are comparable
            data["split_seed"] = (train.get("seed") if isinstance(train, dict) else None) or 0
        return SweepRun(name, values, places, self.source, self.output / name, setting, varied)


def _check_names(runs: Sequence[SweepRun], source: str) -> None:
    names: set[str] = set()
    for run in runs:
        if run.name.lower() in names:
            raise ConfigError(source, f"two runs would be called {run.name}", "give runs other names")
        names.add(run.name.lower())


def _check_run(run: SweepRun) -> None:
    data = run.config.data
    if all(getattr(data, name) is None for name in HOLD_OUT_KEYS):
        what = "nothing is held out, so runs cannot be compared"
        how = "set data.validation_fraction, data.validation_rows or data.eval_path"
        raise ConfigError(place_of(("data",), run.places, run.place), what, how)


# ---- Which run is best ----


def _metric(
    values: Mapping[str, Any], places: Places, source: str, configs: Sequence[RunConfig]
) -> tuple[str, bool, str]:
    """(metric, whether higher is better, its place in the file)."""
    metric, direction = values.get("metric"), values.get("direction")
    place = place_of(("metric",), places, source)
    if metric is None:
        defaults = sorted({c.method.metric for c in configs})
        if len(defaults) > 1:
            what = f"metric is missing, and these runs have no one ({', '.join(defaults)})"
            raise ConfigError(place, what, "set metric")
        metric = defaults[0]
    check_metric(metric, "metric", place, configs)
    if direction not in (None, "min", "max"):
        raise ConfigError(place_of(("direction",), places, source), f"direction is {direction!r}", "give min or max")
    return metric, higher_is_better(metric) if direction is None else direction == "max", place


def _search(
    values: Mapping[str, Any], places: Places, source: str, factory: _RunFactory, axes: Mapping[str, Any]
) -> Sweep:
    place = place_of(("search",), places, source)
    if axes or values.get("runs") is not None:
        how = "keep one; lists go into search.space as choices"
        raise ConfigError(place, "search is combined with a grid or runs", how)
    if values.get("halving") is not None:
        raise ConfigError(
            place_of(("halving",), places, source),
            "halving is combined with a search, whose trials run one after another and cannot wait for each other at a rung",
            "keep one; halving goes with a grid or runs",
        )
    config = read_section(SearchConfig, "search", values, places, source)
    keys = {
        key: long_key(key, factory.base, place_of(("search", "space", key), places, source)) for key in config.space
    }
    config = config.model_copy(update={"space": {keys[k]: v for k, v in config.space.items()}})
    key_places = {long: place_of(("search", "space", key), places, source) for key, long in keys.items()}

    def trial(number: int, params: Mapping[str, Any]) -> SweepRun:
        settings = [(key, value, label(value), key_places[key]) for key, value in params.items()]
        run = factory.run(BASE, ({}, {}), settings)
        name = f"trial-{number}"
        return replace(run, name=name, setting=name, folder=factory.output / name)

    configs = []
    for corner in _corners(config.space):  # check every bound and choice before anything trains
        run = trial(0, corner)
        _check_run(run)
        configs.append(run.config)
    cluster = read_cluster(values, places, source, configs)
    check_folders(factory.output, ())
    return Sweep(source, factory.output, (), *_metric(values, places, source, configs), cluster, None, config, trial)


def _corners(space: Mapping[str, Range | list[Any]]) -> Iterator[dict[str, Any]]:
    choices = {k: v if isinstance(v, list) else [v.low, v.high] for k, v in space.items()}
    for i in range(max(map(len, choices.values()))):
        yield {k: v[min(i, len(v) - 1)] for k, v in choices.items()}
