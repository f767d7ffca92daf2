"""Atomic checkpoints: written to a temporary folder, fsynced, hashed, then renamed. Safetensors and JSON, no pickle."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penchant.base.files import check_sums, file_sha256, fsync, sweep, temp_path, writing
from penchant.distributed.world import World, agreed, current
from penchant.errors import CheckpointError, DiskError
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
        write_model: writes the model into the given folder.
        tensors, state: what a resumed run needs besides the model; `state` must be JSON.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written.
    """
    root = folder / CHECKPOINTS
    final = root / f"step-{step}"
    temp = temp_path(final)
    try:
        with writing(final):
            root.mkdir(parents=True, exist_ok=True)
            sweep(root)
            temp.mkdir()
            write_model(temp / "model")
            write_tensors(temp / "state.safetensors", tensors)
            (temp / "state.json").write_text(json.dumps(dict(state), indent=1, allow_nan=False))
            sums = {str(p.relative_to(temp)): file_sha256(p) for p in sorted(temp.rglob("*")) if p.is_file()}
            for path in temp.rglob("*"):
                fsync(path)
            _finalize_checkpoint(temp, final, step, sums)
    except BaseException:
        shutil.rmtree(temp, ignore_errors=True)
        raise
    return final


# safetensors' names for dtypes
_SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file one tensor at a time; `save_file` would copy all GPU tensors to host memory at once."""
    in_order = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    ends = itertools.accumulate((t.nbytes for _, t in in_order), initial=0)
    entries = {
        name: {"dtype": _SAFETENSORS_DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": offsets}
        for (name, t), offsets in zip(in_order, itertools.pairwise(ends), strict=True)
    }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)  # the data must start 8-byte aligned
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for _, tensor in in_order:
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


SHARDS = "state"  # folder with one set of files per rank, in checkpoints written by several processes
FILE_BYTES = 128 << 20  # of a rank's shard per file: DCP holds a file's contents in memory twice before writing it


def save_sharded(
    folder: Path,
    step: int,
    *,
    write_model: Callable[[Path], None],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    world: World,
) -> Path:
    """Write the same checkpoint from all ranks; each writes its shard of every tensor to its own files in ``state/``.

    Each rank hashes the files it wrote; rank 0 renames the folder once all are done. If one fails, all of them stop.

    Args:
        write_model: called on every rank, writes on rank 0.
        world: all ranks, with process groups that nothing else uses meanwhile.

    Raises:
        CheckpointError: a rank's disk is full, or its folder cannot be written.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    root = folder / CHECKPOINTS
    final = root / f"step-{step}"
    temp: Path = world.share(temp_path(final))
    try:
        with world.together(), writing(final):
            if world.leads:
                root.mkdir(parents=True, exist_ok=True)
                sweep(root)
                (temp / SHARDS).mkdir(parents=True)
        with world.together(patient=True), writing(final):  # only rank 0 writes the model, perhaps slowly
            write_model(temp / "model")
        try:
            with writing(final), _reraise_cause():
                files = _assign_files(tensors, world.size * FILE_BYTES)
                writer = HuggingFaceStorageWriter(str(temp / SHARDS), files, save_distributed=True)
                dcp.save(dict(tensors), storage_writer=writer, process_group=world.group)
        except DiskError as error:  # DCP raises one rank's error on all ranks
            raise agreed(error) from None
        sums: dict[str, str] = {}
        with world.together(patient=True), writing(final):
            if world.leads:
                (temp / "state.json").write_text(json.dumps(dict(state), indent=1, allow_nan=False))
            for path in sorted(p for p in temp.rglob("*") if p.is_file()):
                is_shard = path.parent.name == SHARDS
                if path.name.startswith(f"shard-{world.rank + 1:05d}-") if is_shard else world.leads:
                    sums[str(path.relative_to(temp))] = file_sha256(path)
                    fsync(path)
        all_sums = {name: sha256 for part in world.gather(sums) for name, sha256 in part.items()}
        with world.together(), writing(final):
            if world.leads:
                for path in (p for p in temp.iterdir() if p.is_dir()):
                    fsync(path)
                _finalize_checkpoint(temp, final, step, all_sums)
    except BaseException:
        if world.leads:
            shutil.rmtree(temp, ignore_errors=True)
        raise
    return final


def copy_to_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy this rank's shard of all tensors to host memory, as they may change during the write."""
    from torch.distributed.checkpoint.staging import BlockingAsyncStager

    return BlockingAsyncStager().stage(dict(tensors))  # type: ignore[return-value]


def _assign_files(tensors: Mapping[str, Tensor], max_bytes: int) -> dict[str, int]:
    """Map each tensor to the number (from 1) of its file, which holds up to `max_bytes` bytes over all ranks, or one tensor."""
    numbers, number, used = {}, 1, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if used and used + size > max_bytes:
            number, used = number + 1, 0
        numbers[name], used = number, used + size
    return numbers


@contextmanager
def _reraise_cause() -> Iterator[None]:
    """Raise the first failing rank's own exception in place of DCP's, which is not an Exception."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from None


def _finalize_checkpoint(temp: Path, final: Path, step: int, sums: Mapping[str, str]) -> None:
    """Finish a checkpoint whose files are on disk: write its manifest and rename it."""
    (temp / MANIFEST).write_text(json.dumps({"step": step, "sha256": dict(sums)}, indent=1))
    fsync(temp / MANIFEST)
    fsync(temp)
    _remove(final)  # a resumed run reaches the same step again
    os.rename(temp, final)
    fsync(final.parent)


def _remove(path: Path) -> None:
    """Delete a checkpoint; it is renamed first, so that a kill midway leaves no partial checkpoint under its name."""
    if not path.exists():
        return
    discarded = temp_path(path.with_name(f"{path.name}-gone"))
    os.rename(path, discarded)
    shutil.rmtree(discarded, ignore_errors=True)


def latest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint of a run, and a warning for each newer one that is incomplete."""
    messages: list[str] = []
    for path in reversed(checkpoints(folder)):
        if (path / MANIFEST).exists():
            return path, messages
        messages.append(f"{path}: has no manifest, so it is incomplete; using an older checkpoint")
    return None, messages


def find_checkpoint(folder: Path, step: str) -> Path | None:
    """Find a run's checkpoint by name; None for the start (``0``), and for ``last`` if the run has none.

    Args:
        step: ``last``, ``best``, ``0`` or a step number.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    last, _ = latest_checkpoint(folder)
    if step == "0" or (step == "last" and last is None):
        return None
    if last is None:
        what = f"there is no checkpoint, so no step {step}"
        raise CheckpointError(str(folder), what, "give last or 0, or train first")
    if step == "last":
        return last
    names = [p.name for p in checkpoints(folder)]
    if step == "best":
        best = checkpoint_state(last).get("best_step")
        if best is None:
            how = f"give last, 0 or a step: {', '.join(names)}"
            raise CheckpointError(str(folder), "this run did not track a best checkpoint", how)
        step = str(best)
    path = folder / CHECKPOINTS / f"step-{step}"
    if path.name not in names:
        raise CheckpointError(str(path), "no such checkpoint", f"there are {', '.join(names)}; or last, best, 0")
    return path


def load_checkpoint(
    path: Path, masters: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load the tensors and state of a checkpoint, whether written by one process or several.

    Args:
        masters: the optimizer's master weights by parameter name; state tensors are sharded like these, if they are.

    Raises:
        CheckpointError: a file is missing or was changed after it was written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    world = current()
    with world.together(patient=True):
        if world.leads:  # one rank reads and hashes every file
            check_sums(path)
    try:
        state = json.loads((path / "state.json").read_text())
        if world.many or (path / SHARDS).is_dir():
            return _read_shards(path / SHARDS if (path / SHARDS).is_dir() else path, masters or {}), state
        return load_file(path / "state.safetensors"), state
    except (OSError, ValueError, SafetensorError) as error:
        how = f"delete {path} to go on from an older checkpoint"
        raise CheckpointError(str(path), f"cannot be read ({error})", how) from error


def _read_shards(folder: Path, masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Load all tensors from the safetensors files of a folder, whole or sharded as `masters` are."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    world, tensors = current(), {}
    for name, metadata in HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata.items():
        assert isinstance(metadata, TensorStorageMetadata)  # safetensors files hold only tensors
        master = masters.get(name.rpartition("/")[2])
        if world.many and master is not None and master.shape == metadata.size:
            tensors[name] = torch.zeros_like(master.detach(), dtype=metadata.properties.dtype)
        else:
            tensors[name] = torch.zeros(metadata.size, dtype=metadata.properties.dtype)
    reader = HuggingFaceStorageReader(str(folder))
    with warnings.catch_warnings(), _reraise_cause():
        # one process reading a checkpoint of several
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, process_group=world.group, no_dist=not world.many)
    return tensors


def prune(folder: Path, keep_last: int, best_step: int | None) -> None:
    """Delete all checkpoints except the newest `keep_last` and the best one; incomplete ones are deleted too."""
    existing = checkpoints(folder)
    complete = [p for p in existing if (p / MANIFEST).exists()]
    to_keep = {*complete[-keep_last:], folder / CHECKPOINTS / f"step-{best_step}"} & {*complete}
    for path in existing:
        if path not in to_keep:
            with suppress(OSError):
                _remove(path)
