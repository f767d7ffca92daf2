"""A LoRA adapter merged into its base: a full model that anything can start from, checked against the unmerged one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penchant.base.files import aside_of, check_model_folder, file_sha256
from penchant.errors import ConfigError, ModelError
from penchant.models.folder import check_finite, check_folder, headers, loading, read_object
from penchant.models.load import (
    adapters_of,
    base_model_of,
    check_adapter,
    load_causal_model,
    load_processor,
    load_tokenizer,
    plain_name,
    save_model,
    without_cache,
)
from penchant.models.options import LoraConfig, ModelConfig

MARK = "merged.json"  # of which adapter the folder was made, and what was written
WEIGHTS = (".safetensors", ".bin", ".json", ".txt", ".model", ".jinja")  # files that say what a model computes
TOLERANCE = 1e-4  # of logits, relative to their largest: merging in fp32 changes the order of sums and nothing else


def is_adapter(folder: Path) -> bool:
    """Whether a model folder holds a LoRA adapter rather than a model."""
    return (folder / "adapter_config.json").exists()


def adapter_base(folder: Path) -> str | None:
    """The base model that an adapter's folder names.

    Raises:
        ModelError: its adapter_config.json cannot be read.
    """
    named = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
    return named if isinstance(named, str) and named else None


def model_sha256(folder: Path) -> str:
    """SHA-256 over names and content of a model folder's files: weights, config, tokenizer.

    Raises:
        ModelError: there is no such folder.
    """
    if not folder.is_dir():
        raise ModelError(str(folder), "no such folder", "give a model's folder")
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in WEIGHTS and path.name != MARK and not path.name.startswith("."):
            digest.update(f"{path.name}:{file_sha256(path)};".encode())
    return digest.hexdigest()


def merged_model(
    base: ModelConfig,
    adapter: Path,
    device: torch.device,
    seed: int = 0,
    check: Callable[[Any], None] | None = None,
) -> Any:
    """The base model in fp32 with the adapter merged in: ``W + (alpha / r) B A``.

    Args:
        base: of the run that trained the adapter; seed: of that run (it matters where the base starts from random weights).
        check: gets the base alone, and raises if it is another one.

    Raises:
        ModelError: not an adapter of a causal model, or the merged model's logits differ from the unmerged one's.
    """
    check_model_folder(adapter)
    check_folder(adapter)
    kind = read_object(adapter / "adapter_config.json").get("task_type")
    if kind != "CAUSAL_LM":
        raise ModelError(str(adapter), f"an adapter of type {kind} is not a language model", "name another stage")
    bare = load_causal_model(base, device, seed)
    if check is not None:
        check(bare)
    model = with_adapter(bare, adapter)
    before = _probe(model)
    merged = base_model_of(model.merge_and_unload(safe_merge=True))  # type: ignore[operator]
    _check_equal(str(adapter), before, _probe(merged))
    return merged


def lora_section(adapter: Path, given: LoraConfig | None = None) -> LoraConfig:
    """The `lora` section of a run that trains an adapter on: what the adapter is, and how it is to be trained.

    Args:
        given: what a config says; dropout and lr_ratio are its own to say.

    Raises:
        ConfigError: the section says another adapter. ModelError: an adapter that cannot be trained on.
    """
    check_folder(adapter)
    file = adapter / "adapter_config.json"
    values = read_object(file)
    _check_trainable(file, values)
    targets = values.get("target_modules")
    with loading(str(file), "is not a config of a LoRA adapter", "get it again"):
        own = LoraConfig(
            r=values["r"],
            alpha=float(values["lora_alpha"]),
            dropout=float(values.get("lora_dropout") or 0.0),
            target_modules=targets if isinstance(targets, str) else sorted(targets or ()),
            rslora=bool(values.get("use_rslora")),
            dora=bool(values.get("use_dora")),
        )
    if given is None:
        return own
    said, theirs, ours = given.model_fields_set, given.model_dump(), own.model_dump()
    for name in sorted(said & {"r", "alpha", "rslora", "dora"}):
        if theirs[name] != ours[name]:
            _contradicted(name, theirs[name], ours[name], adapter)
    # a name for many layers is compared when the model is there
    kept = {name: theirs[name] for name in said & {"dropout", "lr_ratio", "target_modules"}}
    if isinstance(kept.get("target_modules"), list):
        kept["target_modules"] = sorted(kept["target_modules"])
    return own.model_copy(update=kept)


def _check_trainable(file: Path, values: Mapping[str, Any]) -> None:
    """Refuse what is more than low-rank updates of frozen weights."""
    if values.get("peft_type") != "LORA" or values.get("task_type") != "CAUSAL_LM":
        what = f"is an adapter of type {values.get('peft_type')}, {values.get('task_type')}"
        raise ModelError(str(file), what, "name a LoRA adapter of a causal language model")
    start = values.get("init_lora_weights", True)
    more = [key for key in ("modules_to_save", "trainable_token_indices", "layer_replication") if values.get(key)]
    more += ["bias"] if values.get("bias", "none") != "none" or values.get("lora_bias") else []
    more += [f"init_lora_weights: {start}"] if str(start).startswith(("pissa", "olora", "corda", "loftq")) else []
    if more:
        what = f"holds more than low-rank updates ({', '.join(more)}), and only those can be trained further here"
        raise ModelError(str(file), what, "merge it (name it as model.path) and train a new adapter")


def _contradicted(name: str, theirs: Any, ours: Any, adapter: Path) -> None:
    what = f"is {theirs}, but the adapter in {adapter} has {ours}"
    raise ConfigError(f"lora.{name}", what, "leave it out: model.adapter brings its own")


def trained_on(base: Any, adapter: Path, lora: LoraConfig, seed: int) -> Any:
    """A model in fp32 with a trainable copy of an adapter beside it; everything else is frozen.

    Args:
        lora: of `lora_section`; seed: of torch's random numbers, as for a new adapter.

    Raises:
        ConfigError: other layers are asked for than the adapter has, or it cannot be merged. ModelError: not an adapter of this model.
    """
    from peft import PeftConfig

    torch.manual_seed(seed)
    with loading(str(adapter), "its adapter_config.json could not be read", "give a LoRA adapter"), quiet_peft():
        config: Any = PeftConfig.from_pretrained(str(adapter))
    config.lora_dropout, config.inference_mode = lora.dropout, False
    asked = lora.target_modules
    own = config.target_modules
    wanted = None if asked == (own if isinstance(own, str) else sorted(own or ())) else _matching(base, config, asked)
    model = _beside(base, adapter, config)
    found = {plain_name(name).rpartition(".")[0] for name, _ in adapters_of(base_model_of(model))}
    if wanted is not None and wanted != found:
        there = sorted({name.rpartition(".")[2] for name in found})
        _contradicted("target_modules", asked, f"{len(found)} layers, {', '.join(there)}", adapter)
    check_adapter(model)
    return model


def _matching(base: Any, config: Any, targets: str | list[str]) -> set[str]:
    """Names of the layers that peft would adapt."""
    from peft import LoraConfig as PeftLoraConfig
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists

    asked = PeftLoraConfig(task_type=config.task_type, target_modules=targets)
    like = _maybe_include_all_linear_layers(asked, base)
    return {name for name, _ in base.named_modules() if name and check_target_module_exists(like, name)}


def with_adapter(base: Any, adapter: Path) -> Any:
    """A model with a LoRA adapter beside it, in fp32, as peft's users load it.

    Raises:
        ModelError: the folder holds no whole adapter of this model.
    """
    check_folder(adapter)
    return _beside(base, adapter).float().eval()


def _beside(base: Any, adapter: Path, config: Any = None) -> Any:
    """An adapter's weights as they are in its folder; `config`: peft's, in place of the folder's."""
    from peft import PeftModel, get_peft_model_state_dict

    with loading(str(adapter), "the adapter could not be loaded", "give an adapter of this model"), quiet_peft():
        trainable = config is not None
        model = PeftModel.from_pretrained(
            base, str(adapter), config=config, is_trainable=trainable, autocast_adapter_dtype=False
        )
        wanted, there = set(get_peft_model_state_dict(model)), set(headers(adapter))
    odd = sorted(wanted ^ there)
    if there and odd:
        what = "lacks" if odd[0] in wanted else "has, beyond what its config says,"
        raise ModelError(str(adapter), f"the adapter {what} {odd[0]}", "give a whole adapter of this model")
    check_finite(str(adapter), ((n, p) for n, p in model.named_parameters() if "lora_" in n))
    return model


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without what peft says for its own developers, and without its note of weights that are missing, which are refused."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it asks transformers by an old name
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
        yield


def merge_to_folder(
    base: ModelConfig, adapter: Path, folder: Path, seed: int = 0, check: Callable[[Any], None] | None = None
) -> Path:
    """The merged model as a folder that `transformers` loads; made once, and again when base, adapter or folder has changed.

    It is read back, and its logits compared with the unmerged model's, before it gets its name.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    wanted = {"adapter": model_sha256(adapter), "base": base.model_dump(mode="json"), "files": _files(Path(base.path))}
    if _mark(folder) == {**wanted, "written": model_sha256(folder) if folder.is_dir() else None}:
        return folder
    aside = aside_of(folder)
    shutil.rmtree(aside, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        merged = merged_model(base, adapter, torch.device("cpu"), seed, check)
        save_model(merged, load_processor(base) if base.sees else load_tokenizer(str(adapter)), aside)
        auto: Any = AutoModelForImageTextToText if base.sees else AutoModelForCausalLM
        again = auto.from_pretrained(aside, dtype=torch.float32).eval()
        _check_equal(str(folder), _probe(merged), _probe(again))
        (aside / MARK).write_text(json.dumps({**wanted, "written": model_sha256(aside)}, indent=1))
        shutil.rmtree(folder, ignore_errors=True)  # made of another adapter, or changed since
        os.rename(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _files(folder: Path) -> list[list[Any]]:
    """What tells that a model's folder was changed: a base may have many gigabytes."""
    folder = folder.expanduser()
    files = [p for p in sorted(folder.iterdir()) if p.suffix in WEIGHTS] if folder.is_dir() else []
    return [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]


def _mark(folder: Path) -> Any:
    try:
        return json.loads((folder / MARK).read_text())
    except (OSError, ValueError):
        return None


def _probe(model: Any, length: int = 12) -> Tensor:
    """Logits of a fixed row of tokens, (length, V)."""
    rows, device = model.get_input_embeddings().weight.shape[0], next(model.parameters()).device
    ids = torch.randint(0, rows, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode():
        return model(input_ids=ids, **without_cache(model)).logits[0].float().cpu()


def _check_equal(where: str, one: Tensor, other: Tensor) -> None:
    away = float((one - other).abs().max())
    allowed = TOLERANCE * max(1.0, float(one.abs().max()))
    if not away <= allowed:
        what = f"merging the adapter changed the logits by {away:.3g} (allowed: {allowed:.3g})"
        raise ModelError(where, what, "start the next stage from a full model")
