"""The end of a pipeline: its models on the same held-out prompts, printed, kept, and not done again where nothing changed."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from penchant.data.load import Dataset
from penchant.data.split import first_text, prompt_key
from penchant.errors import ConfigError
from penchant.evaluation.compare_models import Setting, compare_models, table
from penchant.logprobs import Scorer
from penchant.models.load import cast_parameters, load_causal_model, load_tokenizer
from penchant.models.merge import file_sha256, is_adapter, merged_model, model_sha256
from penchant.models.options import ModelConfig
from penchant.packing_check import choose_packing
from penchant.pipeline import Comparison, Pipeline, Ref, Resolve, Stage
from penchant.pipeline_state import State, reward_hashes, reward_terms, write_atomically
from penchant.rewards import load_reward
from penchant.rewards.functions import reward_device
from penchant.rewards.model import PolicyText, check_reward_folder, find_reward_model
from penchant.run import Run
from penchant.training.progress import PlainConsole
from penchant.types import TokenTree

FIGURES, SAMPLES = "comparison.json", "comparison.jsonl"
FolderOf = Callable[[Ref], Path]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A comparison's figures by model and what they say; `done`: whether it was made now rather than read."""

    models: dict[str, dict[str, Any]]
    sentences: list[str]
    heading: str
    done: bool

    def to_text(self) -> str:
        """The table, then the sentences."""
        return "\n".join([self.heading, "", table(self.models), "", *self.sentences])


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Rows that no stage trained on; `leaked`: rows of the same split that one did train on, left out."""

    stage: Stage
    rows: Dataset
    leaked: int


class Comparer:
    """A pipeline's comparison.

    Args:
        runs: of every stage, with its data read. Raises ConfigError where nothing is held out.
    """

    def __init__(self, pipeline: Pipeline, runs: Mapping[str, Run], console: PlainConsole) -> None:
        assert pipeline.compare is not None
        self.pipeline, self.runs, self.console = pipeline, runs, console
        self.compare: Comparison = pipeline.compare
        self.heldout = self._held_out()
        try:
            for reward in (self.compare.config.reward, *self.compare.config.also):
                check_reward(reward)
        except ConfigError as error:
            raise ConfigError(self.compare.place, f"compare.{error.where}: {error.what}", error.how) from error

    def _held_out(self) -> HeldOut:
        """Held-out rows of the first stage that has some with prompts, without prompts that any stage trains on."""
        trained = {
            prompt_key(t.prompt, first_text(t))
            for run in self.runs.values()
            if run.datasets[0].kind != "text"
            for t in run.datasets[0].trees
        }
        for name, run in self.runs.items():
            rows = run.datasets[1]
            if rows is None or rows.kind == "text":
                continue
            clean = [i for i, t in enumerate(rows.trees) if prompt_key(t.prompt, first_text(t)) not in trained]
            if not clean:
                raise ConfigError(
                    self.compare.place,
                    f"compare: every prompt that {name} holds out is trained on by another stage",
                    "give all stages the same data, train.seed and way of holding out",
                )
            return HeldOut(self.pipeline.stages[name], rows.subset(clean), rows.accepted - len(clean))
        raise ConfigError(
            self.compare.place,
            "compare: no stage holds out rows with prompts",
            "set defaults.data.validation_fraction, validation_rows or eval_path",
        )

    # ---- what the models meet -------------------------------------------------------------------------------------

    @cached_property
    def dtype(self) -> Any:
        return self._run.dtype

    @cached_property
    def _run(self) -> Run:
        return self.runs[self.heldout.stage.name]

    def setting(self, resolve: Resolve, folder_of: FolderOf) -> Setting:
        """The same tokenizer, prompts, answers and reward for every model."""
        tokenizers = [load_tokenizer(str(folder_of(ref))) for ref in self.compare.models]
        for ref, other in zip(self.compare.models[1:], tokenizers[1:], strict=True):
            if _vocabulary(other) != _vocabulary(tokenizers[0]):
                raise ConfigError(
                    self.compare.place,
                    f"compare: {ref.stage} has another tokenizer than {self.compare.models[0].stage}",
                    "compare models that start from the same one: KL and likelihood are of the same tokens",
                )
        self._run.tokenizer = tokenizers[0]  # the held-out stage may name a model that is yet to be made
        trees = self._run.tokenise_rows(self.heldout.rows).trees
        c = self.compare.config
        source_of = {tuple(t.prompt_ids.tolist()): t.source for t in reversed(trees)}
        prompts = list(dict.fromkeys(tuple(t.prompt_ids.tolist()) for t in trees))[: c.prompts]
        kept = set(prompts)
        reward = self.compare.reward(resolve)
        texts = {t.source: t.prompt for t in self.heldout.rows.trees}
        policy = PolicyText(tokenizers[0], self._run.config.data.template, texts)
        judges = {name: load_reward(r, policy, self._run.device) for name, r in self.compare.also(resolve).items()}
        return Setting(
            tokenizer=tokenizers[0],
            prompts=prompts,
            sources=[source_of[p] for p in prompts],
            answers=_answers([t for t in trees if tuple(t.prompt_ids.tolist()) in kept], self.heldout.rows.kind),
            judge=None if reward is None else load_reward(reward, policy, self._run.device),
            samples=c.samples,
            max_new_tokens=c.max_new_tokens,
            seed=c.seed,
            also=judges,
            tokens_per_step=self._run.config.train.tokens_per_step,
            progress=self.console.counter,
        )

    def _load(self, ref: Ref, resolve: Resolve, folder_of: FolderOf, longest: int) -> Scorer:
        """A model as the comparison runs it: merged where it is an adapter, in the held-out stage's dtype and on its device."""
        run, folder = self._run, folder_of(ref)
        if is_adapter(folder):
            config = self.pipeline.stages[ref.stage].resolved(resolve)
            model = merged_model(config.model, folder, run.device, config.train.seed)
        else:
            model = load_causal_model(ModelConfig(path=str(folder)), run.device)
        context = getattr(model.config, "max_position_embeddings", None)
        if context is not None and longest > context:
            raise ConfigError(
                self.compare.place,
                f"compare: the longest prompt and max_new_tokens make {longest} tokens, beyond {ref.stage}'s context of {context}",
                "lower compare.max_new_tokens, or data.max_length, which cuts prompts",
            )
        run.set_threads(sum(p.numel() for p in model.parameters()))
        cast_parameters(model, run.dtype)
        model.requires_grad_(False).eval()
        return choose_packing(model, run.config.train.packing, run.config.model.kernels)[0]

    # ---- doing it, once -------------------------------------------------------------------------------------------

    def _inputs(self, setting: Setting, folder_of: FolderOf) -> dict[str, Any]:
        c = self.compare
        return {
            "settings": {
                k: v for k, v in c.config.model_dump(mode="json").items() if v != []
            },  # older ones have no `also`
            "models": {ref.text: model_sha256(folder_of(ref)) for ref in c.models},
            "rewards": reward_hashes(c.config.reward)
            | reward_hashes(dict.fromkeys(c.config.also, 1.0))
            | {ref.text: model_sha256(folder_of(ref)) for ref in c.reward_refs},
            "tokens": _tokens_sha256(setting),
            "dtype": str(self.dtype),
        }

    def unchanged(self, record: Mapping[str, Any], resolve: Resolve, folder_of: FolderOf) -> bool:
        """Whether the comparison on disk is of these models, prompts and settings."""
        if not record or self._files() != record.get("files"):
            return False
        return bool(record.get("inputs") == self._inputs(self.setting(resolve, folder_of), folder_of))

    def _files(self) -> dict[str, str]:
        paths = [self.pipeline.output / name for name in (FIGURES, SAMPLES)]
        return {p.name: file_sha256(p) for p in paths if p.exists()}

    def run(self, state: State, resolve: Resolve, folder_of: FolderOf) -> Outcome:
        """Compare and write both files, or read them where nothing changed."""
        path = self.pipeline.output / FIGURES
        if self.unchanged(state.comparison, resolve, folder_of):
            self.console.note("comparison: unchanged")
            return _outcome(json.loads(path.read_text(encoding="utf-8")), done=False)
        started = time.monotonic()
        setting = self.setting(resolve, folder_of)
        inputs = self._inputs(setting, folder_of)
        self.console.note(f"comparison on {len(setting.prompts)} held-out prompts of {self.heldout.stage.name}")
        if self.heldout.leaked:
            self.console.note(f"left out: {self.heldout.leaked:,} held-out rows whose prompts another stage trains on")
        by_name = {_name(ref): ref for ref in self.compare.models}
        longest = max(map(len, setting.prompts)) + setting.max_new_tokens
        compared = compare_models(
            list(by_name), lambda name: self._load(by_name[name], resolve, folder_of, longest), setting
        )
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in compared.rows)
        figures = {
            "models": compared.models,
            "sentences": compared.sentences,
            "prompts": len(setting.prompts),
            "answers": len(setting.answers),
            "held_out_of": self.heldout.stage.name,
            "left_out": self.heldout.leaked,
            "settings": self.compare.config.model_dump(mode="json"),
            "checkpoints": {name: folder_of(ref).parent.name for name, ref in by_name.items()},
        }
        (self.pipeline.output / SAMPLES).write_text(lines, encoding="utf-8")
        write_atomically(path, figures)
        seconds = round(time.monotonic() - started, 1)
        state.comparison = {"inputs": inputs, "files": self._files(), "seconds": seconds}
        state.save()
        return _outcome(figures, done=True)


def _outcome(figures: Mapping[str, Any], done: bool) -> Outcome:
    s = figures["settings"]
    heading = (
        f"{figures['prompts']} held-out prompts of {figures['held_out_of']}, {s['samples']} completion(s) each of at most "
        f"{s['max_new_tokens']} tokens at temperature 1; in brackets 95% intervals by prompt"
    )
    return Outcome(dict(figures["models"]), list(figures["sentences"]), heading, done)


def _name(ref: Ref) -> str:
    return ref.text.removeprefix("stage:")


def _vocabulary(tokenizer: Any) -> tuple[Any, ...]:
    return tokenizer.get_vocab(), tokenizer.eos_token_id, getattr(tokenizer, "chat_template", None)


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


def _tokens_sha256(setting: Setting) -> str:
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
