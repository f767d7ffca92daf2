"""One typed config: the sections of every layer, read from YAML with line numbers, unknown keys refused with a suggestion."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, Field, ValidationError, field_serializer, field_validator, model_validator
from pydantic.fields import FieldInfo

from penchant.algorithms import ALGORITHMS, AlgorithmConfig, Method, find_algorithm
from penchant.algorithms.offline import Losses
from penchant.base.functions import is_own, own_sha256
from penchant.base.section import Section
from penchant.base.text import closest
from penchant.data.options import DataConfig
from penchant.errors import ConfigError
from penchant.losses.section import LossConfig, LossModifiers, LossProblem
from penchant.metrics.flags.rule import TrustConfig
from penchant.models.options import LoraConfig, ModelConfig, ReferenceConfig
from penchant.rewards.builtin import BUILT_IN, RULES, RewardConfig
from penchant.training.options import CheckpointConfig, EvalConfig, LoggingConfig, TrainConfig

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

WATCHING_ONLY = ("output", "logging", "trust")  # sections that change nothing in what a run computes


class EvaluationConfig(EvalConfig):
    """The `evaluation` section, with what judges the sampled completions."""

    reward: RewardConfig | None = Field(
        None,
        description="any reward: it judges the completions of the kl_prompts prompts (eval/reward, and eval/win_rate against the start)",
    )

    @model_validator(mode="after")
    def _something_to_judge(self) -> EvaluationConfig:
        if self.reward is not None and self.kl_prompts == 0:
            raise ValueError(
                "reward judges the completions of kl_prompts held-out prompts, and kl_prompts is 0; raise it"
            )
        return self


class RunConfig(Section):
    """Everything that a run is made of."""

    model: ModelConfig
    data: DataConfig
    lora: LoraConfig | None = None
    loss: LossConfig = Field(default_factory=lambda: LossConfig.from_mapping({"name": "dpo"}))
    algorithm: AlgorithmConfig | None = None
    reward: RewardConfig | None = Field(
        None,
        description="for an online method: sentiment, words:20-60, matches:REGEX, path.py:function, a reward model's folder, or a mapping from these to weights",
    )
    reference: ReferenceConfig = ReferenceConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    trust: TrustConfig = TrustConfig()
    output: str = Field(description="the run's folder")

    @model_validator(mode="before")
    @classmethod
    def _reference_of_the_loss(cls, values: Any) -> Any:
        """PMPO's own name for a reference that follows the policy: loss.ref_ema is reference.ema."""
        loss = values.get("loss") if isinstance(values, dict) else None
        if not isinstance(loss, Mapping) or "ref_ema" not in loss:
            return values
        reference = dict(values.get("reference") or {})
        if "ema" in reference:
            raise ConfigError("loss.ref_ema", "reference.ema is set too", "keep one")
        ema = loss["ref_ema"]
        return {
            **values,
            "loss": {k: v for k, v in loss.items() if k != "ref_ema"},
            "reference": {**reference, "ema": ema} if ema is not None else reference,
        }

    @field_validator("algorithm", mode="before")
    @classmethod
    def _each_has_its_own(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"name": value}
        if isinstance(value, Mapping):
            if not isinstance(value.get("name"), str):
                raise ValueError(f"name is missing; give one of {', '.join(ALGORITHMS)}, or path.py:Class")
            return find_algorithm(value["name"]).model_validate(value)
        return value

    @field_serializer("algorithm")
    def _algorithm_by_alias(self, value: Section | None) -> dict[str, Any] | None:
        return None if value is None else value.model_dump(mode="json", by_alias=True)

    @model_validator(mode="after")
    def _online_or_offline(self) -> RunConfig:
        if self.algorithm is None and self.reward is not None:
            raise ValueError("reward is set without an algorithm; add algorithm.name (rloo, grpo, online_dpo, ppo)")
        if self.algorithm is not None and self.reward is not None and not self.algorithm.takes_reward:
            why = "learns a reward from pairs and" if self.algorithm.learns_reward else "has no completions judged and"
            raise ValueError(f"{self.algorithm.name} {why} takes none; leave out reward")
        if self.algorithm is not None and self.reward is None and self.algorithm.takes_reward:
            raise ValueError(
                "algorithm needs a reward; set reward to sentiment, words, path.py:function or a reward model's folder"
            )
        if self.algorithm is not None and self.evaluation.reward is not None:
            raise ValueError(
                "evaluation.reward judges offline methods; an online method is judged by its own reward, and a reward model writes nothing; "
                "leave it out, and use compare for other rewards"
            )
        if self.algorithm is not None and "loss" in self.model_fields_set and self.loss.name != "dpo":
            raise ValueError("loss and algorithm are both set; keep one")
        return self

    @property
    def method(self) -> Method:
        """What trains: the algorithm, or the losses where there is none."""
        return Losses(self.loss) if self.algorithm is None else self.algorithm

    def own_contents(self) -> dict[str, str]:
        """SHA-256 of each file of a user's own loss or algorithm, by its name."""
        sha256 = None if self.algorithm is None else own_sha256(self.algorithm.name)
        return self.loss.contents() | ({} if sha256 is None else {self.method.name: sha256})

    @field_validator("loss", mode="before")
    @classmethod
    def _loss_by_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"name": value}
        return LossConfig.from_mapping(value) if isinstance(value, Mapping) else value

    @field_serializer("loss")
    def _loss_as_mapping(self, value: LossConfig) -> dict[str, Any]:
        return value.to_mapping()


# ---------------------------------------------------------------------------------------------------------------------
# YAML

Places = dict[tuple[str, ...], str]  # where a key stands: "file:line"
BY_NAME = ("loss", "algorithm")  # sections that may be written as a name alone


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars: 1e-5 is a number, yes and on are words; duplicate keys are refused."""


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, rx)
        for tag, rx in rules
        if tag
        not in (
            "tag:yaml.org,2002:float",
            "tag:yaml.org,2002:bool",
            "tag:yaml.org,2002:int",
            "tag:yaml.org,2002:timestamp",
        )
    ]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\d+\.\d*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?\d+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def _construct_int(_loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(node.value)  # YAML 1.1 reads 010 as eight


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


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


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML config and apply ``key.path=value`` overrides.

    Raises:
        ConfigError: with ``file:line: what, how to fix`` for every problem found.
    """
    return load_config_with_places(path, overrides)[0]


def load_config_with_places(path: str | Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, Places]:
    """The same, and where each key that was set stands: ``{key path: "file:line" or "command line"}``."""
    values, places = read_mapping(path, "a config is a mapping with model, data and output; see recipes/")
    places = apply_overrides(values, places, overrides)
    return build(values, places, str(path)), places


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
        near = closest(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        raise ConfigError(
            str(path), "no such file", f"did you mean {near}?" if near else "give the path of a YAML config"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"cannot be read ({error})", "give a UTF-8 YAML file") from error
    values, places = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        what = "is empty" if values is None else f"holds a {type(values).__name__} at the top"
        raise ConfigError(str(path), what, shape)
    return values, places


def config_from_mapping(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """The same from a mapping, for Python callers."""
    plain = plain_values(values)
    return build(plain, apply_overrides(plain, {}, overrides), "config")


def plain_values(value: Any) -> Any:
    """Nested mappings as dicts with text keys, paths as text: what a YAML file would have given."""
    if isinstance(value, Mapping):
        return {str(k): plain_values(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_values(v) for v in value]
    return str(value) if isinstance(value, Path) else value


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
            raise ConfigError(
                where, f"{'.'.join(path[: i + 1])} is a value, not a section", f"cannot set {'.'.join(path)}"
            )
    if path[-2:] == ("loss", "name") and at.get("name", "dpo") != value:
        # another loss starts from its own defaults: a beta that was meant for the file's loss is not meant for it
        given = {p[-1] for p, place in places.items() if p[:-1] == path[:-1] and place == "command line"}
        for key_of_file in [k for k in at if k not in {*LossModifiers.model_fields, *given}]:
            del at[key_of_file]
    at[path[-1]] = value
    return {p: place for p, place in places.items() if p[: len(path)] != path} | {path: where}


def build(values: dict[str, Any], places: Places, source: str) -> RunConfig:
    """A validated config.

    Args:
        places: ``{key path: "file:line"}`` for messages; source: where a key stands that has no place of its own.
    """
    values = _own_files_found(values, places, source)
    _check_loss(values, places, source)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise explain_all(error, (), places, source) from error
    except ConfigError as error:
        raise _with_place(error, places, source) from error


def explain_all(
    error: ValidationError,
    prefix: tuple[str, ...],
    places: Places,
    source: str,
    suggest: Callable[[str], str] | None = None,
) -> ConfigError:
    """A section's pydantic errors as sentences; `prefix` is where the section stands, `suggest` answers an unknown key."""
    found = [_explain({**e, "loc": (*prefix, *e["loc"])}, places, source, suggest) for e in error.errors()]
    return _all_of(_merge(found))


def _all_of(problems: Sequence[ConfigError]) -> ConfigError:
    first = problems[0]
    more = "".join(f"\n{p.where}: {p.what}" + (f"; {p.how}" if p.how else "") for p in problems[1:])
    return ConfigError(first.where, first.what, first.how + more)


def _own_files_found(values: dict[str, Any], places: Places, source: str) -> dict[str, Any]:
    """The same with the user's own losses and layout looked for beside the config that names them, then in the working folder."""

    def found(name: Any, path: tuple[str, ...]) -> Any:
        if not isinstance(name, str) or not is_own(name):
            return name
        file, _, function = name.rpartition(":")
        beside = Path(place_of(path, places, source).rpartition(":")[0]).parent / file
        there = beside if beside.is_file() else Path(file).expanduser()
        return f"{there.resolve()}:{function}" if there.is_file() else name

    def section(value: Any, path: tuple[str, ...]) -> Any:
        if isinstance(value, str):
            return found(value, path)
        if not isinstance(value, Mapping):
            return value
        made = {**value, "name": found(value["name"], (*path, "name"))} if "name" in value else dict(value)
        if isinstance(made.get("mix"), list):
            made["mix"] = [section(m, (*path, "mix", str(i))) for i, m in enumerate(made["mix"])]
        return made

    data = values.get("data")
    if isinstance(data, Mapping) and "shape" in data:
        values = {**values, "data": {**data, "shape": found(data["shape"], ("data", "shape"))}}
    return {k: section(v, (k,)) if k in BY_NAME else v for k, v in values.items()}


def _check_loss(values: Mapping[str, Any], places: Places, source: str) -> None:
    """The loss section by itself: its errors have places of their own, in schedules and in the entries of a mix."""
    loss = values.get("loss")
    if isinstance(loss, list):
        raise _with_place(ConfigError("loss", "is a list", "write one loss, or loss: {mix: [...]}"), places, source)
    if not isinstance(loss, (str, Mapping)):
        return
    section = {"name": loss} if isinstance(loss, str) else {k: v for k, v in loss.items() if k != "ref_ema"}
    try:
        LossConfig.from_mapping(section)
    except LossProblem as problem:
        raise explain_all(problem.error, problem.path, places, source, problem.suggestion) from problem
    except ConfigError as error:
        raise _with_place(error, places, source) from error


def _with_place(error: ConfigError, places: Mapping[tuple[str, ...], str], source: str) -> ConfigError:
    """The same error at ``file:line`` where it names a key of the config."""
    path = tuple(error.where.split("."))
    if path[0] not in RunConfig.model_fields:
        return error
    return ConfigError(place_of(path, places, source), f"{error.where} {error.what}", error.how)


def place_of(path: tuple[str, ...], places: Mapping[tuple[str, ...], str], source: str) -> str:
    """Where the key, or the nearest section around it, stands."""
    return next((places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in places), source)


def _merge(problems: list[ConfigError]) -> list[ConfigError]:
    """One problem a value: a union of types reports each of its members."""
    merged: dict[tuple[str, str], ConfigError] = {}
    for p in problems:
        key = (p.where, p.what)
        if key in merged:
            p = ConfigError(p.where, p.what, f"{merged[key].how} or {p.how.removeprefix('give ')}")
        merged[key] = p
    return list(merged.values())


def _explain(
    error: Any,
    places: Mapping[tuple[str, ...], str],
    source: str,
    suggest: Callable[[str], str] | None = None,
) -> ConfigError:
    """One pydantic error as a sentence a person can act on."""
    path = tuple(
        str(p)
        for p in error["loc"]
        if str(p) not in ("float", "int", "str", "bool") and not str(p).startswith(("literal[", "list[", "function"))
    )
    where = place_of(path, places, source)
    dotted = ".".join(path)
    kind, value = error["type"], error.get("input")
    if kind == "extra_forbidden":
        section = ".".join(path[:-1]) or "the top level"
        hint = _suggest_key(path) if suggest is None else suggest(path[-1])
        return ConfigError(where, f'unknown key "{path[-1]}" in {section}', hint)
    if kind == "missing":
        return ConfigError(where, f"{dotted} is missing", f"add it: {_description(path)}")
    if kind in ("model_type", "dict_type"):
        return ConfigError(where, f"{dotted} is {value!r}", "it is a section: indent its keys below it")
    if isinstance(value, bool):
        return ConfigError(where, f"{dotted} is {str(value).lower()} (a boolean)", f"give {_wanted(error, path)}")
    if kind == "value_error":
        problem = str(error["msg"]).removeprefix("Value error, ")
        return ConfigError(where, f"{dotted}: {problem}" if dotted else problem)
    shown = repr(value) if not isinstance(value, (dict, list)) else f"a {type(value).__name__}"
    return ConfigError(where, f"{dotted} is {shown}", f"give {_wanted(error, path)}")


def _sections(info: FieldInfo) -> list[type[BaseModel]]:
    """The forms that a section has; none where the field is a value."""
    kinds = (info.annotation, *getattr(info.annotation, "__args__", ()))
    found = [k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)]
    return list(dict.fromkeys(ALGORITHMS.values())) if AlgorithmConfig in found else list(found)


def _fields_of(path: tuple[str, ...]) -> dict[str, FieldInfo]:
    """The keys of the section that a key path lies in; of all of them, where a section has several forms."""
    sections: list[Any] = [RunConfig]
    for part in path[:-1]:
        infos = [s.model_fields[part] for s in sections if part != "loss" and part in s.model_fields]
        sections = [section for info in infos for section in _sections(info)]
    return {name: info for s in reversed(sections) for name, info in s.model_fields.items()}


def _description(path: tuple[str, ...]) -> str:
    info = _fields_of(path).get(path[-1])
    return (info.description if info is not None else None) or "see recipes/ for an example"


def _wanted(error: Any, path: tuple[str, ...]) -> str:
    message = str(error["msg"])
    kind = error["type"]
    if kind.startswith(("float", "finite")):
        return "a number such as 5e-6"
    if kind.startswith("int"):
        return "a whole number"
    if kind.startswith("string"):
        return f"text ({_description(path)})"
    if kind.startswith("bool"):
        return "true or false"
    if kind.startswith(("greater", "less")):
        return "a number " + message.removeprefix("Input should be ")
    return message.removeprefix("Input should be ")


def _suggest_key(path: tuple[str, ...]) -> str:
    word = path[-1]
    if word in SYNONYMS:
        return f'did you mean "{SYNONYMS[word]}"?'
    names = list(_fields_of(path))
    if near := closest(word, names):
        return f'did you mean "{near}"?'
    for name, info in RunConfig.model_fields.items():
        inner = _sections(info)
        if inner and word in inner[0].model_fields:
            return f'did you mean "{name}.{word}"?'
    return f"there are {', '.join(sorted(names))}"


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The same config with every local file and folder as an absolute path, so that a run can be read from anywhere."""

    def absolute(path: Any) -> Any:
        if isinstance(path, list):
            return [absolute(p) for p in path]
        return str(Path(path).expanduser().resolve()) if path is not None and Path(path).expanduser().exists() else path

    def section(value: Any, *names: str) -> Any:
        return value.model_copy(update={n: absolute(getattr(value, n)) for n in names})

    def absolute_reward(name: str) -> str:
        path, colon, function = name.rpartition(":")
        if name in BUILT_IN or name.partition(":")[0] in RULES:
            return name
        return f"{absolute(path)}:{function}" if colon else str(absolute(name))

    def rewards(reward: RewardConfig | None) -> RewardConfig | None:
        if reward is None:
            return None
        terms = {absolute_reward(name): weight for name, weight in reward.terms.items()}
        return reward.model_copy(update={"terms": terms})

    return config.model_copy(
        update={
            "model": section(config.model, "path", "tokenizer"),
            "data": section(config.data, "path", "eval_path"),
            "reference": section(config.reference, "path"),
            "reward": rewards(config.reward),
            "evaluation": config.evaluation.model_copy(update={"reward": rewards(config.evaluation.reward)}),
            "output": str(Path(config.output).expanduser().resolve()),
        }
    )


def default_settings() -> dict[str, Any]:
    """Every setting's default, in the shape of a resolved config; required ones are left out."""
    defaults: dict[str, Any] = {"loss": LossModifiers().model_dump(), "algorithm": None, "reward": None, "lora": None}
    for name, info in RunConfig.model_fields.items():
        section = info.annotation
        if isinstance(section, type) and issubclass(section, Section):
            fields = section.model_fields.items()
            defaults[name] = {f: i.get_default(call_default_factory=True) for f, i in fields if not i.is_required()}
    return defaults


def dump_config(config: RunConfig) -> str:
    """YAML that loads back to an equal config, every default spelled out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


WHOLE = ("loss", "algorithm", "reward")  # a method's own settings mean nothing to another method


OF_A_MODEL = ("revision", "init", "tokenizer")  # what belongs to model.path goes with it


HOLD_OUT = ("eval_path", "validation_rows", "validation_fraction")


def merged(defaults: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's values: `defaults`, with the stage's `own` keys over them, section by section.

    `loss`, `algorithm` and `reward` are taken whole; a stage with one of loss and algorithm does not inherit the other, and a
    stage without an algorithm inherits no reward. A stage with a model.path of its own inherits none of what belongs to another
    model (revision, init, tokenizer), and one that says how it holds out rows does not inherit another way.
    """
    result: dict[str, Any] = dict(defaults)
    for one, other in (("loss", "algorithm"), ("algorithm", "loss")):
        if own.get(one) is not None:
            result.pop(other, None)
    for key, value in own.items():
        base = defaults.get(key)
        if key in WHOLE or not (isinstance(base, dict) and isinstance(value, dict)):
            result[key] = value
            continue
        dropped: set[str] = set()
        if key == "model" and "path" in value:
            dropped |= set(OF_A_MODEL)
        if key == "data" and set(HOLD_OUT) & set(value):
            dropped |= set(HOLD_OUT)
        result[key] = {k: v for k, v in base.items() if k not in dropped} | value
    if result.get("algorithm") is None and "reward" not in own:
        result.pop("reward", None)
    return result
