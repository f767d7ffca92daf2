"""From a packed batch to one reward for each completion: causal models on shared prompts, encoders on text pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from penchant.data.tokenize import PairFormat
from penchant.logprobs import Scorer
from penchant.models.reward import head_of, head_scores
from penchant.types import PackedBatch

SHORTEST = 0.75  # rows of one padded pass are at least this share of its longest: a quarter of it is padding at most


class RewardScorer(Protocol):
    """What training, evaluation and reward functions ask of a reward model."""

    @property
    def model(self) -> Any:
        """The transformers model, or peft's around it."""

    @property
    def shared(self) -> bool:
        """Whether batches are packed with shared prompts."""

    @property
    def packing(self) -> str:
        """How rows are laid out, for the log."""

    @property
    def fast(self) -> bool:
        """Whether a model-family fast path runs."""

    def rewards(self, batch: PackedBatch) -> Tensor:
        """The reward of each completion (C,), fp32 (fp64)."""


@dataclass(slots=True)
class CausalRewards:
    """A causal reward model: the head reads the last real token of each completion (EOS, where it was not cut).

    Args:
        scorer: runs the backbone; its language-model head is not there and never asked.
    """

    scorer: Scorer

    @property
    def model(self) -> Any:
        return self.scorer.model

    @property
    def shared(self) -> bool:
        return self.scorer.shared

    @property
    def packing(self) -> str:
        return self.scorer.packing

    @property
    def fast(self) -> bool:
        return self.scorer.fast

    def rewards(self, batch: PackedBatch) -> Tensor:
        last = torch.tensor(last_positions(batch), device=batch.input_ids.device)
        return head_scores(head_of(self.model), self.scorer.hidden(batch).index_select(0, last))


def last_positions(batch: PackedBatch) -> list[int]:
    """Where each completion's last token lies in the packed row."""
    found = []
    for s in batch.segments:
        end = s.start + s.prompt_len
        for n in s.completion_lens:
            end += n
            found.append(end - 1)
    return found


@dataclass(slots=True)
class EncoderRewards:
    """An encoder reward model: every prompt with each completion is a row of its own, padded among rows of its length.

    Args:
        model: for sequence classification with one output; layout: of its tokenizer's text pairs.
    """

    model: Any
    layout: PairFormat
    shared: bool = False
    packing: str = "text pairs, padded by length"
    fast: bool = False

    def rewards(self, batch: PackedBatch) -> Tensor:
        rows = [
            (batch.input_ids[s.start : s.start + s.length], s.prompt_len) for s in batch.segments
        ]  # packed separately: one completion a segment
        found: list[Tensor] = []
        order: list[int] = []
        for members in by_length([len(ids) for ids, _ in rows]):
            found.append(self._padded([rows[i] for i in members]))
            order += members
        place = torch.tensor(order, device=batch.input_ids.device).argsort()
        return torch.cat(found).index_select(0, place)

    def _padded(self, rows: Sequence[tuple[Tensor, int]]) -> Tensor:
        width = max(len(ids) for ids, _ in rows)
        ids = rows[0][0].new_full((len(rows), width), self.layout.pad)
        mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
        for i, (row, prompt) in enumerate(rows):
            ids[i, : len(row)] = row
            mask[i, : len(row)] = 1
            if self.layout.types is not None:
                types[i, :prompt], types[i, prompt : len(row)] = self.layout.types
        more = {} if self.layout.types is None else {"token_type_ids": types}
        head = head_of(self.model)
        features: list[Tensor] = []
        # the head once more in fp32, on what the model itself gives it
        listening = head.register_forward_pre_hook(lambda _, given: features.append(given[0]))
        try:
            self.model(input_ids=ids, attention_mask=mask, **more)
        finally:
            listening.remove()
        return head_scores(head, features[0])


def by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Indices in groups of similar length, longest first."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and lengths[i] >= SHORTEST * lengths[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
