"""Groups of completions that the policy writes itself, with their rewards: what every online method trains on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from penchant.algorithms.options import OnlineConfig
from penchant.rewards import Reward
from penchant.rollout.generate import sample
from penchant.types import TokenTree


@dataclass(slots=True)
class Group:
    """One prompt's completions.

    Args:
        tree: the prompt with its k completions; `truncated` where one did not end by itself.
        rewards: (k,) as the reward function gave them, missing-EOS penalty taken off.
        texts: what the reward function saw.
        extras: per-token or per-completion tensors that a method keeps with it (old log-probs, advantages).
    """

    tree: TokenTree
    rewards: Tensor
    texts: tuple[str, ...] = ()
    extras: dict[str, Tensor] = field(default_factory=dict)


@dataclass(slots=True)
class Writer:
    """Writes groups: the policy samples, the reward function judges.

    Args:
        model, tokenizer: the policy's; reward: of texts; config: samples, length, temperature; seed: of the run.
    """

    model: Any
    tokenizer: Any
    reward: Reward
    config: OnlineConfig
    seed: int

    def write(self, prompts: Sequence[TokenTree], iteration: int, samples: int | None = None) -> list[Group]:
        """One group of `samples` completions (default: the method's) for each prompt; a function of weights, seed and iteration.

        Raises:
            RewardError: the reward function failed; it names the completion.
        """
        cfg = self.config
        k = samples or cfg.samples
        rows = sample(
            self.model,
            [t.prompt_ids.tolist() for t in prompts],
            n=k,
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            top_p=cfg.top_p,
            seed=(self.seed * 1_000_003 + iteration) % 2**63,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        asked = [self.tokenizer.decode(t.prompt_ids, skip_special_tokens=True) for t in prompts]
        texts = [[self.tokenizer.decode(s.ids, skip_special_tokens=True) for s in row] for row in rows]
        flat = self.reward([p for p in asked for _ in range(k)], [t for row in texts for t in row])
        rewards = torch.from_numpy(flat).view(len(prompts), k)
        groups = []
        for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            unfinished = tuple(not s.finished for s in row)
            ids = tuple(np.array(s.ids, np.int32) for s in row)
            tree = TokenTree(prompt.row, prompt.prompt_ids, ids, unfinished, prompt.source)
            penalty = cfg.missing_eos_penalty * torch.tensor(unfinished, dtype=torch.float64)
            groups.append(Group(tree, rewards[i] - penalty, tuple(texts[i])))
        return groups


def reward_metrics_of(groups: Sequence[Group]) -> dict[str, float]:
    """What a step's rollouts were like: reward, its spread within groups, length, share that ended."""
    rewards = torch.stack([g.rewards for g in groups])
    lengths = [len(c) for g in groups for c in g.tree.completion_ids]
    return {
        "reward": float(rewards.mean()),
        "reward/std": float(rewards.std(1).mean()),
        "completions/length": float(np.mean(lengths)),
        "completions/ended": 1.0 - float(np.mean([u for g in groups for u in g.tree.truncated])),
    }


def pack_groups(groups: Sequence[Group]) -> dict[str, Tensor]:
    """Groups as tensors, for a checkpoint."""
    names = sorted(groups[0].extras) if groups else []
    packed = {
        "rows": torch.tensor([g.tree.row for g in groups]),
        "prompt_lengths": torch.tensor([len(g.tree.prompt_ids) for g in groups]),
        "prompts": _joined([g.tree.prompt_ids for g in groups]),
        "lengths": torch.tensor([[len(c) for c in g.tree.completion_ids] for g in groups]),
        "completions": _joined([c for g in groups for c in g.tree.completion_ids]),
        "unfinished": torch.tensor([g.tree.truncated for g in groups]),
        "rewards": torch.stack([g.rewards for g in groups]) if groups else torch.zeros(0, 0),
    }
    return packed | {f"extras/{name}": torch.cat([g.extras[name] for g in groups]) for name in names}


def _joined(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts)) if parts else torch.zeros(0, dtype=torch.int32)


def unpack_groups(packed: dict[str, Tensor]) -> list[Group]:
    """The inverse of `pack_groups`, without texts."""
    prompts = packed["prompts"].split(packed["prompt_lengths"].tolist())
    k = packed["lengths"].shape[1]
    completions = packed["completions"].split(packed["lengths"].flatten().tolist())
    tokens = packed["lengths"].sum(1).tolist()
    extras = {}
    for name, values in packed.items():
        if name.startswith("extras/"):
            per_token = len(values) == sum(tokens) and len(values) != len(prompts) * k
            extras[name.removeprefix("extras/")] = values.split(tokens if per_token else k)
    groups = []
    for i, row in enumerate(packed["rows"].tolist()):
        ids = tuple(c.numpy() for c in completions[i * k : (i + 1) * k])
        tree = TokenTree(row, prompts[i].numpy(), ids, tuple(packed["unfinished"][i].tolist()))
        groups.append(Group(tree, packed["rewards"][i], (), {n: v[i] for n, v in extras.items()}))
    return groups
