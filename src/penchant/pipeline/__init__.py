"""Read a pipeline's config: stages that share defaults, use each other's models, and are compared at the end."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, ValidationError, field_validator, model_validator

from penchant.base.section import Section
from penchant.base.text import did_you_mean, repeated
from penchant.config import Places, RunConfig, apply_overrides, merge_settings, place_of
from penchant.config.several import Member, check_folders, read_output, read_section, read_values
from penchant.errors import ConfigError
from penchant.rewards.builtin import BUILT_IN, RewardConfig

KEYS = ("output", "defaults", "stages", "compare")
FULL_MODEL_KEYS = (("model", "path"), ("reference", "path"))  # an adapter there is merged first

_NAME = re.compile(r"[A-Za-z0-9_-]+")
_REFERENCE = re.compile(r"([A-Za-z0-9_-]+)(?:@(best|last|\d+))?")


@dataclass(frozen=True, slots=True)
class Ref:
    """``stage:NAME`` or ``stage:NAME@which`` in a value or as a key.

    Args:
        text: as written; stage: the stage's name; which: ``best``, ``last``, a step number, or None for the best checkpoint if one is
            tracked, else the last.
        path: the key path of the value; if the reference is itself a key, the path ends with it.
    """

    text: str
    stage: str
    which: str | None
    path: tuple[str, ...]

    @property
    def needs_full_model(self) -> bool:
        """Whether this key needs a whole model rather than an adapter."""
        return self.path in FULL_MODEL_KEYS


Resolve = Callable[[Ref], str]


@dataclass(frozen=True)
class Stage(Member):
    """One stage: the defaults merged with its own keys, references unresolved."""

    title: ClassVar[str] = "stages.{}"

    @cached_property
    def refs(self) -> tuple[Ref, ...]:
        """References to other stages, in file order."""
        with self.naming():
            return references(self.values)

    @property
    def learns_reward(self) -> bool:
        """Whether it trains a reward model."""
        return self.config.method.learns_reward

    @cached_property
    def config(self) -> RunConfig:
        """The validated config with unresolved references. It cannot be run."""
        return self.resolved(lambda ref: ref.text)

    def resolved(self, resolve: Resolve) -> RunConfig:
        """The config with every reference replaced by `resolve(reference)`."""
        return self.build_config(resolved(self.values, resolve))

    @property
    def upstream(self) -> tuple[str, ...]:
        """Names of the stages that it uses, without duplicates."""
        return tuple(dict.fromkeys(r.stage for r in self.refs))


class CompareConfig(Section):
    """The `compare` section."""

    models: list[str] = Field(description="stages; the first is what the others are compared with")
    reward: str | list[Any] | dict[str, Any] | None = Field(
        None, description="any reward; stage:NAME for a trained one"
    )
    also: list[str] = Field([], description="other rewards, whose figures stand beside its own")
    prompts: int = Field(200, ge=1, description="held-out prompts of the first stage that has some")
    max_new_tokens: int = Field(64, ge=1, description="tokens of a completion")
    samples: int = Field(1, ge=1, description="completions of each prompt")
    seed: int = Field(0, ge=0, lt=2**31, description="of sampling")

    @field_validator("models")
    @classmethod
    def _check_models(cls, models: list[str]) -> list[str]:
        if duplicates := sorted(repeated(models)):
            raise ValueError(f"{', '.join(duplicates)} is listed twice")
        if len(models) < 2:
            raise ValueError("name at least two stages, the one to compare with first")
        return models

    @field_validator("reward")
    @classmethod
    def _check_reward(cls, reward: Any) -> Any:
        try:
            RewardConfig.model_validate(reward if reward is not None else "words")
        except ValidationError as error:  # report it now, not after all stages have trained
            first = error.errors()[0]
            raise ValueError(
                ": ".join([*map(str, first["loc"]), first["msg"].removeprefix("Value error, ")])
            ) from error
        return reward

    @model_validator(mode="after")
    def _check_also(self) -> CompareConfig:
        duplicates = sorted({n for n in self.also if self.also.count(n) > 1 or n == self.reward})
        if duplicates:
            raise ValueError(f"also names {', '.join(duplicates)} twice, or as reward too; leave it out of also")
        if self.also and self.reward is None:
            raise ValueError("also is set without a reward; name the first one as compare.reward")
        return self


@dataclass(frozen=True, slots=True)
class Comparison:
    """The comparison at the end: its settings, its models, and the stages that its rewards use."""

    config: CompareConfig
    models: tuple[Ref, ...]
    reward_refs: tuple[Ref, ...]
    place: str

    def reward(self, resolve: Resolve) -> Any:
        """The reward with its references replaced."""
        return resolved({"reward": self.config.reward}, resolve)["reward"]

    def also(self, resolve: Resolve) -> dict[str, str]:
        """``{other reward as written: the same with its references replaced}``."""
        return dict(zip(self.config.also, resolved({"also": self.config.also}, resolve)["also"], strict=True))

    @property
    def upstream(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(r.stage for r in (*self.models, *self.reward_refs)))


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A whole pipeline, checked as far as possible without data and models."""

    source: str
    output: Path
    stages: dict[str, Stage]
    compare: Comparison | None

    def downstream(self, names: Sequence[str]) -> list[str]:
        """The stages `names` and every stage that uses one of them, directly or indirectly, in order."""
        return [n for n in self.stages if {n, *_all_upstream(n, self.stages)} & set(names)]

    def needed(self, name: str) -> list[str]:
        """Every stage that `name` uses, directly or indirectly, in order."""
        upstream = _all_upstream(name, self.stages)
        return [n for n in self.stages if n in upstream]

    def stage(self, name: str, where: str) -> Stage:
        """Look up a stage by name. Raises ConfigError at `where` if there is none."""
        if name not in self.stages:
            raise ConfigError(where, f"there is no stage {name!r}", did_you_mean(name, self.stages))
        return self.stages[name]


def load_pipeline(definition: Mapping[str, Any] | str | Path, overrides: Sequence[str] = ()) -> Pipeline:
    """Read a pipeline from a YAML file or a mapping, and apply ``stages.NAME.key=value`` overrides.

    Raises:
        ConfigError: with ``file:line: what, how to fix``. Every stage's config is checked.
        CheckpointError, DiskError: a folder cannot be used.
    """
    values, places, source = read_values(definition, "pipeline")
    names = list(values["stages"]) if isinstance(values.get("stages"), dict) else []
    places = apply_overrides(values, places, overrides)
    folder = read_output(values, KEYS, places, source, "pipeline", '"defaults" or a stage: defaults')
    stages, defaults = (_section(values, name, places, source) for name in ("stages", "defaults"))
    if not stages:
        raise ConfigError(source, "there are no stages", "add some: stages: {sft: {loss: sft}, ...}")
    for name in stages:
        if name not in names:
            raise ConfigError("command line", f"there is no stage {name!r}", did_you_mean(name, names))
    members = {name: _stage(name, stages, defaults, places, source, folder) for name in stages}
    for stage in members.values():
        _check_references(stage, members)
    for stage in members.values():
        _ = stage.config  # check every stage before anything trains
    for stage in members.values():
        _check_kinds(stage, members)
        check_bare_names(
            stage.values.get("reward"),
            members,
            place_of(("reward",), stage.places, stage.place),
            f"stages.{stage.name}: reward",
        )
    comparison = _comparison(values, members, places, source)
    check_folders(folder, members.values())
    return Pipeline(source, folder, members, comparison)


def _section(values: Mapping[str, Any], name: str, places: Places, source: str) -> dict[str, Any]:
    section = values.get(name)
    if section is not None and not isinstance(section, dict):
        raise ConfigError(place_of((name,), places, source), f"{name} is {section!r}", "indent its keys below it")
    return section or {}


def _stage(
    name: str, stages: Mapping[str, Any], defaults: dict[str, Any], places: Places, source: str, folder: Path
) -> Stage:
    place = place_of(("stages", name), places, source)
    if not _NAME.fullmatch(name):
        raise ConfigError(place, f"stages.{name}: not a name", "use letters, digits, _ and -")
    settings = {} if stages[name] is None else stages[name]
    if not isinstance(settings, dict):
        raise ConfigError(place, f"stages.{name} is {settings!r}", "it is a section: indent its keys below it")
    for path, section in ((("stages", name), settings), (("defaults",), defaults)):
        if "output" in section:
            how = "leave it out: a stage's folder is the pipeline's output and its name"
            raise ConfigError(place_of((*path, "output"), places, source), f"{'.'.join(path)}.output is set", how)
    values = merge_settings(defaults, settings)
    own_places = {p[1:]: w for p, w in places.items() if p[0] == "defaults" and p[1:]}
    own_places |= {p[2:]: w for p, w in places.items() if p[:2] == ("stages", name) and p[2:]}
    return Stage(name, values, own_places, place, folder / name)


# ---- References ----


def references(values: Any, path: tuple[str, ...] = ()) -> tuple[Ref, ...]:
    """Every ``stage:...`` in values and keys, in file order.

    Raises:
        ConfigError: a reference is malformed; `where` is its key path.
    """
    refs: list[Ref] = []

    def collect(ref: Ref) -> str:
        refs.append(ref)
        return ref.text

    resolved(values, collect, path)
    return tuple(refs)


def parse_reference(text: str, path: tuple[str, ...]) -> Ref:
    """Parse ``stage:NAME[@best|@last|@STEP]``."""
    match = _REFERENCE.fullmatch(text.removeprefix("stage:"))
    if match is None:
        how = "write stage:NAME, or stage:NAME@best, @last, @STEP"
        raise ConfigError(".".join(path), f"{text!r} is not a reference to a stage", how)
    return Ref(text, match[1], match[2], path)


def resolved(values: Any, resolve: Resolve, path: tuple[str, ...] = ()) -> Any:
    """Copy `values` with every reference replaced, in keys too."""
    if isinstance(values, dict):
        copy = {}
        for key, value in values.items():
            new_key = resolve(parse_reference(key, (*path, key))) if key.startswith("stage:") else key
            copy[new_key] = resolved(value, resolve, (*path, key))
        return copy
    if isinstance(values, list):
        return [resolved(value, resolve, (*path, str(i))) for i, value in enumerate(values)]
    if isinstance(values, str) and values.startswith("stage:"):
        return resolve(parse_reference(values, path))
    return values


def _check_references(stage: Stage, stages: Mapping[str, Stage]) -> None:
    order = list(stages)
    for ref in stage.refs:
        where = place_of(ref.path, stage.places, stage.place)
        if ref.stage not in stages:
            what = f"stages.{stage.name}: there is no stage {ref.stage!r}"
            raise ConfigError(where, what, did_you_mean(ref.stage, order))
        if ref.stage == stage.name:
            raise ConfigError(where, f"stages.{stage.name}: it refers to itself", "name a stage that stands before it")
        if order.index(ref.stage) > order.index(stage.name):
            if stage.name in _all_upstream(ref.stage, stages):
                what = f"stages.{stage.name} and stages.{ref.stage} need each other: a cycle"
                raise ConfigError(where, what, "take one of the references out")
            what = f"stages.{stage.name}: it needs {ref.stage!r}, which stands after it"
            raise ConfigError(where, what, f"write {ref.stage} before {stage.name}")


def _check_kinds(stage: Stage, stages: Mapping[str, Stage]) -> None:
    """Check that rewards refer to reward models, that no policy starts from one, and that adapters come from stages that train one."""
    for ref in stage.refs:
        where = place_of(ref.path, stage.places, stage.place)
        if ref.path[0] == "reward" or ref.path[:2] == ("evaluation", "reward"):
            key = "evaluation.reward" if ref.path[0] == "evaluation" else "reward"
            check_reward_model(ref, stages, where, f"stages.{stage.name}: {key}")
        elif ref.path in FULL_MODEL_KEYS and stages[ref.stage].learns_reward and not stage.learns_reward:
            raise ConfigError(
                where,
                f"stages.{stage.name}: {'.'.join(ref.path)} is {ref.text}, a reward model, which writes nothing",
                "name a stage that trains a language model; a reward model serves as reward, or as the start of another one",
            )
        elif ref.path == ("model", "adapter"):
            config = stages[ref.stage].config
            if (config.lora is None and config.model.adapter is None) or config.method.learns_reward:
                what = f"stages.{stage.name}: model.adapter is {ref.text}, which trains no adapter of a language model"
                raise ConfigError(where, what, "name it as model.path, or give that stage a lora section")


def check_reward_model(ref: Ref, stages: Mapping[str, Stage], where: str, what: str) -> None:
    """Raise ConfigError if a reward refers to a stage that trains no reward model."""
    if not stages[ref.stage].learns_reward:
        names = [name for name, other in stages.items() if other.learns_reward]
        hint = f"there is stage:{', stage:'.join(names)}" if names else "add one: {algorithm: {name: reward_model}}"
        raise ConfigError(where, f"{what} is {ref.text}, which trains no reward model", hint)


def check_bare_names(reward: Any, stages: Mapping[str, Stage], where: str, what: str) -> None:
    """Raise ConfigError if a reward is a stage's bare name without ``stage:``."""
    items = reward if isinstance(reward, list) else [reward or ()]
    for name in (n for item in items for n in ([item] if isinstance(item, str) else item)):
        if name in stages and name not in BUILT_IN and not Path(name).exists():
            raise ConfigError(where, f"{what} is {name!r}, a stage's bare name", f"write stage:{name}")


def _all_upstream(name: str, stages: Mapping[str, Stage]) -> set[str]:
    """Every stage that `name` needs, directly or indirectly. Unknown names are skipped."""
    upstream: set[str] = set()
    pending = [name]
    while pending:
        for other in stages[pending.pop()].upstream:
            if other in stages and other not in upstream:
                upstream.add(other)
                pending.append(other)
    return upstream


# ---- The comparison ----


def _comparison(
    values: Mapping[str, Any], stages: Mapping[str, Stage], places: Places, source: str
) -> Comparison | None:
    if values.get("compare") is None:
        return None
    place = place_of(("compare",), places, source)
    config = read_section(CompareConfig, "compare", values, places, source)
    try:
        models = tuple(
            parse_reference("stage:" + m.removeprefix("stage:"), ("compare", "models", str(i)))
            for i, m in enumerate(config.models)
        )
        reward_settings = {"reward": config.reward, "also": config.also}
        refs = references(reward_settings, ("compare",))
    except ConfigError as error:
        what, how = f"{error.where} {error.what}", error.how
        raise ConfigError(place_of(tuple(error.where.split(".")), places, source), what, how) from error
    for ref in (*models, *refs):
        where = place_of(ref.path, places, place)
        if ref.stage not in stages:
            raise ConfigError(where, f"compare: there is no stage {ref.stage!r}", did_you_mean(ref.stage, stages))
    for rewards, key in ((config.reward, "reward"), (config.also, "also")):
        check_bare_names(rewards, stages, place_of(("compare", key), places, place), f"compare.{key}")
    for ref in refs:
        check_reward_model(ref, stages, place_of(ref.path, places, place), f"compare.{ref.path[1]}")
    for ref in models:
        if stages[ref.stage].learns_reward:
            what = f"compare.models: {ref.stage} is a reward model, which writes nothing"
            raise ConfigError(place_of(ref.path, places, place), what, "leave it out; it can be compare.reward")
    return Comparison(config, models, refs, place)
