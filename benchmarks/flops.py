"""FLOPs that a DPO step requires, used for every share of the matrix-multiply peak (standard library only).

    F = 2 N_blk u (3 + rho) + 2 V d r (3 + rho) + 4 L H d_h A (3.5 + rho)

u: unique tokens (each prompt once, plus completions); r: completion tokens; A: attended query-key pairs; N_blk:
parameters outside embeddings; rho: 1 if the reference runs in the step, 0 if it is cached. Padding, repeated
prompts and recomputation are not counted.

This is full fine-tuning. With LoRA the frozen matrices need no weight gradient, so their factor is (2 + rho); the
adapters add 2 N_lora u 3; attention is unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A Llama-type model: layers L, width d, heads H of size d_h, key/value heads, feed-forward width, vocabulary V."""

    layers: int
    width: int
    heads: int
    head_dim: int
    kv_heads: int
    ffn: int
    vocab: int

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of each linear layer of a block."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        d, f = self.width, self.ffn
        return ((d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d))

    @property
    def block_parameters(self) -> int:
        """N_blk: parameters outside embeddings and head (norms included)."""
        return self.layers * (sum(i * o for i, o in self.linears) + 2 * self.width) + self.width

    def lora_parameters(self, rank: int) -> int:
        """Parameters of adapters of this rank on every linear layer of the blocks."""
        return self.layers * sum(rank * (i + o) for i, o in self.linears)


@dataclass(frozen=True, slots=True)
class Work:
    """The work in a set of pairs: u unique tokens, r completion tokens, A attended query-key pairs."""

    unique_tokens: int
    completion_tokens: int
    attended: int


def read_shape(model: Path) -> ModelShape:
    """Read the shape from a model folder's config.json."""
    c = json.loads((model / "config.json").read_text())
    heads = c["num_attention_heads"]
    return ModelShape(
        layers=c["num_hidden_layers"],
        width=c["hidden_size"],
        heads=heads,
        head_dim=c.get("head_dim") or c["hidden_size"] // heads,
        kv_heads=c.get("num_key_value_heads", heads),
        ffn=c["intermediate_size"],
        vocab=c["vocab_size"],
    )


def work_of(trees: Iterable[tuple[int, Sequence[int]]]) -> Work:
    """Work of trees given as (prompt length, completion lengths). Each prompt is computed once; attention is causal."""
    unique = completion = attended = 0
    for prompt, completions in trees:
        unique += prompt + sum(completions)
        completion += sum(completions)
        attended += prompt * (prompt + 1) // 2 + sum(c * prompt + c * (c + 1) // 2 for c in completions)
    return Work(unique, completion, attended)


def work_of_rows(rows: Iterable[Mapping[str, Any]]) -> Work:
    """`work_of` for the benchmark's rows."""
    return work_of((len(r["prompt_ids"]), [len(c) for c in r["completion_ids"]]) for r in rows)


def flops(shape: ModelShape, work: Work, *, reference_runs: bool, lora_rank: int | None = None) -> float:
    """F: floating-point operations required by the steps on this work.

    Args:
        reference_runs: whether the reference is computed in the step (rho = 1) or cached (rho = 0).
        lora_rank: None for full fine-tuning.
    """
    rho = 1.0 if reference_runs else 0.0
    passes = (3.0 if lora_rank is None else 2.0) + rho
    u, r = work.unique_tokens, work.completion_tokens
    linear = 2.0 * shape.block_parameters * u * passes + 2.0 * shape.vocab * shape.width * r * passes
    adapters = 0.0 if lora_rank is None else 2.0 * shape.lora_parameters(lora_rank) * u * 3.0
    return linear + adapters + 4.0 * shape.layers * shape.heads * shape.head_dim * work.attended * (3.5 + rho)
