"""The `loss` section of a config: a loss by name with its typed hyperparameters, schedules, mixes, modifiers."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from penchant.base.functions import is_own, own_file
from penchant.base.section import Section
from penchant.base.text import closest, did_you_mean
from penchant.errors import ConfigError
from penchant.losses import LOSSES, LossSpec
from penchant.losses.own import find_loss
from penchant.losses.schedules import Schedule

Path = tuple[str, ...]

# names in other tools
OTHER_NAMES = {
    "sigmoid": "dpo",
    "cdpo": "dpo",
    "sigmoid_norm": "dpo",
    "robust": "rdpo",
    "exo_pair": "exo",
    "nca_pair": "nca",
    "sppo_hard": "sppo",
    "kto_pair": "kto",
    "bco_pair": "bco",
    "alphapo": "alpha_po",
    "apo": "apo_zero",
    "aot_pair": "aot",
    "length_dpo": "r_dpo",
    "dpo_positive": "dpop",
    "smaug": "dpop",
    "chipo": "chi_po",
    "listwise": "plackett_luce",
    "pl": "plackett_luce",
    "list_mle": "plackett_luce",
    "lipo_lambda": "lipo",
}
OTHER_KEYS = {
    "simpo_gamma": "gamma",
    "cpo_alpha": "alpha",
    "rpo_alpha": "alpha",
    "ld_alpha": "alpha",
    "discopop_tau": "tau",
    "f_divergence_type": "divergence",
    "f_alpha_divergence_coef": "alpha",
    "gamma_beta_ratio": "gamma",
}


class LossProblem(Exception):
    """Pydantic's errors in a part of the `loss` section, with that part's path and known keys."""

    def __init__(self, path: Path, name: str, keys: Path, error: ValidationError) -> None:
        super().__init__(str(error))
        self.path, self.name, self.keys, self.error = path, name, keys, error

    def suggestion(self, word: str) -> str:
        """A suggestion for a mistyped key."""
        renamed = OTHER_KEYS.get(word, "")
        match = renamed if renamed in self.keys else closest(word, self.keys)
        hint = f'did you mean "{match}"?' if match else f"there are {', '.join(self.keys) or 'none'}"
        return f"{hint} (`penchant losses {self.name}` tells more)"


@contextlib.contextmanager
def _locate_errors(path: Path, name: str, keys: Path) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        raise LossProblem(path, name, keys, error) from error


def loss_name(loss: Any, path: Path = ("loss", "name")) -> str:
    """The registry's name of a loss as the user wrote it; for a user's own loss, its absolute path and function."""
    where = ".".join(path)
    if not isinstance(loss, str):
        what = "is missing" if loss is None else f"is {loss!r}"
        hint = "; several losses go into loss.mix" if isinstance(loss, list) else ""
        raise ConfigError(where, what, f"give the name of one loss, such as dpo{hint}")
    if is_own(loss):
        find_loss(loss, where)
        return f"{own_file(loss).resolve()}:{loss.rpartition(':')[2]}"
    name = loss if loss in LOSSES else loss.lower().replace("-", "_")
    if name not in LOSSES:
        if loss.endswith(".py"):
            raise ConfigError(where, f"{loss} names no function", f"write {loss}:NAME")
        registry_name = OTHER_NAMES.get(name)
        hint = f"it is called {registry_name} here" if registry_name else did_you_mean(name, sorted(LOSSES))
        raise ConfigError(where, f"{loss!r} is not a loss", hint)
    return name


class LossModifiers(Section):
    """Modifiers that any loss can be combined with."""

    nll_weight: float = Field(
        0.0, ge=0, description="weight of an added negative log-likelihood of the chosen answers, averaged over tokens"
    )
    average_log_prob: bool = Field(False, description="give the loss mean log-probs per token instead of sums")


class ComponentConfig(BaseModel):
    """A loss by name, with its own typed hyperparameters, some of which may follow a schedule."""

    model_config = {"frozen": True}
    name: str
    params: Any
    schedules: dict[str, Any] = Field(default_factory=dict)
    weight: float = 1.0

    @property
    def spec(self) -> LossSpec:
        """The loss, from the registry or from a file."""
        return find_loss(self.name)

    @classmethod
    def from_mapping(cls, value: Mapping[str, Any], path: Path = ("loss",)) -> ComponentConfig:
        """Look the name up in the registry and validate the rest as its hyperparameters.

        A number may be given as ``{from: a, to: b, shape: linear}``; both ends must be in its range. `path` is that of
        the section, for messages.
        """
        rest = dict(value)
        name = loss_name(rest.pop("name", None), (*path, "name"))
        weight = rest.pop("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or weight < 0:
            raise ConfigError(".".join((*path, "weight")), f"is {weight!r}", "give a number of at least 0")
        spec = find_loss(name)
        params_type = spec.params
        names = {info.alias or field: field for field, info in params_type.model_fields.items()}
        fixed = next((key for key in rest if key not in names and key in inspect.signature(spec.fn).parameters), None)
        if fixed is not None:
            how = f"write def {spec.fn.__name__}(logps, *, {fixed}=...), with the asterisk"
            raise ConfigError(
                ".".join((*path, fixed)), "cannot be set, as the function does not take it by name alone", how
            )
        schedules: dict[str, Schedule] = {}
        for key, setting in rest.items():
            if isinstance(setting, Mapping) and key in names:
                with _locate_errors((*path, key), name, ("from", "to", "shape")):
                    schedules[key] = Schedule.model_validate(setting)
        with _locate_errors(path, name, tuple(names)):
            params_type.model_validate(rest | {k: s.end for k, s in schedules.items()})
            params = params_type.model_validate(rest | {k: s.start for k, s in schedules.items()})
        for key in schedules:
            if not isinstance(getattr(params, names[key]), float):
                what = "is not a number that could follow a schedule"
                raise ConfigError(".".join((*path, key)), what, "give one value")
        by_field, own_schedules = {names[key]: s for key, s in schedules.items()}, params.schedules()
        conflicts = [key for key in schedules if names[key] in own_schedules]
        if conflicts and "schedule" in params.model_fields_set:
            raise ConfigError(
                ".".join(path), f"has a schedule, and a from/to for {conflicts[0]}", "keep one of the two"
            )
        return cls(name=name, params=params, schedules=own_schedules | by_field, weight=float(weight))

    def to_mapping(self) -> dict[str, Any]:
        values = self.params.to_mapping()
        own_schedules = self.params.schedules()
        for field, schedule in self.schedules.items():
            if field not in own_schedules:
                alias = type(self.params).model_fields[field].alias or field
                values[alias] = schedule.model_dump(mode="json", by_alias=True)
        return {"name": self.name, **values}


class LossConfig(LossModifiers):
    """A loss, or a mix of several by weight, with modifiers."""

    components: tuple[ComponentConfig, ...]

    @property
    def name(self) -> str:
        """The first loss's name."""
        return self.components[0].name

    @property
    def params(self) -> Any:
        """The first loss's hyperparameters."""
        return self.components[0].params

    @classmethod
    def from_mapping(cls, value: Mapping[str, Any]) -> LossConfig:
        """From ``{name: dpo, beta: 0.1}`` or ``{mix: [{name: dpo, weight: 0.8}, {name: sft, weight: 0.2}]}``, and modifiers."""
        rest = dict(value)
        modifier_values = {k: rest.pop(k) for k in LossModifiers.model_fields if k in rest}
        with _locate_errors(("loss",), "dpo", tuple(LossModifiers.model_fields)):
            modifiers = LossModifiers.model_validate(modifier_values)
        mix = rest.pop("mix", None)
        if mix is None:
            if "weight" in rest:
                how = "lower train.lr, or list losses in loss.mix"
                raise ConfigError("loss.weight", "is set, but a single loss has no weight", how)
            rest.setdefault("name", "dpo")
            components: tuple[ComponentConfig, ...] = (ComponentConfig.from_mapping(rest),)
        else:
            if rest:
                how = "put it into the entry of mix that it is for"
                raise ConfigError("loss", f"has {', '.join(rest)} beside mix", how)
            if not isinstance(mix, list) or not mix or not all(isinstance(m, Mapping) for m in mix):
                how = "write [{name: dpo, weight: 0.8}, {name: sft, weight: 0.2}]"
                raise ConfigError("loss.mix", "is not a list of losses", how)
            components = tuple(ComponentConfig.from_mapping(m, ("loss", "mix", str(i))) for i, m in enumerate(mix))
            if not any(c.weight for c in components):
                raise ConfigError("loss.mix", "counts for nothing: all weights are 0", "give one of them a weight")
        config = cls(components=components, **modifiers.model_dump())
        config._check()
        return config

    def _check(self) -> None:
        specs = [c.spec for c in self.components]
        names = [s.name for s in specs]
        if len(set(names)) < len(names):
            raise ConfigError("loss.mix", "has a loss that is listed twice", "keep one, or change its weight")
        if len({"lists"} | (signals := {s.signal for s in specs} - {"tokens"})) == len(signals) > 1:
            what = "has a loss on lists of answers beside one on " + " and ".join(sorted(signals - {"lists"}))
            raise ConfigError("loss.mix", what, "keep one kind; plackett_luce takes pairs too")
        if sum("divergence" in s.needs for s in specs) > 1:
            raise ConfigError("loss.mix", "has two losses with a divergence of their own", "keep one")
        if self.average_log_prob:
            for s in specs:
                if s.uses_lengths:
                    what = f"is set, but {s.name} already uses lengths itself"
                    raise ConfigError("loss.average_log_prob", what, "leave average_log_prob out")

    def to_mapping(self) -> dict[str, Any]:
        modifiers = self.model_dump(include=set(LossModifiers.model_fields))
        if len(self.components) == 1:
            return {**self.components[0].to_mapping(), **modifiers}
        return {"mix": [{**c.to_mapping(), "weight": c.weight} for c in self.components], **modifiers}
