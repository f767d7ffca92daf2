"""The export formats: how each is written, read back and compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penchant.errors import ConfigError
from penchant.export.gguf import Q8, check_supported, dequantized, read_gguf, write_gguf
from penchant.export.subject import DTYPE_NAMES, Subject, auto_class, read_model, round_weights
from penchant.models.folder import read_object
from penchant.models.lora import with_adapter
from penchant.models.merge import TOLERANCE
from penchant.models.reward import SETTINGS
from penchant.requests import ExportRequest

# ---- The formats. A new one is an entry of FORMATS ----

STATE = "state_dict.pt"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# (the model in fp32 with the weights the files should hold, which the model read back must reproduce; notes for the user)
Written = tuple[Any, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Format:
    """An export format.

    Args:
        name: as in ``--to``; what: description; write, read: into and out of a folder; check: refuses an unsuitable run early.
        equal: allowed difference between read-back and written logits, relative to the largest; 0: bitwise equal.
        dtypes: names for ``--dtype``; library: that loads it, as named on the hub; load: Python code for it, with {folder} and {base}.
    """

    name: str
    what: str
    write: Callable[[Subject, ExportRequest, str, Path], Written]
    read: Callable[[Subject, Path], Any]
    library: str
    load: str
    check: Callable[[Subject], None] = lambda _: None
    equal: float = 0.0
    dtypes: tuple[str, ...] = tuple(DTYPES)


def _cast(value: Tensor, dtype: str) -> Tensor:
    """Cast a weight to the files' dtype."""
    return value.to(DTYPES[dtype]) if value.is_floating_point() else value


def _save_whole(subject: Subject, request: ExportRequest, dtype: str, folder: Path) -> Written:
    """Write a folder that transformers loads."""
    model = subject.load_merged()
    round_weights(model, lambda _name, value: _cast(value, dtype))
    model.save_pretrained(folder, state_dict=_cast_state(model, dtype), max_shard_size=request.max_shard_size)
    _save_config(model.config, dtype, folder)  # again, because save_pretrained records the dtype in memory
    _save_tokenizer(subject, folder)
    return model, ()


def _cast_state(model: Any, dtype: str) -> dict[str, Tensor]:
    """Return a model's state in the files' dtype; tied weights share one tensor, so that none is written twice."""
    shared: dict[tuple[int, torch.Size], Tensor] = {}
    state = model.state_dict().items()
    return {name: shared.setdefault((value.data_ptr(), value.shape), _cast(value, dtype)) for name, value in state}


def _save_config(config: Any, dtype: str, folder: Path) -> None:
    """Write ``config.json`` with the dtype that the weights are stored in, which is the one they are loaded in."""
    parts = (getattr(config, name, None) for name in config.sub_configs)
    for part in (config, *(p for p in parts if p is not None)):
        part.dtype = DTYPES[dtype]
    config.save_pretrained(folder)


def _save_tokenizer(subject: Subject, folder: Path) -> None:
    """Write the tokenizer, and for a reward model its text settings."""
    subject.tokenizer().save_pretrained(folder)
    if subject.reward:
        shutil.copyfile(subject.folder / SETTINGS, folder / SETTINGS)


def _read_whole(subject: Subject, folder: Path) -> Any:
    return read_model(folder, subject.reward)


def _save_state_dict(subject: Subject, _request: ExportRequest, dtype: str, folder: Path) -> Written:
    """Write one file of tensors, with the config and the tokenizer beside it."""
    model = subject.load_merged()
    round_weights(model, lambda _name, value: _cast(value, dtype))
    _save_config(model.config, dtype, folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)
    torch.save(_cast_state(model, dtype), folder / STATE)
    _save_tokenizer(subject, folder)
    return model, ()


def _read_state_dict(subject: Subject, folder: Path) -> Any:
    from transformers import AutoConfig

    model = auto_class(subject.reward).from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    model.load_state_dict(torch.load(folder / STATE, weights_only=True))
    return model.eval()


def _save_adapter(subject: Subject, _request: ExportRequest, dtype: str, folder: Path) -> Written:
    """Write an adapter folder that peft loads onto the base model."""
    from safetensors.torch import load_file, save_file

    adapter = subject.adapter
    assert adapter is not None
    weights = "adapter_model.safetensors"
    state = {name: _cast(value, dtype).contiguous() for name, value in load_file(adapter / weights).items()}
    save_file(state, folder / weights, metadata={"format": "pt"})
    config = read_object(adapter / "adapter_config.json")
    config["base_model_name_or_path"] = subject.base.path
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    _save_tokenizer(subject, folder)
    model = with_adapter(subject.load_base(), adapter)
    trained = {name for name, _ in model.named_parameters() if "lora_" in name or ".modules_to_save." in name}
    round_weights(model, lambda name, value: _cast(value, dtype) if name in trained else value)
    return model, ()


def _read_adapter(subject: Subject, folder: Path) -> Any:
    return with_adapter(subject.load_base(), folder)


def _require_adapter(to: str) -> Callable[[Subject], None]:
    def check(subject: Subject) -> None:
        if subject.adapter is None:
            what = f"{to} needs a LoRA run, and {subject.run} trained the whole model"
            raise ConfigError("--to", what, "use safetensors")

    return check


def _save_gguf(subject: Subject, _request: ExportRequest, dtype: str, folder: Path) -> Written:
    """Write one file for llama.cpp and compatible tools."""
    model = subject.load_merged()
    name = f"{subject.run.name}-step-{subject.step}"
    round_weights(model, lambda _name, value: dequantized(value, dtype))
    return model, write_gguf(folder / f"{name}-{dtype}.gguf", model, subject.tokenizer(), dtype, name)


_AUTO = 'tokenizer = AutoTokenizer.from_pretrained("{folder}")\n'
_WHOLE = "from transformers import {auto}, AutoTokenizer\n\n" + 'model = {auto}.from_pretrained("{folder}")\n' + _AUTO
_PT = (
    "import torch\nfrom transformers import {auto}, AutoConfig, AutoTokenizer\n\n"
    'model = {auto}.from_config(AutoConfig.from_pretrained("{folder}"))\n'
    f'model.load_state_dict(torch.load("{{folder}}/{STATE}", weights_only=True))\nmodel.eval()\n' + _AUTO
)
_ADAPTER = (
    "from peft import PeftModel\nfrom transformers import {auto}, AutoTokenizer\n\n"
    'base = {auto}.from_pretrained("{base}"{labels})\nmodel = PeftModel.from_pretrained(base, "{folder}")\n' + _AUTO
)
_GGUF = (
    "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
    'model = AutoModelForCausalLM.from_pretrained("{folder}", gguf_file="{file}")  # or: llama-cli -m {file}\n'
    'tokenizer = AutoTokenizer.from_pretrained("{folder}", gguf_file="{file}")\n'
)

_MERGED = "a folder that transformers loads, with the LoRA adapter merged into the base"
_ALL = (*DTYPES, Q8)
FORMATS = {
    f.name: f
    for f in (
        Format("safetensors", "a folder that transformers loads", _save_whole, _read_whole, "transformers", _WHOLE),
        Format("pt", "one state dict for torch.load", _save_state_dict, _read_state_dict, "transformers", _PT),
        Format("merged", _MERGED, _save_whole, _read_whole, "transformers", _WHOLE, _require_adapter("merged")),
        Format("adapter", "the LoRA adapter alone, for peft", _save_adapter, _read_adapter, "peft", _ADAPTER, _require_adapter("adapter")),
        Format("gguf", "one file for llama.cpp and its kin", _save_gguf, lambda _, folder: read_gguf(folder), "gguf", _GGUF, check_supported, TOLERANCE, _ALL),
    )
}  # fmt: skip


def dtype_of(form: Format, subject: Subject, requested: str) -> str:
    """Return the name of the dtype that weights are stored in.

    Raises:
        ConfigError: the format does not support it.
    """
    if requested == "auto":
        return DTYPE_NAMES[subject.dtype()]
    if requested not in form.dtypes:
        raise ConfigError("--dtype", f"{form.name} has no {requested}", f"there are {', '.join(form.dtypes)}")
    return requested


# ---- Comparison: does the exported model compute what the run's model computes, and how far is it off by rounding? ----

# largest change of a logit that rounding the weights may cause, relative to the largest logit
ROUNDING = {"fp32": TOLERANCE, "fp16": 0.01, "bf16": 0.05, "q8_0": 0.1}


@dataclass(frozen=True, slots=True)
class Check:
    """Results of a comparison, all computed in fp32 on the same tokens.

    Args:
        tokens: number of positions compared; largest: largest absolute logit of the run's own model.
        read: largest difference between the model read back and the weights written; read_limit: its limit.
        own: largest difference between the model read back and the run's own model; own_limit: its limit.
        greedy: share of positions where both choose the same token; None for a reward model, which has one score.
    """

    tokens: int
    largest: float
    read: float
    read_limit: float
    own: float
    own_limit: float
    greedy: float | None

    @property
    def good(self) -> bool:
        return self.read <= self.read_limit and self.own <= self.own_limit

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"good": self.good}

    def to_text(self) -> str:
        """Format as one line."""
        quantity = "scores" if self.greedy is None else "logits"
        agreement = "" if self.greedy is None else f"; the same likeliest token at {self.greedy:.1%} of positions"
        return (
            f"read back and compared on {self.tokens} tokens: {quantity} differ by at most {self.read:.3g} from the weights that were "
            f"written (allowed: {self.read_limit:.3g}) and by {self.own:.3g} from the run's own model (allowed: {self.own_limit:.3g}, "
            f"largest: {self.largest:.3g}){agreement}"
        )


def compare_outputs(
    original: Tensor, expected: Tensor, read: Tensor, *, equal: float, dtype: str, exact: bool, tokens: int
) -> Check:
    """Compare outputs, each (tokens, V).

    Args:
        original: from the run's model; expected: from the weights that the files should hold; read: from the model read back.
        equal: allowed difference between the last two, relative to the largest; dtype: of the files; exact: the run's weights already
            have that dtype, so nothing may change.
    """
    largest = float(original.abs().max())
    scale = max(1.0, largest)
    return Check(
        tokens=tokens,
        largest=largest,
        read=_max_difference(read, expected),
        read_limit=equal * scale,
        own=_max_difference(read, original),
        own_limit=equal * scale if exact else ROUNDING[dtype] * scale,
        greedy=None if original.shape[-1] == 1 else float((original.argmax(-1) == read.argmax(-1)).float().mean()),
    )


def _max_difference(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape or not bool(torch.isfinite(one).all()):
        return float("inf")
    return float((one - other).abs().max())
