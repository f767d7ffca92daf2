"""The `model`, `lora` and `reference` sections of a config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from penchant.base.hub import check_hub
from penchant.base.machine import Device
from penchant.base.section import Place, Section
from penchant.base.text import closest
from penchant.errors import CheckpointError, ConfigError, ModelError


class ModelConfig(Section):
    """Which model is trained, and how it is held."""

    path: str = Field(
        description="a model's folder or hub id (owner/name); a run's, a checkpoint's or an adapter's folder means its model"
    )
    revision: str | None = Field(None, description="branch, tag or commit of `path`, if that is a hub id")
    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="pretrained weights, or random ones made from the config in `path`"
    )
    dtype: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 if the hardware has it, else fp32")
    device: Device = Field("auto", description="auto: cuda if there is such a GPU, else cpu; mps (Apple), xpu (Intel)")
    quantize: Literal["none", "nf4", "int8"] = Field(
        "none",
        description="bits of the frozen weights below an adapter: nf4 (QLoRA: 4, double quantization) or int8; needs lora, and "
        "pip install 'penchant[bnb]'",
    )
    kernels: Literal["auto", "off", "compile"] = Field(
        "auto",
        description="auto: fast CPU kernels for the models that have them; compile: torch.compile of each layer (for GPUs, not measured)",
    )
    attention: Literal["auto", "varlen", "flex", "groups"] = Field(
        "auto",
        description="attention within prompt trees; auto: varlen flash kernels on a GPU where the model allows it",
    )
    tokenizer: str | None = Field(None, description="folder or hub id of the tokenizer; default: model.path")
    router_aux_loss: Annotated[float, Field(gt=0, le=1000)] | Literal["auto"] | None = Field(
        None,
        description="weight of a mixture of experts' balance loss; auto: the model's own router_aux_loss_coef; null: not added",
    )
    vision: Literal["off", "frozen", "trained"] = Field(
        "off",
        description="pictures in prompts (docs/vision.md); off: text only; frozen: they are read, and the vision tower stays as it is; "
        "trained: the tower is trained too",
    )
    image_options: dict[str, Any] = Field(
        default_factory=dict,
        description="settings of the model's image processor, e.g. {max_pixels: 262144} or {size: {longest_edge: 512}}",
    )
    adapter: str | None = Field(
        None, description="a LoRA adapter on `path` to continue training: its folder, or a run's or a checkpoint's"
    )

    @model_validator(mode="after")
    def _weights_to_quantize(self) -> ModelConfig:
        if self.quantize != "none" and self.init == "random":
            raise ValueError("quantize is set, and init=random draws weights that are to be trained; leave one out")
        return self

    @model_validator(mode="after")
    def _options_of_pictures(self) -> ModelConfig:
        if self.image_options and self.vision == "off":
            raise ValueError("image_options is set, and no pictures are read; set vision=frozen, or leave it out")
        return self

    @property
    def sees(self) -> bool:
        """Whether prompts may have pictures."""
        return self.vision != "off"

    def revision_of(self, name: str | None) -> str | None:
        """The revision of a tokenizer or model named beside this one: `revision` if it is `path` (or None), else the newest."""
        return self.revision if name in (None, self.path) else None

    @field_validator("adapter", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        if isinstance(value, list):
            raise ValueError(
                "only one adapter can be trained, but several are named; merge the others into model.path first"
            )
        return value


def check_text_alone(model: ModelConfig, where: str, what: str) -> None:
    """Refuse a vision-language model for a feature that handles text only.

    Raises:
        ConfigError: `model.vision` is on; `where` is what the error is about, `what` the feature.
    """
    if model.sees:
        how = "`penchant train`, `eval` and `compare` read them, and transformers loads a checkpoint's model folder (docs/vision.md)"
        raise ConfigError(where, f"reads pictures (model.vision={model.vision}), and {what} handles text alone", how)


class LoraConfig(Section):
    """A low-rank adapter; if this section is present, it is trained instead of the full model."""

    r: int = Field(16, ge=1, le=65536, description="rank")
    alpha: float = Field(32.0, gt=0, description="scale of the update, which is multiplied by alpha / r")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: str | list[str] = Field(
        "all-linear",
        description="layers that get an adapter: all-linear, a list of names, or a regular expression for whole names",
    )
    rslora: bool = Field(False, description="rank-stabilized LoRA: the update is multiplied by alpha / sqrt(r)")
    dora: bool = Field(False, description="DoRA: the norm of each output's weights is trained along with the update")
    lr_ratio: float = Field(
        1.0, gt=0, le=1e4, description="learning rate of the B matrices, as a multiple of the others' (LoRA+: 16)"
    )


def outside_fast_path(lora: LoraConfig | None) -> str:
    """Why the fast CPU path does not support an adapter; "" if it does."""
    return (
        "lora.dora with lora.dropout is not in the fast path" if lora is not None and lora.dora and lora.dropout else ""
    )


class ReferenceConfig(Section):
    """Where the reference's log-probs come from."""

    kind: Literal["auto", "frozen", "adapter", "cached"] = Field(
        "auto",
        description="auto: adapter with LoRA (switched off, or as it was at the start), else cached (computed once, kept on disk)",
    )
    path: str | None = Field(
        None,
        description="another model as reference, named as in model.path; default: the model that training starts from",
    )
    sync_every: int | None = Field(
        None,
        ge=1,
        le=10**9,
        description="optimizer steps between updates of the reference from the policy (TR-DPO); null: never",
    )
    sync_mixup: float = Field(1.0, gt=0, le=1, description="weight of the policy in such an update; 1: copy it")
    ema: float | None = Field(
        None, gt=0, lt=1, description="the reference follows the policy at every step, with this decay (0.99 is usual)"
    )
    device: Place = Field(
        "auto",
        description="device of a reference that is a model of its own, e.g. cuda:1 or cpu; auto: the policy's; with another one, "
        "kind=auto is frozen",
    )
    cache_dir: str | None = Field(
        None, description="where cached log-probs are kept; default: $PENCHANT_CACHE or ~/.cache/penchant"
    )

    @model_validator(mode="after")
    def _one_way_to_move(self) -> ReferenceConfig:
        if self.ema is not None and self.sync_every is not None:
            raise ValueError("ema and sync_every are both set; keep one")
        if self.sync_every is None and "sync_mixup" in self.model_fields_set and self.sync_mixup != 1.0:
            raise ValueError("sync_mixup is set without sync_every; set both, or neither")
        if self.moves and self.kind in ("cached", "adapter"):
            raise ValueError(f"kind={self.kind} cannot follow the policy; set kind=frozen or auto")
        return self

    @property
    def moves(self) -> bool:
        """Whether the reference follows the policy."""
        return self.ema is not None or self.sync_every is not None


def looks_like_folder(path: str) -> bool:
    """Whether it is a path, not a hub id (exactly one slash): absolute, starting with a dot or ~, or it or its parent exists."""
    if path.startswith(("/", "./", "../", "~")) or path.count("/") != 1:
        return True
    return Path(path).exists() or Path(path).parent.is_dir()


def check_exists(spec: str, hub: bool = True) -> None:
    """Refuse a missing path, or a file that is no YAML config (CheckpointError), before the hub gives a less clear error.

    Args:
        hub: whether a hub id is allowed.
    """
    path = Path(spec).expanduser()
    if path.exists():
        if path.is_file() and path.suffix not in (".yaml", ".yml"):
            raise CheckpointError(spec, "is a file", "give a run, a model's folder, a hub id or a CONFIG.yaml")
        return
    if not hub or looks_like_folder(spec):
        names = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        suggestion = closest(path.name, names, 0.7)
        how = "give a run, a CONFIG.yaml, a model's folder or a hub id" if hub else "give a run's folder"
        how = f"did you mean {path.parent / suggestion}?" if suggestion else how
        raise CheckpointError(spec, f"no such run or config{', nor a model' if hub else ''}", how)


def check_model_path(path: str, required_file: str = "config.json") -> str:
    """The path to pass to transformers; ModelError if a folder is missing or lacks the file `required_file`, or the hub has no such model."""
    folder = Path(path).expanduser()
    if not looks_like_folder(path):
        check_hub(path)
        return path
    if not folder.exists():
        suggestion = closest(folder.name, (p.name for p in folder.parent.glob("*/")), 0.7)
        how = f"give a folder with {required_file}, or a hub id (owner/name)"
        raise ModelError(path, "no such folder", f"did you mean {folder.parent / suggestion}?" if suggestion else how)
    if folder.is_file():
        model = folder.parent
        is_model = (model / required_file).exists()
        how = f"did you mean its folder, {model}?" if is_model else f"give a folder with {required_file}, or a hub id"
        raise ModelError(path, "is a file, not a model's folder", how)
    if not (folder / required_file).exists():
        subfolder = folder / "model"
        advice = "it must hold a transformers model"
        if (folder / "config.json").exists():
            advice = "put the model's tokenizer there, or name one as model.tokenizer (`tokenizer=` in Python)"
        hint = f"did you mean {subfolder}?" if (subfolder / required_file).exists() else advice
        raise ModelError(path, f"the folder has no {required_file}", hint)
    return str(folder)


def check_weights(cfg: ModelConfig) -> None:
    """Refuse a model folder without weights (ModelError), unless the model starts from random ones."""
    folder = Path(cfg.path).expanduser()
    if cfg.init == "pretrained" and folder.is_dir() and not any([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        what = "the folder has no weights (model.safetensors)"
        raise ModelError(cfg.path, what, "get the model again, or set model.init=random to start from random weights")
