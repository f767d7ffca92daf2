"""Merge a LoRA adapter into its base model, and check the result against the unmerged model."""

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

from penchant.base.files import check_model_folder, file_sha256, one_at_a_time, temp_path
from penchant.base.machine import full_precision
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

MARK = "merged.json"  # records which base and adapter were merged into the folder, and a hash of what was written
WEIGHTS = (".safetensors", ".bin", ".json", ".txt", ".model", ".jinja")  # files that affect what a model computes
TOLERANCE = 1e-4  # of logits, relative to the largest: merging in fp32 only changes the order of sums


def is_adapter(folder: Path) -> bool:
    """Whether a model folder holds a LoRA adapter rather than a model."""
    return (folder / "adapter_config.json").exists()


def adapter_base(folder: Path) -> str | None:
    """The base model named in an adapter folder; None if it names none.

    Raises:
        ModelError: its adapter_config.json cannot be read.
    """
    base = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
    return base if isinstance(base, str) and base else None


def model_sha256(folder: Path) -> str:
    """SHA-256 over names and contents of a model folder's files: weights, config, tokenizer.

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
        base: the model section of the run that trained the adapter; seed: of that run (used if the base starts from random weights).
        check: called with the bare base model; raises if it is the wrong one.

    Raises:
        ModelError: not an adapter of a causal model, or merging changes the logits.
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
    with full_precision(device):  # the order of sums differs, and TF32 would round them by more than is allowed
        before = _probe(model)
        merged = base_model_of(model.merge_and_unload(safe_merge=True))  # type: ignore[operator]
        _check_equal(str(adapter), before, _probe(merged))
    return merged


def lora_section(adapter: Path, section: LoraConfig | None = None) -> LoraConfig:
    """The `lora` section of a run that continues to train an adapter: the adapter's own settings, updated from `section`.

    Args:
        section: the config's `lora` section; it may change dropout and lr_ratio, and must agree with the adapter otherwise.

    Raises:
        ConfigError: `section` contradicts the adapter. ModelError: the adapter cannot be trained further.
    """
    check_folder(adapter)
    file = adapter / "adapter_config.json"
    values = read_object(file)
    _check_trainable(file, values)
    targets = values.get("target_modules")
    with loading(str(file), "is not a config of a LoRA adapter", "get it again"):
        settings = LoraConfig(
            r=values["r"],
            alpha=float(values["lora_alpha"]),
            dropout=float(values.get("lora_dropout") or 0.0),
            target_modules=targets if isinstance(targets, str) else sorted(targets or ()),
            rslora=bool(values.get("use_rslora")),
            dora=bool(values.get("use_dora")),
        )
    if section is None:
        return settings
    set_fields, given_values, own_values = section.model_fields_set, section.model_dump(), settings.model_dump()
    for name in sorted(set_fields & {"r", "alpha", "rslora", "dora"}):
        if given_values[name] != own_values[name]:
            _contradicted(name, given_values[name], own_values[name], adapter)
    # target_modules may be a pattern: `trained_on` compares it once the model is loaded
    updates = {name: given_values[name] for name in set_fields & {"dropout", "lr_ratio", "target_modules"}}
    if isinstance(updates.get("target_modules"), list):
        updates["target_modules"] = sorted(updates["target_modules"])
    return settings.model_copy(update=updates)


def _check_trainable(file: Path, values: Mapping[str, Any]) -> None:
    """Refuse an adapter that is more than low-rank updates of frozen weights."""
    if values.get("peft_type") != "LORA" or values.get("task_type") != "CAUSAL_LM":
        what = f"is an adapter of type {values.get('peft_type')}, {values.get('task_type')}"
        raise ModelError(str(file), what, "name a LoRA adapter of a causal language model")
    init = values.get("init_lora_weights", True)
    extras = [key for key in ("modules_to_save", "trainable_token_indices", "layer_replication") if values.get(key)]
    extras += ["bias"] if values.get("bias", "none") != "none" or values.get("lora_bias") else []
    extras += [f"init_lora_weights: {init}"] if str(init).startswith(("pissa", "olora", "corda", "loftq")) else []
    if extras:
        what = f"holds more than low-rank updates ({', '.join(extras)}), and only those can be trained further here"
        raise ModelError(str(file), what, "merge it (name it as model.path) and train a new adapter")


def _contradicted(name: str, theirs: Any, ours: Any, adapter: Path) -> None:
    what = f"is {theirs}, but the adapter in {adapter} has {ours}"
    raise ConfigError(f"lora.{name}", what, "leave it out: the value comes from model.adapter")


def trained_on(base: Any, adapter: Path, lora: LoraConfig, seed: int) -> Any:
    """Add a trainable copy of an existing adapter to a model in fp32; everything else is frozen.

    Args:
        lora: from `lora_section`; seed: for torch's random numbers, as for a new adapter.

    Raises:
        ConfigError: `lora` names other layers than the adapter has, or it cannot be merged. ModelError: not an adapter of this model.
    """
    from peft import PeftConfig

    torch.manual_seed(seed)
    with loading(str(adapter), "its adapter_config.json could not be read", "give a LoRA adapter"), quiet_peft():
        config: Any = PeftConfig.from_pretrained(str(adapter))
    config.lora_dropout, config.inference_mode = lora.dropout, False
    targets = lora.target_modules
    own_targets = config.target_modules
    expected = (
        None
        if targets == (own_targets if isinstance(own_targets, str) else sorted(own_targets or ()))
        else _matching(base, config, targets)
    )
    model = _beside(base, adapter, config)
    adapted = {plain_name(name).rpartition(".")[0] for name, _ in adapters_of(base_model_of(model))}
    if expected is not None and expected != adapted:
        kinds = sorted({name.rpartition(".")[2] for name in adapted})
        _contradicted("target_modules", targets, f"{len(adapted)} layers, {', '.join(kinds)}", adapter)
    check_adapter(model)
    return model


def _matching(base: Any, config: Any, targets: str | list[str]) -> set[str]:
    """Names of the layers that peft would adapt for these targets."""
    from peft import LoraConfig as PeftLoraConfig
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists

    peft_config = PeftLoraConfig(task_type=config.task_type, target_modules=targets)
    expanded = _maybe_include_all_linear_layers(peft_config, base)
    return {name for name, _ in base.named_modules() if name and check_target_module_exists(expanded, name)}


def with_adapter(base: Any, adapter: Path) -> Any:
    """Load a LoRA adapter onto a model, unmerged, in fp32 and eval mode, as users of peft do.

    Raises:
        ModelError: the folder holds no complete adapter of this model.
    """
    check_folder(adapter)
    return _beside(base, adapter).float().eval()


def _beside(base: Any, adapter: Path, config: Any = None) -> Any:
    """Load an adapter onto a model and check that it is complete; `config`: peft config to train it with, not the folder's."""
    from peft import PeftModel, get_peft_model_state_dict

    with loading(str(adapter), "the adapter could not be loaded", "give an adapter of this model"), quiet_peft():
        trainable = config is not None
        model = PeftModel.from_pretrained(
            base, str(adapter), config=config, is_trainable=trainable, autocast_adapter_dtype=False
        )
        expected, stored = set(get_peft_model_state_dict(model)), set(headers(adapter))
    differences = sorted(expected ^ stored)
    if stored and differences:
        what = "lacks" if differences[0] in expected else "has, beyond what its config says,"
        raise ModelError(str(adapter), f"the adapter {what} {differences[0]}", "give a whole adapter of this model")
    check_finite(str(adapter), ((n, p) for n, p in model.named_parameters() if "lora_" in n))
    return model


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence peft's deprecation warnings, and its warning about missing weights, which are refused here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it uses a deprecated name of transformers
        warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
        yield


def merge_to_folder(
    base: ModelConfig, adapter: Path, folder: Path, seed: int = 0, check: Callable[[Any], None] | None = None
) -> Path:
    """Write the merged model to a folder that `transformers` loads; skipped if base, adapter and folder are unchanged.

    The folder is read back, and its logits compared with the merged model's, before it is renamed into place. If several
    processes need it, one of them merges and the others wait.
    """
    sources = {"adapter": model_sha256(adapter), "base": base.model_dump(mode="json"), "files": _files(Path(base.path))}

    def is_merged() -> bool:
        return bool(_mark(folder) == {**sources, "written": model_sha256(folder) if folder.is_dir() else None})

    if not is_merged():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(folder.with_name(f".{folder.name}.lock")):
            if not is_merged():
                _merge(base, adapter, folder, seed, check, sources)
    return folder


def _merge(
    base: ModelConfig,
    adapter: Path,
    folder: Path,
    seed: int,
    check: Callable[[Any], None] | None,
    sources: Mapping[str, Any],
) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    temp = temp_path(folder)
    shutil.rmtree(temp, ignore_errors=True)
    try:
        merged = merged_model(base, adapter, torch.device("cpu"), seed, check)
        save_model(merged, _tokenizer(base, adapter), temp)
        auto: Any = AutoModelForImageTextToText if base.sees else AutoModelForCausalLM
        reloaded = auto.from_pretrained(temp, dtype=torch.float32).eval()
        _check_equal(str(folder), _probe(merged), _probe(reloaded))
        (temp / MARK).write_text(json.dumps({**sources, "written": model_sha256(temp)}, indent=1))
        shutil.rmtree(folder, ignore_errors=True)  # merged from another base or adapter, or modified since
        os.rename(temp, folder)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _tokenizer(base: ModelConfig, adapter: Path) -> Any:
    """The adapter's tokenizer, or the base's if other tools saved the adapter alone; a vision-language model's processor."""
    if base.sees:
        return load_processor(base)
    if (adapter / "tokenizer_config.json").exists():
        return load_tokenizer(str(adapter))
    return load_tokenizer(base.tokenizer or base.path, base.revision_of(base.tokenizer))


def _files(folder: Path) -> list[list[Any]]:
    """Name, size and mtime of a model's files, to detect changes: hashing gigabytes of a base would take long."""
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
    vocab, device = model.get_input_embeddings().weight.shape[0], next(model.parameters()).device
    ids = torch.randint(0, vocab, (1, length), generator=torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode():
        return model(input_ids=ids, **without_cache(model)).logits[0].float().cpu()


def _check_equal(where: str, one: Tensor, other: Tensor) -> None:
    difference = float((one - other).abs().max())
    allowed = TOLERANCE * max(1.0, float(one.abs().max()))
    if not difference <= allowed:
        what = f"merging the adapter changed the logits by {difference:.3g} (allowed: {allowed:.3g})"
        raise ModelError(where, what, "start the next stage from a full model")
