"""What a run ran on: versions, hardware, hashes."""

from __future__ import annotations

import hashlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import penchant

PACKAGES = ("torch", "transformers", "peft", "safetensors", "tokenizers", "numpy")


def versions() -> dict[str, Any]:
    """Versions of Penchant, Python and the libraries whose changes could change a number."""
    found: dict[str, Any] = {"penchant": penchant.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def hardware() -> dict[str, Any]:
    """CPU, cores, memory and threads."""
    import torch

    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(pages / 2**30, 1),
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
