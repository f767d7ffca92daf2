"""A trained reward model as a reward function."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from penchant.data.load import Dataset
from penchant.data.packing import pack, plan_microbatches, tree_tokens
from penchant.data.tokenize import pair_format, same_tokens, tokenise, tokenise_text_pairs
from penchant.errors import CheckpointError, ConfigError, ModelError
from penchant.models.load import DTYPES, cast_parameters, load_tokenizer
from penchant.models.options import ModelConfig
from penchant.models.reward import SETTINGS, context_of, is_reward_model, load_model_config, load_reward_model
from penchant.packing_check import choose_packing
from penchant.rewards.options import BUILT_IN
from penchant.rewards.scorer import CausalRewards, EncoderRewards, RewardScorer
from penchant.training.checkpoint import checkpoints, latest_checkpoint
from penchant.types import Completion, Prompt, PromptTree, TokenTree

TOKENS_PER_STEP = 4096


@dataclass(frozen=True, slots=True)
class PolicyText:
    """What a reward model must know of the policy whose completions it judges.

    Args:
        tokenizer, template: the policy's; prompts: as the data has them, by the `source` of their trees.
    """

    tokenizer: Any
    template: str = "auto"
    prompts: Mapping[str, Prompt] = field(default_factory=dict)


@dataclass(slots=True)
class RewardModel:
    """Scores texts, or the policy's own tokens.

    Where the policy has the same tokenizer and template, its token ids are scored as they are. Otherwise prompt (as the data has it)
    and completion are tokenised anew, as they were when the reward model was trained.

    Args:
        scorer, tokenizer: the reward model's; template, max_length, add_eos: what it was trained with.
        policy: whose completions `score_trees` gets.
    """

    scorer: RewardScorer
    tokenizer: Any
    encoder: bool
    template: str
    max_length: int
    add_eos: bool
    policy: PolicyText | None = None
    _same: bool = field(init=False)

    def __post_init__(self) -> None:
        policy = self.policy
        self._same = (
            policy is not None
            and not self.encoder
            and self.add_eos
            and same_tokens(policy.tokenizer, self.tokenizer)
            and _renders(policy.template, policy.tokenizer) == _renders(self.template, self.tokenizer)
        )

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """The reward of each completion, taken as whole (with its EOS)."""
        pairs = [PromptTree(p, (Completion(c),)) for p, c in zip(prompts, completions, strict=True)]
        return rewards_of(self.scorer, self._tokenised(pairs, [False] * len(pairs)))

    def score_trees(self, trees: Sequence[TokenTree]) -> list[float]:
        """The reward of each completion of rollouts, tree by tree; one that did not end by itself is judged without EOS."""
        if self._same and all(_longest(t) <= self.max_length for t in trees):
            return rewards_of(self.scorer, trees)
        assert self.policy is not None
        decode = self.policy.tokenizer.decode
        pairs, unfinished = [], []
        for tree in trees:
            prompt = self.policy.prompts.get(tree.source)
            if prompt is None:
                prompt = decode(tree.prompt_ids, skip_special_tokens=True)
            for ids, cut in zip(tree.completion_ids, tree.truncated, strict=True):
                pairs.append(PromptTree(prompt, (Completion(decode(ids, skip_special_tokens=True)),)))
                unfinished.append(cut)
        return rewards_of(self.scorer, self._tokenised(pairs, unfinished))

    def _tokenised(self, pairs: Sequence[PromptTree], unfinished: Sequence[bool]) -> list[TokenTree]:
        dataset = Dataset(tuple(pairs), "rollouts", "pairs", len(pairs), (), "")
        if self.encoder:
            return list(tokenise_text_pairs(dataset, self.tokenizer, max_length=self.max_length).trees)
        # a policy may end at once; where the reward model has learned no EOS either, nothing is left but the prompt
        nothing = [not self.add_eos and not p.completions[0].text for p in pairs]
        if any(nothing):
            held = [replace(p, completions=(Completion("."),)) if n else p for p, n in zip(pairs, nothing, strict=True)]
            dataset = replace(dataset, trees=tuple(held))
        made: Sequence[TokenTree] = tokenise(
            dataset, self.tokenizer, template=self.template, max_length=self.max_length, add_eos=self.add_eos
        ).trees
        made = [
            replace(t, completion_ids=(t.completion_ids[0][:0],)) if n else t
            for t, n in zip(made, nothing, strict=True)
        ]
        eos = self.tokenizer.eos_token_id
        return [_without(eos, t) if cut else t for t, cut in zip(made, unfinished, strict=True)]


def _renders(template: str, tokenizer: Any) -> str:
    has_chat = getattr(tokenizer, "chat_template", None) is not None
    return "chat" if template != "plain" and has_chat else "plain"


def _longest(tree: TokenTree) -> int:
    return len(tree.prompt_ids) + max(map(len, tree.completion_ids))


def _without(eos: int | None, tree: TokenTree) -> TokenTree:
    ids = tree.completion_ids[0]
    return replace(tree, completion_ids=(ids[:-1],)) if len(ids) > 1 and ids[-1] == eos else tree


def rewards_of(scorer: RewardScorer, trees: Sequence[TokenTree], tokens_per_step: int = TOKENS_PER_STEP) -> list[float]:
    """The reward of every completion, tree by tree, without gradient."""
    device = next(scorer.model.parameters()).device
    found: list[list[float]] = [[] for _ in trees]
    training = scorer.model.training
    scorer.model.eval()
    with torch.no_grad():
        for members in plan_microbatches([tree_tokens(t, scorer.shared) for t in trees], tokens_per_step):
            batch = pack([trees[i] for i in members], shared=scorer.shared).to(device)
            sizes = [len(trees[i].completion_ids) for i in members]
            for i, part in zip(members, scorer.rewards(batch).double().cpu().split(sizes), strict=True):
                found[i] = part.tolist()
    scorer.model.train(training)
    return [r for of_tree in found for r in of_tree]


def make_scorer(model: Any, encoder: bool, tokenizer: Any, packing: str, kernels: str) -> tuple[RewardScorer, str]:
    """The scorer that fits a reward model, and a sentence for the log."""
    if encoder:
        scorer = EncoderRewards(model, pair_format(tokenizer))
        return scorer, f"packing: {scorer.packing}"
    causal, note = choose_packing(model, packing, kernels)
    return CausalRewards(causal), note


# ---------------------------------------------------------------------------------------------------------------------
# loading


def find_reward_model(path: str) -> Path | None:
    """The model folder that a reward of this name means: a run's best or last checkpoint, or the folder itself; None: another kind.

    Raises:
        CheckpointError: a run without a checkpoint.
    """
    folder = Path(path).expanduser()
    if path in BUILT_IN or not folder.is_dir():
        return None
    if not (folder / "checkpoints").is_dir() and not (folder / "config.resolved.yaml").exists():
        return folder
    last, _ = latest_checkpoint(folder)
    if last is None:
        raise CheckpointError(path, "this run has no checkpoint yet", "train the reward model first")
    best = json.loads((last / "state.json").read_text()).get("best_step")
    there = {p.name: p for p in checkpoints(folder)}
    return there.get(f"step-{best}", last) / "model"


def check_reward_folder(name: str, folder: Path) -> Any:
    """The config of a folder that is used as a reward.

    Raises:
        ConfigError: it holds another kind of model. ModelError: it holds none.
    """
    config = load_model_config(str(folder))
    if not is_reward_model(config):
        kind = ", ".join(getattr(config, "architectures", None) or ()) or "no architecture named"
        raise ConfigError(
            "reward",
            f"{name} is no reward model ({kind})",
            "give the run folder of one, trained with algorithm.name=reward_model, or a classifier with one label",
        )
    return config


def load_reward_function(name: str, folder: Path, device: torch.device, policy: PolicyText | None) -> RewardModel:
    """A reward model from its folder, in the dtype in which it was saved.

    Raises:
        ConfigError: the folder holds another kind of model. ModelError: it holds none.
    """
    config = check_reward_folder(name, folder)
    loaded = load_reward_model(ModelConfig(path=str(folder)), device)
    if loaded.fresh:
        raise ModelError(str(folder), f"its weights lack {', '.join(loaded.fresh)}", "give a whole reward model")
    dtype = next((d for d in DTYPES.values() if d == getattr(config, "dtype", None)), torch.float32)
    cast_parameters(loaded.model, dtype)
    loaded.model.requires_grad_(False).eval()
    tokenizer = load_tokenizer(str(folder))
    scorer, _ = make_scorer(loaded.model, loaded.encoder, tokenizer, "auto", "auto")
    path = folder / SETTINGS
    settings = json.loads(path.read_text()) if path.exists() else {}
    return RewardModel(
        scorer,
        tokenizer,
        loaded.encoder,
        str(settings.get("template", "auto")),
        int(settings.get("max_length") or context_of(config, tokenizer) or 1024),
        bool(settings.get("add_eos", tokenizer.eos_token_id is not None)),
        policy,
    )


def content_sha256(name: str) -> str | None:
    """SHA-256 of what a reward of this name is made of: its file, or its model's weights and tokenizer; None for a built-in one."""
    folder = find_reward_model(name)
    file = Path(name.rpartition(":")[0]).expanduser()
    if folder is None and (not name.rpartition(":")[0] or not file.is_file()):
        return None
    files = [file] if folder is None else sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json"))
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode())
        with path.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
