"""Checkpoints: written aside, fsynced, summed, renamed; a reader sees all of one or nothing. Safetensors and JSON, no pickle."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from penchant.base.files import aside_of, check_sums, file_sha256, fsync, sweep, writing
from penchant.errors import CheckpointError
from penchant.runfolder import CHECKPOINTS, MANIFEST, checkpoint_state, checkpoints


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    write_model: Callable[[Path], None],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> Path:
    """Write ``checkpoints/step-N``: ``model/``, ``state.safetensors``, ``state.json`` and a manifest of SHA-256 sums.

    Args:
        folder: the run folder; step: optimizer steps done.
        write_model: writes the model into the folder that it is given.
        tensors, state: what a resumed run needs beside the model; `state` must be JSON.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written.
    """
    from safetensors.torch import save_file

    root = folder / CHECKPOINTS
    final = root / f"step-{step}"
    aside = aside_of(final)
    try:
        with writing(final):
            root.mkdir(parents=True, exist_ok=True)
            sweep(root)
            aside.mkdir()
            write_model(aside / "model")
            save_file({k: v.contiguous() for k, v in tensors.items()}, aside / "state.safetensors")
            (aside / "state.json").write_text(json.dumps(dict(state), indent=1, allow_nan=False))
            sums = {str(p.relative_to(aside)): file_sha256(p) for p in sorted(aside.rglob("*")) if p.is_file()}
            for path in aside.rglob("*"):
                fsync(path)
            (aside / MANIFEST).write_text(json.dumps({"step": step, "sha256": sums}, indent=1))
            fsync(aside / MANIFEST)
            fsync(aside)
            _remove(final)  # a resumed run reaches the same step again
            os.rename(aside, final)
            fsync(root)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return final


def _remove(path: Path) -> None:
    """Delete a checkpoint; renamed first, so that whoever is killed in it leaves no half of one at its name."""
    if not path.exists():
        return
    gone = aside_of(path.with_name(f"{path.name}-gone"))
    os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def latest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a run, and a warning for each newer one that is not whole."""
    warnings: list[str] = []
    for path in reversed(checkpoints(folder)):
        if (path / MANIFEST).exists():
            return path, warnings
        warnings.append(f"{path}: no manifest, so it is not whole; an older checkpoint is taken")
    return None, warnings


def find_checkpoint(folder: Path, step: str) -> Path | None:
    """A run's checkpoint by name; None for the start (``0``), and for ``last`` of a run that has none.

    Args:
        step: ``last``, ``best``, ``0`` or a step's number.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    last, _ = latest_checkpoint(folder)
    if step == "0" or (step == "last" and last is None):
        return None
    if last is None:
        raise CheckpointError(
            str(folder), f"there is no checkpoint, so no step {step}", "give last or 0, or train first"
        )
    if step == "last":
        return last
    there = [p.name for p in checkpoints(folder)]
    if step == "best":
        best = checkpoint_state(last).get("best_step")
        if best is None:
            raise CheckpointError(
                str(folder), "this run did not look for its best step", f"give last, 0 or a step: {', '.join(there)}"
            )
        step = str(best)
    path = folder / CHECKPOINTS / f"step-{step}"
    if path.name not in there:
        raise CheckpointError(str(path), "no such checkpoint", f"there are {', '.join(there)}; or last, best, 0")
    return path


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and state of a checkpoint.

    Raises:
        CheckpointError: a file is missing or was changed after it was written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_sums(path)
    try:
        return load_file(path / "state.safetensors"), json.loads((path / "state.json").read_text())
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            str(path), f"cannot be read ({error})", f"delete {path} to go on from an older checkpoint"
        ) from error


def prune(folder: Path, keep_last: int, best_step: int | None) -> None:
    """Delete all checkpoints but the newest `keep_last` and the best one; also those that are not whole."""
    there = checkpoints(folder)
    whole = [p for p in there if (p / MANIFEST).exists()]
    kept = {*whole[-keep_last:], folder / CHECKPOINTS / f"step-{best_step}"} & {*whole}
    for path in there:
        if path not in kept:
            with suppress(OSError):
                _remove(path)
