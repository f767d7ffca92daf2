"""The `train`, `evaluation`, `checkpoint` and `logging` sections of a config."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from penchant.base.section import Section


class TrainConfig(Section):
    """The optimizer, its schedule, and what one step is."""

    epochs: float = Field(1.0, gt=0, description="passes over the data; may be a fraction")
    max_steps: int | None = Field(None, ge=1, description="an upper bound on optimizer steps")
    batch_size: int = Field(32, ge=1, description="prompt trees (rows) per optimizer step")
    tokens_per_step: int = Field(4096, ge=16, description="tokens of one forward/backward pass: the unit of memory")
    lr: float | Literal["auto"] = Field("auto", description="peak learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="shape after warm-up")
    warmup_fraction: float = Field(0.1, ge=0, lt=1, description="share of all steps that warm up")
    min_lr_fraction: float = Field(0.0, ge=0, le=1, description="last learning rate as a share of lr")
    weight_decay: float = Field(0.0, ge=0, description="of matrices; norms and biases never decay")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of the gradient's mean")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="decay of the gradient's square")
    adam_eps: float = Field(1e-8, gt=0, description="added to the denominator (ppo has its own)")
    max_grad_norm: float | None = Field(1.0, gt=0, description="clip the gradient's L2 norm; null: never")
    logp_floor: float | None = Field(
        -50.0, lt=0, description="stop where the mean log-prob per token of a step falls below this; null: never"
    )
    divergence_ceiling: float | None = Field(
        None, gt=0, description="stop where an exact divergence from the reference (nats a token) rises above this"
    )
    gradient_checkpointing: bool = Field(False, description="compute activations again in the backward pass")
    packing: Literal["auto", "shared", "separate", "padded"] = Field("auto", description="how rows are laid out")
    shuffle: bool = Field(True, description="a new order each epoch, by seed")
    threads: int | Literal["auto"] = Field("auto", description="CPU threads; auto follows the model's size")
    seed: int = Field(0, ge=0, lt=2**31, description="of order, split, adapters and dropout")


class EvalConfig(Section):
    """When the held-out set is evaluated, and how many completions are sampled for the report."""

    every: int | Literal["epoch"] | None = Field("epoch", description="optimizer steps, or epoch")
    at_start: bool = Field(True, description="also before the first step")
    tokens_per_step: int | None = Field(None, ge=16, description="default: train.tokens_per_step")
    kl_prompts: int = Field(16, ge=0, description="held-out prompts whose sampled completions estimate the KL; 0: none")
    samples: int = Field(4, ge=0, description="held-out prompts to answer before and after; 0: none")
    sample_tokens: int = Field(64, ge=1, description="tokens of such an answer")


class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    every: int | Literal["epoch"] | None = Field("epoch", description="optimizer steps, or epoch; the end always")
    keep_last: int = Field(2, ge=1, description="newest checkpoints kept")
    keep_best: bool = Field(True, description="also keep the best one")
    metric: str = Field("eval/loss", description="what best means")
    mode: Literal["min", "max"] = Field("min", description="whether lower or higher is better")
    pt: bool = Field(False, description="also write the model's weights as model/state_dict.pt, for torch.load")


TrackerName = Literal["wandb", "tensorboard", "mlflow", "trackio"]


class LoggingConfig(Section):
    """How often a training line is written, and which trackers get a copy (docs/trackers.md)."""

    every: int = Field(1, ge=1, description="optimizer steps")
    trackers: list[TrackerName] = Field(default_factory=list, description="mirrors of metrics.jsonl")
    project: str = Field("penchant", min_length=1, description="W&B's and Trackio's project, MLflow's experiment")
    name: str | None = Field(None, description="of the run in its trackers; default: its folder's name")
    group: str | None = Field(None, description="of runs; default: the sweep or pipeline that the run belongs to")
    tags: list[str] = Field(default_factory=list, description="W&B's and MLflow's")
    dir: str | None = Field(None, description="where trackers write on this machine; default: RUN/trackers")
    tracker_timeout: float = Field(30.0, gt=0, description="seconds that all trackers together may take at the end")

    @field_validator("trackers", mode="before")
    @classmethod
    def _one_alone(cls, value: Any) -> Any:
        """`logging.trackers=wandb` is a list of one; a tracker named twice is one tracker."""
        names = [value] if isinstance(value, str) else value
        return (
            list(dict.fromkeys(names)) if isinstance(names, list) and all(isinstance(n, str) for n in names) else names
        )
