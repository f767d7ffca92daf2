"""Reference log-probs: from a frozen copy, from the policy with its adapter disabled, or precomputed and cached on disk."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from penchant.base.files import atomic_path, one_at_a_time, optional_write, sweep
from penchant.base.machine import moved, place_of
from penchant.data.mapped import StoredTokens, part_lengths, ranges
from penchant.data.packing import run_passes
from penchant.distributed.shard import Rooted, dealt_as, is_sharded, local, reshard
from penchant.distributed.world import current
from penchant.logprobs import CompletionLogps, Scorer
from penchant.logprobs.head import RowLogits
from penchant.models.cpu.layers import adapters_as
from penchant.models.load import tensors_sha256
from penchant.types import PackedBatch, TokenTree

BLOCK = 8192  # trees hashed at a time
ENGINE_VERSION = "1"  # part of the cache key: raise it if the engine's numbers change


class Reference(Protocol):
    """A source of reference log-probs."""

    @property
    def exact(self) -> bool:
        """Whether equal weights give bitwise equal log-probs (same kernels on the same batch)."""

    def logps(self, batch: PackedBatch) -> Tensor:
        """Summed completion log-probs (C,) under the reference, without gradient."""

    def token_logps(self, batch: PackedBatch) -> Tensor:
        """Log-probs (R,) of every completion token under the reference, without gradient."""


@dataclass(slots=True)
class LiveReference:
    """A reference that is computed at each step: a frozen copy, or the policy with its adapter disabled or in an earlier state.

    Args:
        off: context in which the model is in the reference's state; adapters: the same for the fast path, see `adapters_as`.
    """

    scorer: Scorer
    off: Callable[[], AbstractContextManager[Any]] = nullcontext
    adapters: Mapping[Tensor, Tensor] | None = None
    exact: bool = True

    def logps(self, batch: PackedBatch) -> Tensor:
        return self.completion_logps(batch).sums

    def token_logps(self, batch: PackedBatch) -> Tensor:
        return self.completion_logps(batch).tokens

    def row_logits(self, batch: PackedBatch) -> RowLogits:
        """Return a function from a slice of predicting positions to the reference's logits, for exact divergences."""
        with self.at_rest():
            rows = self.scorer.row_logits(batch)

        def without_adapter(part: slice) -> Tensor:
            with self.off():  # for an adapter on the head itself
                return rows(part)

        return rows if self.scorer.plain_head else without_adapter

    def completion_logps(self, batch: PackedBatch) -> CompletionLogps:
        """Log-probs per completion and per token, without gradient."""
        with self.at_rest():
            return self.scorer.logps(batch)

    @property
    def side_by_side(self) -> bool:
        """Whether several threads may run passes at once, in parallel with passes of the policy."""
        return self.scorer.side_by_side

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Context with the model in the reference's state, without gradient.

        If `side_by_side`, the model itself is not changed, because other threads may be training it.
        """
        model = self.scorer.model
        if self.scorer.side_by_side:
            with torch.no_grad(), nullcontext() if self.adapters is None else adapters_as(self.adapters):
                yield
            return
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), self.off():
                yield
        finally:
            model.train(training)


def adapter_off(scorer: Scorer) -> LiveReference:
    """The reference of a LoRA run: the policy's weights and kernels with the adapter disabled."""
    return LiveReference(scorer, off=scorer.model.disable_adapter, adapters={})  # type: ignore[arg-type]


def adapter_as_it_is(scorer: Scorer) -> LiveReference:
    """The policy with its adapter frozen in its current state, as a reference. Copies the adapter and no other weights."""
    initial: dict[Tensor, Tensor] = {
        p: local(p).detach().clone() for n, p in scorer.model.named_parameters() if "lora_" in n
    }

    @contextmanager
    def put_back() -> Iterator[None]:
        saved = [p.data for p in initial]
        try:
            for p, value in initial.items():
                p.data = value
            yield
        finally:
            for p, data in zip(initial, saved, strict=True):
                p.data = data

    @contextmanager
    def put_back_in_place() -> Iterator[None]:
        # torch's FSDP gathers from the shards' own memory
        shards = [local(p.detach()) for p in initial]
        saved = [s.clone() for s in shards]
        try:
            torch._foreach_copy_(shards, list(initial.values()))
            yield
        finally:
            torch._foreach_copy_(shards, saved)

    if any(map(is_sharded, initial)):
        return LiveReference(scorer, off=put_back_in_place)
    return LiveReference(scorer, off=put_back, adapters=initial)


@dataclass(slots=True)
class MovingReference(LiveReference):
    """A frozen copy that follows the policy (TR-DPO, arXiv 2404.09656): ``ref <- (1 - mixup) ref + mixup policy``.

    Updates every `every` optimizer steps. ``mixup=1`` is a hard update; ``every=1, mixup=0.01`` is an exponential moving
    average with decay 0.99. The average is kept in fp32, because bf16 would round small steps away.

    Args:
        policy: returns the policy's weights in fp32, under the names of the reference's parameters.
    """

    policy: Callable[[], Mapping[str, Tensor]] = dict
    every: int = 1
    mixup: float = 1.0
    masters: dict[str, Tensor] = field(default_factory=dict)

    def after_step(self, step: int) -> None:
        """Update if optimizer step `step` (1-based) is a multiple of `every`."""
        if step % self.every:
            return
        parameters = self._parameters()
        with torch.no_grad():
            # PPO's value head is not part of the policy
            trained = {n: value for n, value in self.policy().items() if n in parameters}
            policy_weights = {
                n: dealt_as(parameters[n], moved(value, parameters[n].device)) for n, value in trained.items()
            }
            for name, value in policy_weights.items():
                if name not in self.masters:
                    self.masters[name] = parameters[name].detach().to(value.dtype, copy=True)
            masters = [local(self.masters[name]) for name in policy_weights]
            torch._foreach_lerp_(masters, [local(value) for value in policy_weights.values()], self.mixup)
            torch._foreach_copy_([local(parameters[name]) for name in policy_weights], masters)

    def _parameters(self) -> dict[str, Tensor]:
        if isinstance(self.scorer, Rooted):
            reshard(self.scorer.root)  # an exact divergence leaves the head unsharded
        return dict(self.scorer.model.named_parameters())

    def state_tensors(self) -> dict[str, Tensor]:
        """The averaged weights, in fp32."""
        return dict(self.masters)

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore the tensors of `state_tensors`."""
        parameters = self._parameters()
        with torch.no_grad():
            for name, value in tensors.items():
                self.masters[name] = dealt_as(parameters[name], value.clone().to(parameters[name].device))
                local(parameters[name]).copy_(local(self.masters[name]))


# prefix of a moving reference's tensors in a checkpoint
OF_REFERENCE = "reference/"


def followed(reference: Reference | None, step: int) -> None:
    """Update a moving reference after optimizer step `step` (1-based), if it is due; other references are unchanged."""
    if isinstance(reference, MovingReference):
        reference.after_step(step)


def moved_state(reference: Reference | None) -> dict[str, Tensor]:
    """The tensors of a reference to save in a checkpoint: empty unless it is a moving reference."""
    if not isinstance(reference, MovingReference):
        return {}
    return {f"{OF_REFERENCE}{name}": value for name, value in reference.state_tensors().items()}


def load_moved_state(reference: Reference | None, tensors: Mapping[str, Tensor]) -> None:
    """Restore the tensors of `moved_state`; other tensors are ignored."""
    if isinstance(reference, MovingReference):
        state = {n.removeprefix(OF_REFERENCE): v for n, v in tensors.items() if n.startswith(OF_REFERENCE)}
        reference.load_state_tensors(state)


@dataclass(slots=True)
class CachedReference:
    """Precomputed reference log-probs by dataset row: per completion and, if requested, per token.

    A batch that already carries them in `columns` has them on its device.
    """

    by_row: Mapping[int, Tensor]
    tokens_by_row: Mapping[int, Tensor] = field(default_factory=dict)
    exact: bool = False

    def logps(self, batch: PackedBatch) -> Tensor:
        return self._column(batch, "ref_logps", self.by_row)

    def token_logps(self, batch: PackedBatch) -> Tensor:
        return self._column(batch, "ref_token_logps", self.tokens_by_row)

    def columns(self, batch: PackedBatch, *, tokens: bool) -> dict[str, Tensor]:
        """The columns to attach to a batch on the CPU."""
        return {"ref_token_logps": self.token_logps(batch)} if tokens else {"ref_logps": self.logps(batch)}

    def _column(self, batch: PackedBatch, name: str, by_row: Mapping[int, Tensor]) -> Tensor:
        if name in batch.columns:
            return batch.columns[name]
        return moved(torch.cat([by_row[row] for row in batch.rows]), batch.input_ids.device)


def cache_key(weights_sha256: str, trees: Sequence[TokenTree], *, dtype: str, tokenizer: str, template: str) -> str:
    """The name of a cache: SHA-256 over exactly what reference log-probs depend on.

    These are the model's weights (and the config settings that affect its outputs), tokenizer, template, every token id and
    boundary, and the dtype, but not the learning rate, output folder, loss or packing.
    """
    digest = hashlib.sha256()
    for part in (ENGINE_VERSION, weights_sha256, dtype, tokenizer, template):
        digest.update(part.encode() + b"\0")
    hash_trees(digest, trees)
    return digest.hexdigest()


def hash_trees(digest: Any, trees: Sequence[TokenTree]) -> None:
    """Update a digest with every token id and boundary of the trees, in order."""
    for start in range(0, len(trees), BLOCK):
        parts, lengths, ids = _parts(trees, start, min(start + BLOCK, len(trees)))
        # each part is its length and its ids, 4 bytes each; each tree is followed by one byte
        ends = np.cumsum(lengths + 1)
        words = np.empty(int(ends[-1]), dtype="<i4")
        is_id = np.ones(len(words), dtype=bool)
        is_id[ends - lengths - 1] = False
        words[~is_id], words[is_id] = lengths, ids
        data = words.view(np.uint8).data
        bounds = (4 * np.r_[0, ends[np.cumsum(parts) - 1]]).tolist()
        digest.update(b"|".join([data[a:b] for a, b in itertools.pairwise(bounds)]) + b"|")


def _parts(trees: Sequence[TokenTree], start: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For trees `start` to `end`: number of parts of each (including masks), tokens of each part, and the ids of all parts."""
    if isinstance(trees, StoredTokens) and not trees.masked:
        return trees.part_counts(start, end), trees.part_lengths(start, end), trees.part_ids(start, end)
    per_tree = [(t.prompt_ids, *t.completion_ids, *t.masks) for t in trees[start:end]]
    counts, flat = [len(parts) for parts in per_tree], [part for parts in per_tree for part in parts]
    return np.array(counts), np.array(list(map(len, flat))), np.concatenate(flat)


def cached_reference(
    live: LiveReference,
    trees: Sequence[TokenTree],
    key: str,
    folder: Path,
    *,
    tokens_per_step: int,
    tokens: bool = False,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[CachedReference, bool]:
    """Read the cache `key` in `folder`, or compute it and write it there atomically.

    Recomputes a damaged file, and continues without a cache if it cannot be written; `say` gets a note in both cases.

    Args:
        tokens: also store log-probs per token.

    Returns:
        The reference, and whether it was found on disk.
    """
    path = folder / f"{key}.safetensors"
    count = int(_sizes(trees)[0].sum())

    def on_disk(say: Callable[[str], None]) -> dict[str, Tensor] | None:
        stored = _read(path, say)
        # recompute a cache without per-token log-probs if they are requested
        return stored if len(stored.get("sums", ())) == count and (not tokens or "tokens" in stored) else None

    def computed() -> dict[str, Tensor]:
        logps = compute_logps(live, trees, tokens_per_step=tokens_per_step, progress=progress)
        return {"sums": logps.sums} | ({"tokens": logps.tokens} if tokens else {})

    world = current()
    stored = world.share(on_disk(say) if world.leads else None)
    if stored is not None:
        return _by_row(trees, stored), True
    if world.many:  # no lock: a rank waiting for it would block the other ranks
        stored = computed()
        if world.leads:
            with optional_write(path, say):
                folder.mkdir(parents=True, exist_ok=True)
                _write_atomically(path, stored)
        return _by_row(trees, stored), False
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(one_at_a_time(folder / f".{key}.lock"))
        except OSError as error:
            say(f"{folder}: {error.strerror}; the reference's log-probs are not cached")
            return _by_row(trees, computed()), False
        stored = on_disk(lambda _: None)  # another process may have computed it while this one waited
        if stored is not None:
            return _by_row(trees, stored), True
        stored = computed()
        sweep(folder, f"{path.name}-*")
        with optional_write(path, say):
            _write_atomically(path, stored)
    return _by_row(trees, stored), False


def _read(path: Path, say: Callable[[str], None]) -> dict[str, Tensor]:
    """The tensors of a cache file; empty if it is missing, damaged, or from an older version without a checksum."""
    from safetensors import SafetensorError, safe_open

    try:
        if not path.exists():
            return {}
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        if metadata is not None and metadata.get("sha256") == _sha256(stored):
            return stored
        has_checksum = metadata is not None and "sha256" in metadata
        reason = "its checksum does not match" if has_checksum else "it has no checksum (written by an older version)"
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        reason = str(error)
    say(f"{path}: {reason}; recomputing the reference log-probs")
    return {}


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    return tensors_sha256(sorted(tensors.items()))


def compute_logps(
    live: LiveReference,
    trees: Sequence[TokenTree],
    *,
    tokens_per_step: int,
    progress: Callable[[int, int], None] | None = None,
) -> CompletionLogps:
    """Log-probs of all completions, in tree order, without gradient: sums (total completions,) and tokens (total tokens,)."""
    shared, done = live.scorer.shared, 0
    sizes = _sizes(trees)
    ends = [np.cumsum(n) for n in sizes]
    outputs = [torch.empty(int(n.sum())) for n in sizes]
    device = place_of(live.scorer.model)
    passes = run_passes(
        live.completion_logps, trees, tokens_per_step, shared=shared, device=device, lanes=live.side_by_side
    )
    for members, logps in passes:
        for k, values in enumerate((logps.sums.cpu(), logps.tokens.cpu())):
            outputs[k] = outputs[k].to(values.dtype)
            outputs[k][torch.from_numpy(ranges((ends[k] - sizes[k])[members], sizes[k][members]))] = values
        done += len(members)
        if progress is not None:
            progress(done, len(trees))
    return CompletionLogps(*outputs)


class RowParts(Mapping[int, Tensor]):
    """Slices of long tensors by dataset row, made on access because a million small tensors would take seconds to create.

    Args:
        segments: (first row, (n,) int64 end of each row's slice, tensor) for n consecutive rows.
    """

    def __init__(self, segments: Sequence[tuple[int, np.ndarray, Tensor]]) -> None:
        self.segments = tuple(segments)

    def __getitem__(self, row: int) -> Tensor:
        for first, ends, values in self.segments:
            index = row - first
            if 0 <= index < len(ends):
                return values[int(ends[index - 1]) if index else 0 : int(ends[index])]
        raise KeyError(row)

    def __iter__(self) -> Iterator[int]:
        return itertools.chain.from_iterable(range(f, f + len(ends)) for f, ends, _ in self.segments)

    def __len__(self) -> int:
        return sum(len(ends) for _, ends, _ in self.segments)


def joined(references: Sequence[CachedReference]) -> CachedReference:
    """Combine several references into one for all their rows."""
    return CachedReference(_joined([r.by_row for r in references]), _joined([r.tokens_by_row for r in references]))


def _joined(parts: Sequence[Mapping[int, Tensor]]) -> Mapping[int, Tensor]:
    if all(isinstance(p, RowParts) for p in parts):
        return RowParts([s for p in parts if isinstance(p, RowParts) for s in p.segments])
    return {row: values for part in parts for row, values in part.items()}


def _sizes(trees: Sequence[TokenTree]) -> tuple[np.ndarray, np.ndarray]:
    """For each tree, its number of completions and of trained completion tokens; both (n,) int64."""
    if not isinstance(trees, StoredTokens) or trees.masked:
        sizes = [(len(t.completion_ids), sum(t.trained)) for t in trees]
        counts, tokens = np.array(sizes, dtype=np.int64).reshape(-1, 2).T
        return counts, tokens
    parts, lengths = part_lengths(trees)
    starts = np.cumsum(parts) - parts
    totals = np.add.reduceat(lengths, starts) if len(parts) else lengths
    return parts - 1, totals - lengths[starts]


def _by_row(trees: Sequence[TokenTree], stored: Mapping[str, Tensor]) -> CachedReference:
    sizes = dict(zip(("sums", "tokens"), _sizes(trees), strict=True))
    first = trees[0].row if len(trees) else 0
    consecutive = isinstance(trees, StoredTokens) or [t.row for t in trees] == list(range(first, first + len(trees)))

    def parts(name: str) -> Mapping[int, Tensor]:
        if name not in stored:
            return {}
        if consecutive:
            return RowParts([(first, np.cumsum(sizes[name]), stored[name])])
        return dict(zip([t.row for t in trees], stored[name].split(sizes[name].tolist()), strict=True))

    return CachedReference(parts("sums"), parts("tokens"))


def _write_atomically(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    with atomic_path(path) as aside:
        save_file(tensors, aside, metadata={"sha256": _sha256(tensors)})
