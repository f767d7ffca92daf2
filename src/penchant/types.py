"""The few types that every layer shares: the prompt tree, its token form, the packed batch, and what losses get and return."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:  # torch and numpy cost half a second to import; `penchant --help` must not pay for them
    import numpy as np
    import torch
    from torch import Tensor

# --------------------------------------------------------------------------------------------------------------------
# text


@dataclass(frozen=True, slots=True)
class Message:
    """One chat turn; `role` is ``system``, ``user`` or ``assistant``."""

    role: str
    content: str


Prompt = str | tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer to a prompt: its text, and what is known about it."""

    text: str
    label: bool | None = None
    score: float | None = None


@dataclass(frozen=True, slots=True)
class PromptTree:
    """One prompt with k completions: k=1 is SFT or a thumb, k=2 a preference pair (chosen first), k=n a ranking.

    `source` is where the row came from (``"train.jsonl:118"``), for messages.
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    source: str = ""


# --------------------------------------------------------------------------------------------------------------------
# tokens


@dataclass(frozen=True, slots=True)
class TokenTree:
    """A tokenised prompt tree.

    `prompt_ids` has at least one token (BOS, or EOS as document separator, where the text is empty), so that the first
    completion token is always predicted from something. `truncated[i]` says that completion i lost its end (and hence has no EOS).
    """

    row: int
    prompt_ids: np.ndarray  # (p,) int32
    completion_ids: tuple[np.ndarray, ...]  # k arrays (c_i,) int32
    truncated: tuple[bool, ...]
    source: str = ""

    @property
    def shared_tokens(self) -> int:
        """Tokens computed when the prompt is shared: p + sum(c_i)."""
        return len(self.prompt_ids) + sum(len(c) for c in self.completion_ids)

    @property
    def separate_tokens(self) -> int:
        """Tokens computed when every completion repeats the prompt: sum(p + c_i)."""
        return sum(len(self.prompt_ids) + len(c) for c in self.completion_ids)


class Segment(NamedTuple):
    """Where one tree lies in a packed row: `start`, then `prompt_len` tokens, then each completion's tokens in turn."""

    start: int
    prompt_len: int
    completion_lens: tuple[int, ...]

    @property
    def length(self) -> int:
        return self.prompt_len + sum(self.completion_lens)


@dataclass(slots=True)
class PackedBatch:
    """One packed row of trees, without padding, and the index of every position that predicts a completion token.

    A completion attends to its own segment's prompt and to itself; its position ids restart at the prompt's end. In
    separate packing every completion is a segment of its own with the prompt repeated; completions keep the same order,
    so losses cannot tell the packings apart.
    """

    input_ids: Tensor  # (T,) int64
    position_ids: Tensor  # (T,) int64
    segments: tuple[Segment, ...]
    predict_index: Tensor  # (R,) int64: position in the row whose hidden state predicts target_ids[r]
    target_ids: Tensor  # (R,) int64
    completion_of: Tensor  # (R,) int64 in [0, C): non-decreasing
    completion_tree: Tensor  # (C,) int64 in [0, number of trees)
    completion_slot: Tensor  # (C,) int64: 0 = first (chosen), 1 = second (rejected), ...
    lengths: Tensor  # (C,) int64: completion tokens
    rows: tuple[int, ...]  # data set row of each tree
    cache: dict[str, object] = field(default_factory=dict)  # layouts derived from `segments`, built once per batch

    @property
    def tokens(self) -> int:
        return int(self.input_ids.shape[0])

    @property
    def trees(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device) -> PackedBatch:
        """The batch on a device; layouts are built anew there."""
        if self.input_ids.device == device:
            return self
        moved = {
            f.name: v.to(device) if hasattr(v := getattr(self, f.name), "to") else v
            for f in fields(self)
            if f.name != "cache"
        }
        return PackedBatch(**moved)


# --------------------------------------------------------------------------------------------------------------------
# losses


@dataclass(frozen=True, slots=True)
class PairLogps:
    """What a pairwise loss gets: summed completion log-probs and lengths, each of shape (batch,), float32 or float64."""

    policy_chosen_logps: Tensor
    policy_rejected_logps: Tensor
    ref_chosen_logps: Tensor | None = None
    ref_rejected_logps: Tensor | None = None
    chosen_lengths: Tensor | None = None
    rejected_lengths: Tensor | None = None


@dataclass(frozen=True, slots=True)
class UnpairedLogps:
    """What an unpaired loss gets: summed completion log-probs, lengths and labels, each of shape (batch,)."""

    policy_logps: Tensor
    lengths: Tensor
    ref_logps: Tensor | None = None
    labels: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Unreduced losses and detached metrics.

    The loop reduces `losses.sum() / weights.sum()` over all micro-batches and ranks; `weights` is None for a mean over
    examples, or the token counts for a mean over tokens. Every metric is (values, weights or None) and is reduced likewise.
    """

    losses: Tensor  # (batch,)
    weights: Tensor | None = None
    metrics: Mapping[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)


class Algorithm(Protocol):
    """What the loop trains: it knows each micro-batch's share of the global mean, and turns a micro-batch into losses."""

    def weight(self, batch: PackedBatch) -> float:
        """The batch's part of the denominator (examples or tokens), known before its forward pass."""

    def loss(self, batch: PackedBatch) -> LossOutput:
        """Unreduced losses with gradient, and detached metrics."""
