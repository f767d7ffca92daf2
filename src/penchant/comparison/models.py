"""Named models on held-out rows with a reward: loading them, what all of them meet alike, and the files that are left."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from penchant.data.load import Dataset, first_text
from penchant.data.split import prompt_key
from penchant.errors import ConfigError
from penchant.evaluation.compare_models import Compared, compare_models, comparisons_table, table
from penchant.evaluation.measured import Setting
from penchant.judges.judge import PairJudge
from penchant.logprobs import Scorer
from penchant.models.load import cast_parameters, load_causal_model
from penchant.models.merge import merged_model
from penchant.models.options import ModelConfig
from penchant.packing_check import choose_packing
from penchant.pipeline_state import reward_terms, write_atomically, write_text_atomically
from penchant.rewards import load_reward
from penchant.rewards.functions import reward_device
from penchant.rewards.model import PolicyText, check_reward_folder, find_reward_model
from penchant.run import Run
from penchant.training.progress import PlainConsole
from penchant.types import PromptTree, TokenTree

FIGURES, SAMPLES = "comparison.json", "comparison.jsonl"


@dataclass(frozen=True, slots=True)
class Entrant:
    """A model to compare.

    Args:
        base: the whole model, or the one that `adapter` goes on; seed: of the run that trained the adapter.
    """

    name: str
    base: ModelConfig
    adapter: Path | None = None
    seed: int = 0

    def load(self, run: Run) -> Any:
        """The model in fp32, on the run's device; an adapter is merged."""
        if self.adapter is not None:
            return merged_model(self.base, self.adapter, run.device, self.seed)
        return load_causal_model(self.base, run.device, self.seed)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn; `place`: where these settings are written, for errors."""

    prompts: int
    samples: int
    max_new_tokens: int
    seed: int
    place: str = "compare"

    def heading(self, prompts: int, rows: str) -> str:
        """What the figures are of."""
        return (
            f"{prompts} held-out prompts of {rows}, {self.samples} completion(s) each of at most "
            f"{self.max_new_tokens} tokens at temperature 1"
        )


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Rows that no model was trained on, as the run `owner` reads them; `leaked`: rows that one was trained on, left out."""

    owner: str
    rows: Dataset
    leaked: int


def key_of(tree: PromptTree) -> str:
    """What counts as the same prompt."""
    return prompt_key(tree.prompt, first_text(tree))


def trained_prompts(run: Run) -> set[str]:
    """Keys of the prompts that a run trains on; a text without a prompt is none."""
    rows = run.datasets[0]
    return set() if rows.kind == "text" else {key_of(t) for t in rows.trees}


def clear_of(owner: str, rows: Dataset, trained: set[str]) -> HeldOut:
    """The rows whose prompts nobody trained on; possibly none."""
    clean = [i for i, t in enumerate(rows.trees) if key_of(t) not in trained]
    return HeldOut(owner, rows.subset(clean), len(rows.trees) - len(clean))


def same_vocabulary(one: Any, other: Any) -> bool:
    """Whether two tokenizers make the same tokens of the same conversation."""
    return _vocabulary(one) == _vocabulary(other)


def _vocabulary(tokenizer: Any) -> tuple[Any, ...]:
    return tokenizer.get_vocab(), tokenizer.eos_token_id, getattr(tokenizer, "chat_template", None)


def make_setting(
    run: Run,
    tokenizer: Any,
    rows: Dataset,
    reward: Any,
    sampling: Sampling,
    console: PlainConsole,
    also: Mapping[str, Any] | None = None,
    pairwise: PairJudge | None = None,
) -> Setting:
    """The same tokenizer, prompts, answers and rewards for every model.

    Args:
        run: as which the rows are made into tokens, and in whose precision and on whose device models run.
        reward: as `load_reward` takes it, or None; also: other rewards by name; pairwise: who decides between two answers.
    """
    run.tokenizer = tokenizer  # its config may name a model that is yet to be made
    trees = run.tokenise_rows(rows).trees
    source_of = {tuple(t.prompt_ids.tolist()): t.source for t in reversed(trees)}
    prompts = list(dict.fromkeys(tuple(t.prompt_ids.tolist()) for t in trees))[: sampling.prompts]
    kept = set(prompts)
    policy = PolicyText(tokenizer, run.config.data.template, {t.source: t.prompt for t in rows.trees})
    return Setting(
        tokenizer=tokenizer,
        prompts=prompts,
        sources=[source_of[p] for p in prompts],
        answers=_answers([t for t in trees if tuple(t.prompt_ids.tolist()) in kept], rows.kind),
        judge=None if reward is None else load_reward(reward, policy, run.device),
        samples=sampling.samples,
        max_new_tokens=sampling.max_new_tokens,
        seed=sampling.seed,
        tokens_per_step=run.config.train.tokens_per_step,
        also={name: load_reward(r, policy, run.device) for name, r in (also or {}).items()},
        pairwise=pairwise,
        progress=console.counter,
    )


def _answers(trees: Sequence[TokenTree], kind: str) -> list[TokenTree]:
    """Pairs and single good answers among held-out rows; scores and bare prompts say nothing of what is likely to be right."""
    if kind not in ("pairs", "sft", "unpaired"):
        return []
    found: list[TokenTree] = []
    for t in trees:
        labels = t.labels if any(label is not None for label in t.labels) else (True, False)
        if len(t.completion_ids) in (1, 2) and labels[0] and (len(t.completion_ids) == 1 or not labels[1]):
            found.append(replace(t, row=len(found)))
    return found


def compare_entrants(
    entrants: Sequence[Entrant],
    run: Run,
    setting: Setting,
    sampling: Sampling,
    *,
    seeds: Mapping[str, Sequence[str]] | None = None,
    fixed: bool = False,
) -> Compared:
    """Compare models in the precision and on the device of `run`; the first is what the others are compared with."""
    by_name = {e.name: e for e in entrants}
    longest = max(map(len, setting.prompts)) + setting.max_new_tokens

    def load(name: str) -> Scorer:
        model = by_name[name].load(run)
        _check_context(model, name, longest, sampling.place)
        run.set_threads(sum(p.numel() for p in model.parameters()))
        cast_parameters(model, run.dtype)
        model.requires_grad_(False).eval()
        return choose_packing(model, run.config.train.packing, run.config.model.kernels)[0]

    return compare_models(list(by_name), load, setting, seeds=seeds, fixed=fixed)


def _check_context(model: Any, name: str, longest: int, place: str) -> None:
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and longest > context:
        raise ConfigError(
            place,
            f"the longest prompt and max_new_tokens make {longest} tokens, beyond {name}'s context of {context}",
            "lower max_new_tokens of the comparison, or data.max_length, which cuts prompts",
        )


# ---------------------------------------------------------------------------------------------------------------------
# what is left


def figures_of(compared: Compared) -> dict[str, Any]:
    """A comparison as it stands in comparison.json."""
    judged = compared.judgement
    return {
        "models": compared.models,
        **({"runs": compared.runs} if compared.runs else {}),
        "outcome": compared.outcome,
        "comparisons": [p.to_json() for p in compared.pairs or (judged.pairs if judged else [])],
        "comparisons_text": _tables(compared),
        **({"also": {n: [p.to_json() for p in pairs] for n, pairs in compared.also.items()}} if compared.also else {}),
        **({"judge": judged.to_json()} if judged is not None else {}),
        "sentences": compared.sentences,
    }


def _tables(compared: Compared) -> str:
    tables = [comparisons_table(compared.pairs, compared.outcome)] if compared.pairs else []
    others = sum(map(len, compared.also.values()))
    for name, pairs in compared.also.items():
        tables.append(f"By {name}:\n{comparisons_table(pairs, 'mean reward', others)}")
    if compared.judgement is not None and compared.judgement.pairs:
        tables.append(f"By {compared.judgement.name}:\n{compared.judgement.table()}")
    return "\n\n".join(tables)


def text_of(figures: Mapping[str, Any], heading: str, notes: Iterable[str] = ()) -> str:
    """A comparison as a person reads it: heading, notes, tables, and last the verdict."""
    parts = [heading, "\n".join(notes), table(figures["models"]), figures.get("comparisons_text", "")]
    return "\n\n".join(p for p in [*parts, "\n".join(figures["sentences"])] if p)


def write_files(folder: Path, figures: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Both files, each whole or not at all."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text_atomically(folder / SAMPLES, lines)
    write_atomically(folder / FIGURES, figures)


def tokens_sha256(setting: Setting) -> str:
    """SHA-256 of the prompts and answers that are compared on."""
    digest = hashlib.sha256()
    for ids in setting.prompts:
        digest.update(np.array(ids, dtype="<i4").tobytes() + b"|")
    for tree in setting.answers:
        for part in (tree.prompt_ids, *tree.completion_ids):
            digest.update(part.astype("<i4").tobytes() + b"|")
    return digest.hexdigest()


def check_reward(reward: Any) -> None:
    """A reward's built-in names and files are there and can be called; of a model's folder its config is looked at.

    Raises:
        ConfigError: no such reward, file or function, or a folder with another model. ModelError, CheckpointError: with none.
    """
    weights = reward if isinstance(reward, dict) else {}
    reward_device(str(weights.get("device", "auto")))
    for name in reward_terms(reward):
        if not isinstance(weights.get(name, 1.0), (int, float)):
            continue
        folder = find_reward_model(name)
        if folder is None:
            load_reward(name)
        else:
            check_reward_folder(name, folder)
