"""Merge a LoRA adapter into its base model, and check the result against the unmerged model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penchant.base.files import check_model_folder, file_sha256, one_at_a_time, temp_path
from penchant.base.machine import full_precision
from penchant.errors import ModelError
from penchant.models.folder import check_folder, read_object
from penchant.models.load import (
    base_model_of,
    load_causal_model,
    load_processor,
    load_tokenizer,
    save_model,
    without_cache,
)
from penchant.models.lora import with_adapter
from penchant.models.options import ModelConfig

MARK = "merged.json"  # records which base and adapter were merged into the folder, and a hash of what was written
WEIGHTS = (".safetensors", ".bin", ".json", ".txt", ".model", ".jinja")  # files that affect what a model computes
TOLERANCE = 1e-4  # of logits, relative to the largest: merging in fp32 only changes the order of sums


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
