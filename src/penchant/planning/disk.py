"""What a run leaves on disk: checkpoints as they are written, the reference's cache, logs; against the free space there."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from penchant.algorithms.options import PPOConfig
from penchant.planning.outline import OutlinedRun, parameter_counts
from penchant.planning.work import Work

LINE_BYTES = 900  # of metrics.jsonl and perf.jsonl, a step; an evaluation's line is longer and rarer
REPORT_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class Disk:
    """Bytes.

    Args:
        checkpoint: one of them; kept: how many stay; writing: the one that is written while the others are still there.
        cache: of the reference, where it is not there yet; logs: metrics, report, samples; free: where the run's folder will be.
    """

    checkpoint: int
    kept: int
    cache: int
    logs: int
    free: int

    @property
    def lasting(self) -> int:
        return self.checkpoint * self.kept + self.logs

    @property
    def peak(self) -> int:
        """While a checkpoint is written the oldest is still there."""
        return self.lasting + self.checkpoint

    @property
    def fits(self) -> bool:
        return self.peak + self.cache <= self.free


def disk_of(run: OutlinedRun, work: Work, cached: bool | None) -> Disk:
    """The estimate; `cached`: whether the reference's cache is there already (None: none is used)."""
    keep = run.config.checkpoint
    kept = min(work.checkpoints, keep.keep_last + (1 if keep.keep_best and work.evaluations else 0))
    completions = sum(len(t.completion_ids) for part in run.trees for t in part)
    tokens = sum(len(c) for part in run.trees for t in part for c in t.completion_ids)
    cache = 0
    if cached is False:
        cache = 4 * (completions + (tokens if "shared_logps" in run.needs else 0))
        cache += 4 * len(run.mismatched)
    logs = LINE_BYTES * (work.steps + 4 * work.evaluations) + REPORT_BYTES
    return Disk(_checkpoint(run), kept, cache, logs, _free(run.folder))


def _checkpoint(run: OutlinedRun) -> int:
    """The model in its dtype, and masters with both moments in fp32."""
    every, trainable = parameter_counts(run.model)
    size = torch.empty(0, dtype=run.dtype).element_size()
    state = trainable * 12
    if isinstance(run.online, PPOConfig) and run.online.value == "separate":
        state += every * 12
    if run.config.reference.moves:
        state += parameter_counts(run.model)[0] * 4
    whole = run.config.lora is None or run.reward_parts is not None  # a reward model is saved merged
    model = (every if whole else trainable) * size + (trainable * size if whole and run.config.lora else 0)
    return (model * (2 if run.config.checkpoint.pt else 1)) + state + _tokenizer(run)


def _tokenizer(run: OutlinedRun) -> int:
    folder = Path(run.config.model.tokenizer or run.config.model.path).expanduser()
    return sum(p.stat().st_size for p in folder.glob("tok*")) if folder.is_dir() else 4 << 20


def _free(folder: Path) -> int:
    """Free bytes of the disk that the nearest existing folder above is on."""
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    return shutil.disk_usage(there).free if os.access(there, os.R_OK) else 0
