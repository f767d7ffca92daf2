"""The `train`, `evaluation`, `checkpoint` and `logging` sections of a config."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from penchant.base.section import Section, refuse_idle

Every = Annotated[int, Field(ge=1, le=10**9)] | Literal["epoch"] | None  # interval in optimizer steps


class TrainConfig(Section):
    """The optimizer, its schedule, and what one step is."""

    epochs: float = Field(1.0, gt=0, le=1e6, description="passes over the data, possibly a fraction")
    max_steps: int | None = Field(None, ge=1, le=10**9, description="upper limit on optimizer steps")
    batch_size: int = Field(32, ge=1, le=10**9, description="prompt trees (rows) per optimizer step")
    tokens_per_step: int = Field(
        4096,
        ge=16,
        le=10**9,
        description="tokens in forward and backward passes at one time: the unit of memory (a CPU may run several smaller ones, one a "
        "thread)",
    )
    lr: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="peak learning rate; auto, for the whole model: 5e-6 (orpo 8e-6, SFT 2e-5, reward models 1e-5, encoders 2e-5 or 5e-5, "
        "online methods 1e-6), ten times that below 20 million parameters; with LoRA: 5e-5 (SFT 2e-4, reward models 1e-4)",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="learning-rate shape after warm-up")
    warmup_fraction: float = Field(0.1, ge=0, lt=1, description="share of all steps spent on warm-up")
    min_lr_fraction: float = Field(0.0, ge=0, le=1, description="final learning rate as a share of lr")
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "adafactor", "muon", "sgd"] = Field(
        "adamw",
        description="adamw_8bit and paged_adamw_8bit keep moments in 8 bits (pip install 'penchant[bnb]'); adafactor keeps rows and "
        "columns of them; muon is used for the matrices within layers, adamw for everything else",
    )
    momentum: float | None = Field(None, ge=0, lt=1, description="momentum of sgd and muon; default: 0.9 and 0.95")
    weight_decay: float = Field(0.0, ge=0, description="weight decay of matrices; norms and biases never decay")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay rate of the gradient's running mean")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="decay rate of the gradient's running square")
    adam_eps: float = Field(1e-8, gt=0, description="added to the denominator (ppo has its own)")
    max_grad_norm: float | None = Field(1.0, gt=0, description="clip the gradient to this L2 norm; null: never")
    logp_floor: float | None = Field(
        -50.0, lt=0, description="stop when a step's mean log-prob per token falls below this; null: never"
    )
    divergence_ceiling: float | None = Field(
        None,
        gt=0,
        description="stop when an exact divergence from the reference (nats per token) rises above this; null: never",
    )
    gradient_checkpointing: bool | Literal["off", "layers", "auto", "offload"] = Field(
        False,
        description="what happens to activations until the backward pass. layers (true): recomputed, layer by layer; off (false): kept; "
        "auto: layers where the run would not fit otherwise; offload: kept in the host's memory, on CUDA",
    )
    packing: Literal["auto", "shared", "separate", "padded"] = Field(
        "auto", description="how completions share a row: packed with a shared prompt, packed one by one, or padded"
    )
    shuffle: bool = Field(True, description="draw a new order each epoch, from the seed")
    deterministic: bool = Field(
        True, description="on a GPU: only operations that give the same bits each time in a step; a CPU always does"
    )
    tf32: bool = Field(
        False, description="on a GPU: fp32 products in TF32, several times as fast and with 10-bit mantissas"
    )
    threads: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = Field(
        "auto", description="CPU threads; auto: chosen by the model's size"
    )
    seed: int = Field(0, ge=0, lt=2**31, description="seed of the order, the split, the adapters and dropout")

    @field_validator("gradient_checkpointing")
    @classmethod
    def _normalize_aliases(cls, value: bool | str) -> bool | str:
        """Map ``off`` and ``layers`` to False and True, the values that run folders store."""
        return {"off": False, "layers": True}.get(value, value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_floor(self) -> TrainConfig:
        if self.schedule == "constant":
            reason = "with a constant schedule; set schedule: cosine or linear, or leave {} out"
            refuse_idle(self, {"min_lr_fraction": reason})
        return self

    @model_validator(mode="after")
    def _check_optimizer(self) -> TrainConfig:
        kind = self.optimizer
        if self.momentum is not None and kind not in ("sgd", "muon"):
            raise ValueError(f"momentum has no effect with optimizer={kind}; use adam_beta1")
        if kind not in ("sgd", "adafactor"):
            return self
        for name in ("adam_beta1", "adam_beta2", "adam_eps"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is set, which optimizer={kind} does not have; leave it out")
        if self.lr == "auto":
            usual = (
                "adafactor's is a share of each weight's size: 1e-4 to 1e-2"
                if kind == "adafactor"
                else "try 1e-3 to 1e-1"
            )
            raise ValueError(f"lr: auto has no default for optimizer={kind}; set it ({usual})")
        return self


class EvalConfig(Section):
    """When the held-out set is evaluated, and how many completions are sampled for the report."""

    every: Every = Field(
        "epoch", description="how often to evaluate: a number of optimizer steps, or epoch; null: only at the end"
    )
    at_start: bool = Field(True, description="also evaluate before the first step")
    tokens_per_step: int | None = Field(
        None, ge=16, le=10**9, description="tokens in one pass; default: train.tokens_per_step"
    )
    kl_prompts: int = Field(
        16, ge=0, le=10**9, description="held-out prompts whose sampled completions estimate the KL; 0: none"
    )
    samples: int = Field(
        4, ge=0, le=10**9, description="number of held-out prompts to answer before and after training; 0: none"
    )
    sample_tokens: int = Field(64, ge=1, le=2**20, description="limit on the tokens of such an answer")


class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    every: Every = Field(
        "epoch",
        description="how often to write one: a number of optimizer steps, or epoch; null: only at the end",
    )
    keep_last: int = Field(2, ge=1, le=10**9, description="how many of the newest checkpoints to keep")
    keep_best: bool = Field(True, description="also keep the best one, of those whose step is evaluated")
    metric: str = Field("eval/loss", description="the metric that decides which checkpoint is best")
    mode: Literal["min", "max"] = Field("min", description="whether lower (min) or higher (max) is better")
    pt: bool = Field(False, description="also write the model's weights as model/state_dict.pt, for torch.load")


TrackerName = Literal["wandb", "tensorboard", "mlflow", "trackio"]


class LoggingConfig(Section):
    """How often a training line is written, and which trackers get a copy (docs/trackers.md)."""

    every: int = Field(1, ge=1, le=10**9, description="optimizer steps between two lines of metrics.jsonl")
    trackers: list[TrackerName] = Field(default_factory=list, description="trackers that get a copy of metrics.jsonl")
    project: str = Field("penchant", min_length=1, description="project in W&B and Trackio, experiment in MLflow")
    name: str | None = Field(None, description="the run's name in its trackers; default: the folder's name")
    group: str | None = Field(None, description="group in its trackers; default: the sweep or pipeline it belongs to")
    tags: list[str] = Field(default_factory=list, description="tags in W&B and MLflow")
    dir: str | None = Field(None, description="where trackers write on this machine; default: RUN/trackers")
    tracker_timeout: float = Field(30.0, gt=0, description="seconds that all trackers together may take at the end")

    @field_validator("trackers", mode="before")
    @classmethod
    def _as_unique_list(cls, value: Any) -> Any:
        """Turn a single name into a list of one, and drop duplicates."""
        names = [value] if isinstance(value, str) else value
        return (
            list(dict.fromkeys(names)) if isinstance(names, list) and all(isinstance(n, str) for n in names) else names
        )
