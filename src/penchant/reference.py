"""The reference's log-probs: a frozen copy, the adapter switched off, or computed once and kept on disk."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from penchant.data.packing import pack, plan_microbatches, tree_tokens
from penchant.logprobs import CompletionLogps, Scorer
from penchant.types import PackedBatch, TokenTree

ENGINE_VERSION = "1"  # part of the cache key: raise it when the numbers of the engine change


class Reference(Protocol):
    """Where reference log-probs come from."""

    @property
    def exact(self) -> bool:
        """Whether equal weights give log-probs that are equal to the last bit (the same kernels on the same batch)."""

    def logps(self, batch: PackedBatch) -> Tensor:
        """Summed completion log-probs (C,) under the reference, without gradient."""


@dataclass(slots=True)
class LiveReference:
    """A reference that runs each step: a frozen copy (`off` does nothing) or the policy with its adapter switched off."""

    scorer: Scorer
    off: Callable[[], AbstractContextManager[Any]] = nullcontext
    exact: bool = True

    def logps(self, batch: PackedBatch) -> Tensor:
        return self.completion_logps(batch).sums

    def completion_logps(self, batch: PackedBatch) -> CompletionLogps:
        """Log-probs per completion and per token, without gradient."""
        model = self.scorer.model
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), self.off():
                return self.scorer.logps(batch)
        finally:
            model.train(training)


def adapter_off(scorer: Scorer) -> LiveReference:
    """The reference of a LoRA run: the same weights and kernels with the adapter disabled."""
    return LiveReference(scorer, off=scorer.model.disable_adapter)  # type: ignore[arg-type]


@dataclass(slots=True)
class CachedReference:
    """Reference log-probs by data set row."""

    by_row: dict[int, Tensor]
    exact: bool = False

    def logps(self, batch: PackedBatch) -> Tensor:
        return torch.cat([self.by_row[row] for row in batch.rows]).to(batch.input_ids.device)


def cache_key(weights_sha256: str, trees: Sequence[TokenTree], *, dtype: str, tokenizer: str, template: str) -> str:
    """The name of a cache: SHA-256 over what reference log-probs depend on, and nothing else.

    Model weights, tokenizer, template, every token id and boundary, and the dtype; not the learning rate, the output
    folder, the loss or the packing.
    """
    digest = hashlib.sha256()
    for part in (ENGINE_VERSION, weights_sha256, dtype, tokenizer, template):
        digest.update(part.encode() + b"\0")
    for tree in trees:
        for ids in (tree.prompt_ids, *tree.completion_ids):
            digest.update(len(ids).to_bytes(4, "little"))
            digest.update(ids.astype("<i4").tobytes())
        digest.update(b"|")
    return digest.hexdigest()


def default_cache_dir() -> Path:
    """``$PENCHANT_CACHE`` or ``~/.cache/penchant``."""
    return Path(os.environ.get("PENCHANT_CACHE", "~/.cache/penchant")).expanduser() / "reference"


def cached_reference(
    live: LiveReference,
    trees: Sequence[TokenTree],
    key: str,
    folder: Path,
    *,
    tokens_per_step: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[CachedReference, bool]:
    """Read the cache `key` in `folder`, or compute it and write it there (atomically).

    Returns:
        The reference, and whether it was found on disk.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / f"{key}.safetensors"
    counts = [len(t.completion_ids) for t in trees]
    if path.exists():
        try:
            sums = load_file(path)["sums"]
        except (SafetensorError, OSError, KeyError):
            sums = torch.empty(0)
        if len(sums) == sum(counts):  # a torn file is computed again
            return _by_row(trees, sums, counts), True
    sums = compute_logps(live, trees, tokens_per_step=tokens_per_step, progress=progress)
    folder.mkdir(parents=True, exist_ok=True)
    _write_atomically(path, sums)
    return _by_row(trees, sums, counts), False


def compute_logps(
    live: LiveReference,
    trees: Sequence[TokenTree],
    *,
    tokens_per_step: int,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Summed log-probs of all completions, in tree order, without gradient: (sum of k,)."""
    shared = live.scorer.shared
    sizes = [tree_tokens(t, shared) for t in trees]
    parts: dict[int, Tensor] = {}
    device = next(live.scorer.model.parameters()).device
    for members in plan_microbatches(sizes, tokens_per_step):
        sums = live.logps(pack([trees[i] for i in members], shared=shared).to(device)).cpu()
        counts = [len(trees[i].completion_ids) for i in members]
        parts |= dict(zip(members, sums.split(counts), strict=True))
        if progress is not None:
            progress(len(parts), len(trees))
    return torch.cat([parts[i] for i in range(len(trees))]) if trees else torch.empty(0)


def _by_row(trees: Iterable[TokenTree], sums: Tensor, counts: list[int]) -> CachedReference:
    return CachedReference({t.row: s for t, s in zip(trees, sums.split(counts), strict=True)})


def _write_atomically(path: Path, sums: Tensor) -> None:
    from safetensors.torch import save_file

    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    try:
        save_file({"sums": sums}, name)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
