"""What is asked for: which checkpoint, in which form, where to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Q8 = "q8_0"


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """An export.

    Args:
        run: a run's folder or one of its checkpoints; to: a name of `formats.FORMATS`; step: last, best or a step's number.
        output: folder to write, which must not be there (but for a push of what was exported before); None: ``RUN/export/step-N-FORMAT``.
        dtype: fp32, bf16, fp16, for GGUF also q8_0; auto: what the checkpoint is stored in.
        max_shard_size: of one safetensors file, as ``5GB``; push: ``owner/name`` on the hub; private: for a repository that it makes.
    """

    run: str | Path
    to: str
    step: str = "last"
    output: str | Path | None = None
    dtype: str = "auto"
    max_shard_size: str = "5GB"
    push: str | None = None
    private: bool = False
