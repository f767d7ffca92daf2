"""`RunConfig`, which combines the sections of all layers and rejects settings that contradict each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_serializer, field_validator, model_validator

from penchant.algorithms import ALGORITHMS, AlgorithmConfig, Method, find_algorithm
from penchant.algorithms.offline import Losses
from penchant.base.files import file_sha256
from penchant.base.functions import imported_sha256, is_own, own_file
from penchant.base.section import RECORDED, Section, refuse_idle
from penchant.data.options import DataConfig
from penchant.distributed.options import LaunchConfig
from penchant.errors import ConfigError
from penchant.flags.rule import TrustConfig
from penchant.losses.section import LossConfig, LossModifiers
from penchant.metrics.names import metric, unknown_metric
from penchant.models.options import LoraConfig, ModelConfig, ReferenceConfig
from penchant.rewards.builtin import RewardConfig, kind_of
from penchant.rollout.options import PLACES, RolloutConfig
from penchant.training.options import CheckpointConfig, EvalConfig, LoggingConfig, TrainConfig

LOSS_AND_ALGORITHM = "loss and algorithm are both set; keep one: an algorithm uses no loss of this section"
OBSERVING_SECTIONS = ("output", "logging", "trust", "launch")  # sections that do not affect what a run computes


class EvaluationConfig(EvalConfig):
    """When to evaluate, and what judges the sampled completions."""

    reward: RewardConfig | None = Field(
        None,
        description="any reward: it judges the completions of the kl_prompts prompts (eval/reward, and eval/win_rate against the start)",
    )

    @model_validator(mode="after")
    def _check_rewards(self) -> EvaluationConfig:
        if self.reward is not None and self.kl_prompts == 0:
            raise ValueError(
                "reward judges the completions of kl_prompts held-out prompts, and kl_prompts is 0; raise it"
            )
        return self


class RunConfig(Section):
    """The complete config of a run."""

    model: ModelConfig
    data: DataConfig
    lora: LoraConfig | None = None
    loss: LossConfig = Field(default_factory=lambda: LossConfig.from_mapping({"name": "dpo"}))
    algorithm: AlgorithmConfig | None = None
    reward: RewardConfig | None = Field(
        None,
        description="for an online method: one of docs/rewards.md by name, path.py:function, a reward model's folder, a list of these, or a mapping from these to weights",
    )
    rollout: RolloutConfig = RolloutConfig()
    reference: ReferenceConfig = ReferenceConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    trust: TrustConfig = TrustConfig()
    launch: LaunchConfig = LaunchConfig()
    output: str = Field(description="the run's folder")

    @model_validator(mode="before")
    @classmethod
    def _move_ref_ema(cls, values: Any) -> Any:
        """Accept loss.ref_ema, PMPO's own name for a reference that follows the policy, as reference.ema."""
        loss = values.get("loss") if isinstance(values, dict) else None
        if not isinstance(loss, Mapping) or "ref_ema" not in loss:
            return values
        reference = dict(values.get("reference") or {})
        if "ema" in reference:
            raise ConfigError("loss.ref_ema", "and reference.ema are both set", "keep one")
        ema = loss["ref_ema"]
        return {
            **values,
            "loss": {k: v for k, v in loss.items() if k != "ref_ema"},
            "reference": {**reference, "ema": ema} if ema is not None else reference,
        }

    @model_validator(mode="before")
    @classmethod
    def _move_teacher_path(cls, values: Any) -> Any:
        """Accept teacher.path as reference.path for gkd, whose reference is its teacher."""
        if not isinstance(values, dict) or "teacher" not in values:
            return values
        teacher, reference = values["teacher"], dict(values.get("reference") or {})
        path = teacher.get("path") if isinstance(teacher, Mapping) else teacher
        if not isinstance(path, str) or (isinstance(teacher, Mapping) and set(teacher) != {"path"}):
            raise ConfigError("teacher", "is not a model", "write teacher: {path: FOLDER}")
        algorithm = values.get("algorithm")
        if (algorithm.get("name") if isinstance(algorithm, Mapping) else algorithm) != "gkd":
            raise ConfigError("teacher", "is only for algorithm gkd", "set algorithm=gkd, or leave it out")
        if reference.get("path", path) != path:
            raise ConfigError("teacher.path", "and reference.path are both set", "keep one")
        return {n: v for n, v in values.items() if n != "teacher"} | {"reference": {**reference, "path": path}}

    @field_validator("algorithm", mode="before")
    @classmethod
    def _parse_algorithm(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"name": value}
        if isinstance(value, Mapping):
            if not isinstance(value.get("name"), str):
                raise ValueError(f"name is missing; give one of {', '.join(ALGORITHMS)}, or path.py:Class")
            return find_algorithm(value["name"]).model_validate(value)
        return value

    @field_serializer("algorithm")
    def _serialize_algorithm(self, value: Section | None) -> dict[str, Any] | None:
        return None if value is None else value.model_dump(mode="json", by_alias=True)

    @model_validator(mode="after")
    def _check_quantize(self) -> RunConfig:
        if self.model.quantize == "none":
            return self
        if self.lora is None and self.model.adapter is None:
            raise ValueError(
                f"model.quantize is {self.model.quantize}, and quantized weights cannot be trained; add a lora section (lora.r=16), "
                "or set model.quantize=none"
            )
        if self.method.learns_reward:
            raise ValueError(
                "model.quantize is for language models, and a reward model is trained; set model.quantize=none"
            )
        return self

    @model_validator(mode="after")
    def _check_reward_and_loss(self) -> RunConfig:
        if self.algorithm is None and self.reward is not None:
            raise ValueError("reward is set without an algorithm; add algorithm.name (rloo, grpo, online_dpo, ppo)")
        if self.algorithm is not None and self.reward is not None and not self.algorithm.takes_reward:
            reason = (
                "learns a reward from pairs and" if self.algorithm.learns_reward else "has no completions judged and"
            )
            raise ValueError(f"{self.algorithm.name} {reason} takes none; leave out reward")
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
            raise ValueError(LOSS_AND_ALGORITHM)
        return self

    @model_validator(mode="after")
    def _check_best(self) -> RunConfig:
        name, is_set = self.checkpoint.metric, "mode" in self.checkpoint.model_fields_set
        if not is_set and metric(name).better == "higher":
            raise ValueError(
                f"checkpoint.metric is {name}, of which higher is better, and checkpoint.mode is min; set checkpoint.mode=max "
                "(to resume a run that an earlier version began so, checkpoint.mode=min)"
            )
        return self

    @model_validator(mode="after")
    def _check_rollout(self) -> RunConfig:
        if self.rollout != RolloutConfig() and self.method.rollouts is None:
            raise ValueError(
                "rollout is for methods that write completions in training; leave it out, or set algorithm.name"
            )
        return self

    @model_validator(mode="after")
    def _check_unused_settings(self) -> RunConfig:
        idle = dict(self.method.idle)
        if not self._has_own_method and "divergence" not in self.method.needs:
            idle["train.divergence_ceiling"] = f"with {self.method.name}, which computes no divergence; leave it out"
        for key, reason in idle.items():
            section, _, name = key.partition(".")
            if name:
                refuse_idle(getattr(self, section), {name: reason}, f"{section}.")
        return self

    @model_validator(mode="after")
    def _check_metric(self) -> RunConfig:
        name = self.checkpoint.metric
        if not RECORDED.get() and (how := self.unknown_metric(name)):
            raise ValueError(f"checkpoint.metric is {name}, which no evaluation of such a run has; {how}")
        return self

    @model_validator(mode="after")
    def _check_vision(self) -> RunConfig:
        """Allow pictures only for losses on given answers, in one process; no completions are sampled for such prompts."""
        if not self.model.sees:
            if self.data.image_dir is not None:
                raise ValueError(
                    "data.image_dir is set, and model.vision is off; set model.vision=frozen, or leave it out"
                )
            return self
        evaluation, train = self.evaluation, self.train
        set_fields = evaluation.model_fields_set
        conflicts = {
            "algorithm": (self.algorithm is not None, "leave it out: losses on given answers read pictures"),
            "model.quantize": (self.model.quantize != "none", "set it to none"),
            "model.tokenizer": (self.model.tokenizer is not None, "leave it out: the processor has its own"),
            "model.adapter": (self.model.adapter is not None, "leave it out"),
            "model.router_aux_loss": (self.model.router_aux_loss is not None, "leave it out"),
            "reference.path": (self.reference.path is not None, "leave it out: the start is the reference"),
            "reference.device": (self.reference.device != "auto", "leave it out"),
            "train.packing": (train.packing not in ("auto", "padded"), "set it to auto"),
            "train.gradient_checkpointing": (train.gradient_checkpointing in ("auto", "offload"), "set layers or off"),
            "data.template": (self.data.template == "plain", "set it to auto"),
            "launch.processes": (self.launch.processes not in ("auto", 1), "leave it out: one process reads pictures"),
            "evaluation.reward": (evaluation.reward is not None, "leave it out"),
            "evaluation.kl_prompts": ("kl_prompts" in set_fields and evaluation.kl_prompts > 0, "set it to 0"),
            "evaluation.samples": ("samples" in set_fields and evaluation.samples > 0, "set it to 0"),
        }
        for name, (is_set, how) in conflicts.items():
            if is_set:
                raise ValueError(
                    f"{name} is set and model.vision is {self.model.vision}, which do not go together; {how}"
                )
        without_sampling = evaluation.model_copy(update={"kl_prompts": 0, "samples": 0})
        object.__setattr__(self, "evaluation", without_sampling)
        return self

    @property
    def method(self) -> Method:
        """The training method: the algorithm, or the losses if there is none."""
        return Losses(self.loss) if self.algorithm is None else self.algorithm

    def unknown_metric(self, name: str) -> str | None:
        """What to give instead of a held-out metric that such a run never logs; None if it may, as code of the user can log any."""
        rewards = [r for config in (self.reward, self.evaluation.reward) if config is not None for r in config.terms]
        if self._has_own_method or any(map(is_own, rewards)):
            return None
        method = self.method
        lacking = {"training": "training steps alone have it, evaluations do not"}
        if not rewards:
            has_none = f"{method.name} has no reward of completions"
            lacking["reward"] = "set evaluation.reward" if self.algorithm is None else has_none
        if method.learns_reward:
            lacking["completions"] = f"{method.name} writes no completions"
        elif method.rollouts is None and not self.evaluation.kl_prompts:
            lacking["completions"] = "set evaluation.kl_prompts"
        return unknown_metric(name, method.loss_terms, lacking)

    @property
    def _has_own_method(self) -> bool:
        """Whether the algorithm, or one of the losses, is code of the user."""
        code = [c.spec.fn for c in self.loss.components] if self.algorithm is None else [type(self.algorithm)]
        return not all(part.__module__.startswith("penchant.") for part in code)

    def own_contents(self) -> dict[str, str]:
        """SHA-256 of the user's own loss, algorithm and environment files by name, and of their imports as ``NAME: helper.py``."""
        names = [c.name for c in self.loss.components] if self.algorithm is None else [self.algorithm.name]
        names += [self.rollout.environment] if self.rollout.environment is not None else []
        own_names = [name for name in names if is_own(name) and own_file(name).is_file()]
        imports = {f"{name}: {file}": sha256 for name in own_names for file, sha256 in imported_sha256(name).items()}
        return {name: file_sha256(own_file(name)) for name in own_names} | imports

    @field_validator("loss", mode="before")
    @classmethod
    def _parse_loss(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = {"name": value}
        return LossConfig.from_mapping(value) if isinstance(value, Mapping) else value

    @field_serializer("loss")
    def _serialize_loss(self, value: LossConfig) -> dict[str, Any]:
        return value.to_mapping()


def result_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that affect what a run computes: no sections that only observe, and places and timeouts at their defaults."""
    settings = config.model_dump(mode="json", exclude=set(OBSERVING_SECTIONS))
    default = RolloutConfig().model_dump(mode="json")
    settings["rollout"] |= {name: default[name] for name in (*PLACES, "environment_timeout")}
    settings["reference"]["device"] = "auto"
    if config.reward is not None:
        default_timeout = RewardConfig.model_fields["timeout"].default
        settings["reward"] = config.reward.model_copy(update={"timeout": default_timeout}).model_dump(mode="json")
    return settings


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The same config with every local file and folder as an absolute path, so that a run can be read from anywhere."""

    def absolute(path: Any) -> Any:
        if isinstance(path, list):
            return [absolute(p) for p in path]
        if isinstance(path, dict):
            return {name: absolute(p) for name, p in path.items()}
        return str(Path(path).expanduser().resolve()) if path is not None and Path(path).expanduser().exists() else path

    def absolute_fields(value: Any, *names: str) -> Any:
        return value.model_copy(update={n: absolute(getattr(value, n)) for n in names})

    def absolute_reward(name: str) -> str:
        path, colon, function = name.rpartition(":")
        if kind_of(name) is not None:
            return name
        return f"{absolute(path)}:{function}" if colon else str(absolute(name))

    def absolute_rewards(reward: RewardConfig | None) -> RewardConfig | None:
        if reward is None:
            return None
        terms = {absolute_reward(name): weight for name, weight in reward.terms.items()}
        return reward.model_copy(update={"terms": terms})

    return config.model_copy(
        update={
            "model": absolute_fields(config.model, "path", "tokenizer", "adapter"),
            "data": absolute_fields(config.data, "path", "eval_path", "image_dir").model_copy(
                update={"sources": [absolute_fields(s, "path") for s in config.data.sources]}
            ),
            "reference": absolute_fields(config.reference, "path"),
            "reward": absolute_rewards(config.reward),
            "rollout": config.rollout.model_copy(
                update={"environment": config.rollout.environment and absolute_reward(config.rollout.environment)}
            ),
            "evaluation": config.evaluation.model_copy(update={"reward": absolute_rewards(config.evaluation.reward)}),
            "output": str(Path(config.output).expanduser().resolve()),
        }
    )


def default_settings() -> dict[str, Any]:
    """Every setting's default, in the shape of a resolved config; required ones are left out."""
    defaults: dict[str, Any] = {
        "loss": LossModifiers().model_dump(),
        "algorithm": None,
        "reward": None,
        "lora": LoraConfig().model_dump(),
    }
    for name, info in RunConfig.model_fields.items():
        section = info.annotation
        if isinstance(section, type) and issubclass(section, Section):
            fields = section.model_fields.items()
            values = {f: i.get_default(call_default_factory=True) for f, i in fields if not i.is_required()}
            defaults[name] = {f: v.model_dump() if isinstance(v, Section) else v for f, v in values.items()}
    return defaults


NOT_MERGED = ("loss", "algorithm", "reward")  # a method's own settings mean nothing to another method
MODEL_SPECIFIC = ("revision", "init", "tokenizer", "adapter")  # settings that belong to a model.path
HOLD_OUT_KEYS = ("eval_path", "validation_rows", "validation_fraction")


def merge_settings(defaults: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Merge a stage's keys, `overrides`, over `defaults`, section by section.

    `loss`, `algorithm` and `reward` are taken whole; a stage with one of loss and algorithm does not inherit the other, and a
    stage without an algorithm inherits no reward. A stage with its own model.path inherits no settings of another model
    (revision, init, tokenizer, adapter), and one that sets how rows are held out does not inherit another way.
    """
    result: dict[str, Any] = dict(defaults)
    for method_key, other_key in (("loss", "algorithm"), ("algorithm", "loss")):
        if overrides.get(method_key) is not None:
            result.pop(other_key, None)
    for key, value in overrides.items():
        base = defaults.get(key)
        if key in NOT_MERGED or not (isinstance(base, dict) and isinstance(value, dict)):
            result[key] = value
            continue
        dropped: set[str] = set()
        if key == "model" and "path" in value:
            dropped |= set(MODEL_SPECIFIC)
        if key == "data" and set(HOLD_OUT_KEYS) & set(value):
            dropped |= set(HOLD_OUT_KEYS)
        result[key] = {k: v for k, v in base.items() if k not in dropped} | value
    if result.get("algorithm") is None and "reward" not in overrides:
        result.pop("reward", None)
    return result
