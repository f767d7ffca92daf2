"""What a run ran on: versions, hardware, hashes."""

from __future__ import annotations

import hashlib
import os
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import penchant
from penchant.base.machine import cores

PACKAGES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "numpy")


def versions() -> dict[str, Any]:
    """Versions of Penchant, Python and the libraries whose changes could change a number."""
    found: dict[str, Any] = {"penchant": penchant.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        found[package] = _version(package)
    return found


@cache  # reading the metadata of a package takes as long as a step of a small model
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def hardware() -> dict[str, Any]:
    """CPU, cores, memory and threads."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_name(),
        "cores": cores(),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "platform": platform.system(),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        return platform.processor()


def tokenizer_sha256(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer: its full definition, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    definition = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    extra = f"{tokenizer.bos_token_id}|{tokenizer.eos_token_id}|{getattr(tokenizer, 'chat_template', None)}"
    return hashlib.sha256((definition + extra).encode()).hexdigest()
