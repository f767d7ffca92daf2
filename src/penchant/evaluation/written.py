"""What a model writes for held-out prompts, judged or not: the raw material of every comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from penchant.rollout.generate import sample
from penchant.types import TokenTree

# (prompts, completions, the trees that they are the texts of) -> one number each
Judge = Callable[[Sequence[str], Sequence[str], Sequence[TokenTree]], np.ndarray]


@dataclass(frozen=True)
class Written:
    """Completions, prompt by prompt.

    Args:
        trees: each prompt with its n completions; `truncated` where one did not end by itself.
        texts: of all completions in order, (prompts x n); rewards: (prompts x n,), None where nobody judged.
    """

    trees: list[TokenTree]
    texts: list[str]
    rewards: np.ndarray | None

    @cached_property
    def ids(self) -> list[list[int]]:
        """Token ids of all completions in order."""
        return [c.tolist() for t in self.trees for c in t.completion_ids]

    @cached_property
    def ended(self) -> np.ndarray:
        """Whether each completion ended by itself, (prompts x n,)."""
        return np.array([not cut for t in self.trees for cut in t.truncated])

    @property
    def prompts(self) -> np.ndarray:
        """The number of each completion's prompt, (prompts x n,): the clusters of an interval."""
        return np.array([i for i, t in enumerate(self.trees) for _ in t.completion_ids])


def write(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    n: int,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    judge: Judge | None = None,
    sources: Sequence[str] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Sample `n` completions of each prompt and have them judged.

    Args:
        prompts: token ids; seed: of the draws; judge: a reward, called once with all of them.
        sources: where each prompt came from, by which a reward model knows it in its own tokens; may be empty.
    """
    rows = sample(
        model,
        prompts,
        n=n,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        eos_token_id=tokenizer.eos_token_id,
        progress=progress,
    )
    trees = [
        TokenTree(
            i,
            np.array(prompt, dtype=np.int32),
            tuple(np.array(s.ids, dtype=np.int32) for s in row),
            tuple(not s.finished for s in row),
            sources[i] if sources else "",
        )
        for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True))
    ]
    texts = [tokenizer.decode(s.ids, skip_special_tokens=True) for row in rows for s in row]
    return Written(trees, texts, None if judge is None else judged(judge, tokenizer, trees, texts))


def judged(judge: Judge, tokenizer: Any, trees: Sequence[TokenTree], texts: Sequence[str]) -> np.ndarray:
    """A reward's value of each completion, (completions,).

    Args:
        trees: prompts with their completions; texts: of all completions in order.
    """
    asked = [(tokenizer.decode(t.prompt_ids.tolist(), skip_special_tokens=True), len(t.completion_ids)) for t in trees]
    return judge([prompt for prompt, n in asked for _ in range(n)], texts, trees)
