"""The record of a run besides its checkpoints: manifest, samples; versions, hardware, hashes."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import penchant
from penchant.base.files import optional_write
from penchant.base.machine import cores, device_name, of_processor, why_not
from penchant.base.text import redact, without_passwords
from penchant.config import RunConfig, dump_config
from penchant.data.load import turns_of
from penchant.distributed.world import current
from penchant.runfolder import GIVEN_FOLDER, write_summed
from penchant.runs.sharing import Uncached
from penchant.types import Prompt

if TYPE_CHECKING:
    from penchant.runs.parts import Built
    from penchant.runs.rows import Rows

PACKAGES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "numpy")


def versions() -> dict[str, Any]:
    """Versions of Penchant, Python and the libraries that can affect results."""
    version_by_name: dict[str, Any] = {"penchant": penchant.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        version_by_name[package] = _version(package)
    return version_by_name


@cache  # reading a package's metadata takes as long as a step of a small model
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def hardware() -> dict[str, Any]:
    """CPU, cores, memory and threads; for NVIDIA GPUs how many are visible, the driver's CUDA version and torch's."""
    import torch

    cuda: dict[str, Any] = {}
    if torch.version.cuda and not why_not("cuda"):
        bindings: Any = torch._C
        major, minor = divmod(bindings._cuda_getDriverVersion() // 10, 100)
        cuda = {"gpus": torch.cuda.device_count(), "driver_cuda": f"{major}.{minor}", "cuda": torch.version.cuda}
        cuda["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None
    gpu = next((device_name(k) for k in ("cuda", "xpu", "mps") if not why_not(k)), None)
    return {
        "cpu": of_processor("model name"),
        "cores": cores(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "gpu": gpu,
        **cuda,
        "threads": torch.get_num_threads(),
        "platform": platform.system(),
    }


def tokenizer_sha256(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer: its full definition, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    definition = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    extra = f"{tokenizer.bos_token_id}|{tokenizer.eos_token_id}|{getattr(tokenizer, 'chat_template', None)}"
    return hashlib.sha256((definition + extra).encode()).hexdigest()


# ---- manifest ------------------------------------------------------------------------------------------------------------


def _given_files(config: RunConfig) -> list[str]:
    """The files in the run folder of objects given from Python that the config refers to."""
    text = dump_config(config)
    folder = Path(config.output) / GIVEN_FOLDER
    return sorted(p.name for p in folder.iterdir() if str(p) in text) if folder.is_dir() else []


def write_manifest(
    path: Path,
    rows: Rows,
    built: Built,
    sha256: str,
    started: float,
    seconds: float,
    steps: tuple[int, int],
    status: str,
    why: str | None,
    lr: float,
) -> None:
    """Write manifest.json: the run's components and progress.

    Args:
        sha256: of the weights before training, without an adapter; started: seconds since the epoch; seconds: of all
            sessions; steps: (done, of the whole run).
        status: running, finished, paused, interrupted or stopped; why: it ended early, or None; lr: the peak.
    """
    config, parts = built.parts.config, built.parts
    checkpointing = config.train.gradient_checkpointing
    data: dict[str, Any] = {
        name: {
            "layout": d.shape,
            "total": d.total,
            "accepted": d.accepted,
            "quarantined": len(d.quarantined),
            "fingerprint": d.fingerprint,
        }
        for name, d in rows.loaded.items()
    }
    for name, d in rows.datasets_by_source.items() if config.data.sources else ():
        data[f"source {name}"] = {"total": d.total, "accepted": d.accepted, "fingerprint": d.fingerprint}
    for name, split in zip(("train split", "held-out split"), rows.datasets, strict=True):
        if split is not None:
            data[name] = {"rows": len(split.trees), "fingerprint": split.fingerprint}
    manifest = {
        **versions(),
        "status": status,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(started)),
        "seconds": round(seconds, 1),
        "steps": steps[0],
        "total_steps": steps[1],
        **({"why": redact(why)} if why is not None else {}),
        "seed": config.train.seed,
        "loss": config.method.name,
        "peak_lr": lr,
        "model": {
            "path": config.model.path,
            "sha256": sha256,
            **({} if config.model.adapter is None else {"adapter": config.model.adapter}),
            "parameters": sum(p.numel() for p in parts.model.parameters()),
            "trainable_parameters": sum(p.numel() for p in parts.model.parameters() if p.requires_grad),
        },
        "tokenizer_sha256": tokenizer_sha256(rows.tokenizer),
        "packing": parts.engine.packing + (" (fast path)" if parts.engine.fast else ""),
        "attention": getattr(getattr(parts.engine, "scorer", parts.engine), "attention", None),
        "reference": built.reference_kind,
        "gradient_checkpointing": checkpointing if isinstance(checkpointing, str) else ("off", "layers")[checkpointing],
        "data": data,
        **({"processes": current().size} if current().many else {}),
        **({"given": given_files} if (given_files := _given_files(config)) else {}),
        "hardware": {**hardware(), "device": str(parts.device), "dtype": str(parts.dtype).removeprefix("torch.")},
    }
    write_summed(path, without_passwords(json.dumps(manifest, indent=1)))


# ---- samples -------------------------------------------------------------------------------------------------------------


def has_samples(config: RunConfig, rows: Rows) -> bool:
    """Whether completions of some prompts are sampled before and after training."""
    texts = config.method.signal == "tokens" and rows.datasets[0].kind == "text"
    return bool(config.evaluation.samples) and not config.method.learns_reward and not texts


def write_samples(
    path: Path, rows: Rows, model: Any, shared: Uncached, key: tuple[Any, ...] | None, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Generate greedy completions of the first held-out prompts and store them in a file for resumed runs.

    Args:
        key: what the starting model's completions depend on, so that runs from it share them; None after training.
        say: called with a note if the file cannot be written.
    """
    from penchant.rollout.generate import greedy

    config = rows.config
    count, max_new_tokens = config.evaluation.samples, config.evaluation.sample_tokens
    trees = (rows.trees[1] or rows.trees[0])[:count]
    prompts = [t.prompt_ids.tolist() for t in trees]
    model.eval()

    def write() -> list[str]:
        return greedy(model, rows.tokenizer, prompts, max_new_tokens=max_new_tokens)

    cache_key = ("answers", key, rows.key, bool(rows.trees[1]), count, max_new_tokens)
    texts = write() if key is None else shared.once(cache_key, write)
    turns = _prompt_messages(rows, [t.source for t in trees])
    samples = [
        {"prompt": rows.tokenizer.decode(p, skip_special_tokens=True), **messages, "completion": c}
        for p, messages, c in zip(prompts, turns, texts, strict=True)
    ]
    if current().leads:
        with optional_write(path, say):
            write_summed(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in samples))
    return samples


def _prompt_messages(rows: Rows, sources: Sequence[str]) -> list[dict[str, Any]]:
    """``{"messages": ...}`` of each prompt that is a conversation, as in its row; empty for a plain text."""
    dataset, wanted_sources = rows.datasets[1] if rows.trees[1] else rows.datasets[0], set(sources)
    prompts: dict[str, Prompt] = {}
    for tree in dataset.trees if dataset is not None else ():
        if len(prompts) == len(wanted_sources):
            break
        if tree.source in wanted_sources:
            prompts.setdefault(tree.source, tree.prompt)
    return [turns_of(prompts.get(source, "")) for source in sources]


def join_samples(path: Path, before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> None:
    """Write samples.jsonl: each prompt with its completion before and after training."""
    rows = [
        {**{k: v for k, v in a.items() if k != "completion"}, "before": b["completion"], "after": a["completion"]}
        for b, a in zip(before, after, strict=False)
    ]
    write_summed(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
