"""The evaluation of one model: given answers, texts and fresh completions, against a reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from penchant.config import RunConfig
from penchant.errors import ConfigError, DataError, ModelError
from penchant.evaluate.material import EvaluationData
from penchant.logprobs.reference import LiveReference
from penchant.metrics.answers import TokenScores, answer_figures, figures_by_answer, score_tokens, text_figures
from penchant.metrics.completions import (
    Completions,
    RewardFunction,
    generation_figures,
    generation_kl,
    overlap_figures,
    require_overlap,
    sample_completions,
    score_completions,
)
from penchant.metrics.figures import Figure, flatten
from penchant.models.load import load_tokenizer, tokens_of
from penchant.models.options import check_text_alone, looks_like_folder
from penchant.rewards import load_reward
from penchant.rewards.reward_model import PolicyText, rows_by_source
from penchant.runs import Run
from penchant.runs.find import START, Source, find_model
from penchant.runs.identity import changed_since
from penchant.runs.parts import prepare_for_inference
from penchant.types import TokenTree

NO_REFERENCE = "none"
FEW_PROMPTS = 10  # with fewer prompts a percentile bootstrap is too narrow


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """The result of an evaluation.

    Args:
        metrics: ``eval/...`` with ``/ci`` and ``/n``, and names of the model and reference; notes: sentences on the metrics.
        what: settings and fingerprints that the metrics depend on; rows: the completions; step: of a run, else None.
        answers: the figures of each given answer.
    """

    metrics: dict[str, Any]
    notes: list[str]
    what: dict[str, Any]
    rows: list[dict[str, Any]]
    step: int | None
    answers: list[dict[str, Any]] = field(default_factory=list)


class Evaluation(EvaluationData):
    """One evaluation of one model. All checks happen before a model is loaded.

    Raises:
        CheckpointError, ConfigError, DataError, ModelError, RewardError: the user can fix it.
    """

    # ---- the models -----------------------------------------------------------------------------------------------

    @cached_property
    def judges(self) -> dict[str, RewardFunction]:
        """The main reward under "", and the others by name."""
        assert self.rows is not None
        requested: dict[str, Any] = {} if self.request.reward is None else {"": self.request.reward}
        requested |= {name: name for name in self.request.also}
        prompts, data = rows_by_source(self.rows.trees), self.config.data
        policy = PolicyText(self.run.rows.tokenizer, data.template, prompts, data.template_options)
        return {name: load_reward(reward, policy, self.run.device) for name, reward in requested.items()}

    @cached_property
    def reference_source(self) -> Source | None:
        """The reference model: as requested, else the model's start if known; None without one."""
        requested = self.request.reference
        if requested == NO_REFERENCE:
            return None
        if requested is not None:
            reference = find_model(requested)
            if self.config.model.sees:
                vision = self.config.model.model_dump(include={"vision", "image_options"})
                reference = replace(reference, base=reference.base.model_copy(update=vision))
            if self.run.rows.tokenizer.get_vocab() != load_tokenizer(reference.tokenizer).get_vocab():
                what = f"{reference.name} has another tokenizer than {self.source.name}"
                how = "log-probs and KL compare the same tokens: give a model with the same one"
                raise ConfigError("--reference", what, how)
            return reference
        start = self.source.start
        if start is not None and looks_like_folder(start.base.path) and not Path(start.base.path).expanduser().is_dir():
            self.notes.append(
                f"No reference: what it started from, {start.base.path}, no longer exists; name one with --reference."
            )
            return None
        return start

    def _load(self, source: Source) -> LiveReference:
        run = self.run
        model = source.load(run.device)
        self._check_context(source, model)
        processor = run.rows.processor if run.config.model.sees else None
        return LiveReference(prepare_for_inference(model, run.config, run.dtype, processor))

    def _check_context(self, source: Source, model: Any) -> None:
        embeddings = model.get_input_embeddings().weight.shape[0]
        if (tokens := tokens_of(self.run.rows.tokenizer)) > embeddings:
            what = f"has {embeddings:,} embeddings, the tokenizer {tokens:,} tokens"
            raise ModelError(source.name, what, "give the tokenizer that the model was trained with")
        context = getattr(model.config, "max_position_embeddings", None)
        longest = max((len(t.prompt_ids) for t in self.prompts), default=0) if self.request.generate else 0
        new_tokens = self.request.max_new_tokens if self.request.generate else 0
        length = self.config.data.max_length
        if context is None or max(length, longest + new_tokens) <= context:
            return
        if length > context:
            what = f"{length} is beyond the context of {source.name}, {context}"
            raise ConfigError("data.max_length", what, f"set data.max_length={context}")
        raise ConfigError(
            "--max-new-tokens",
            f"the longest prompt has {longest} tokens, so {new_tokens} more go beyond the context of {source.name}, {context}",
            "lower it, or data.max_length, which cuts prompts",
        )

    @cached_property
    def overlap(self) -> bool:
        """Whether BLEU and ROUGE are computed: if the data has answers and, unless they are asked for, the packages are installed."""
        if self.request.overlap is False or not self.good_answers:
            return False
        try:
            require_overlap()
        except ConfigError as error:
            if self.request.overlap:
                raise
            self.notes.append(f"BLEU and ROUGE are left out: they {error.what}; pip install 'penchant[eval]'.")
            return False
        return True

    # ---- the figures ----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise any error in the request or the data before a model is loaded."""
        self.request.check()
        request = self.request
        if request.generate is not None or request.text is not None:
            check_text_alone(self.config.model, self.source.name, "--generate" if request.generate else "--text")
        if self.rows is None and request.text is None:
            how = (
                "give --data FILE or --text FILE"
                if self.source.run is None
                else "give --data FILE or --text FILE (the run holds nothing out)"
            )
            raise ConfigError(self.source.name, "there is nothing to evaluate on", how)
        if request.generate is not None:
            if self.rows is None:
                raise ConfigError("--generate", "there are no prompts", "give --data with rows that have prompts")
            _ = self.judges, self.prompts
            _ = self.overlap
        elif not self.answers and (request.data is not None or request.text is None):
            raise DataError(
                ", ".join(request.files) or self.source.name,
                f"these rows ({self.rows.kind if self.rows else ''}) have no answers that are known to be good or bad",
                "add --generate 100 to have the model write, or give pairs",
            )
        if request.text is not None:
            _ = self.documents
        _ = self.reference_source

    @cached_property
    def exact(self) -> bool:
        return self.request.exact_kl is not False

    @property
    def beta(self) -> float:
        """Beta of the implicit reward: as requested, else the run's if it is not scheduled, else 1."""
        if self.request.beta is not None:
            return self.request.beta
        if self.source.run is None or self.source.run.algorithm is not None:
            return 1.0
        component = self.source.run.loss.components[0]
        beta = getattr(component.params, "beta", 1.0)
        return float(beta) if "beta" not in component.schedules else 1.0

    def measure(self) -> EvaluationResult:
        """Run the evaluation and return everything that was requested."""
        self.check()
        figures: list[Figure] = []
        rows: list[dict[str, Any]] = []
        answers: list[dict[str, Any]] = []
        policy = self._load(self.policy)
        reference = None if self.reference_source is None else self._load(self.reference_source)
        if self.answers:
            scores = self._score(policy, reference, self.answers, "answers")
            figures += answer_figures(scores, self.answers, self.beta)
            answers = self._answer_rows(scores)
            if reference is not None:
                self.notes.append(f"eval/implicit_reward is beta x (log pi - log ref) with beta = {self.beta:g}.")
        if self.request.text is not None:
            chunks, size, _ = self.documents
            figures += text_figures(self._score(policy, reference, chunks, "texts", exact=False), chunks, size)
        if self.request.generate is not None:
            completions, generated, rows = self._generate(policy)
            figures += generated
            if reference is not None:
                own_scores = self._score(policy, reference, completions.trees, "own completions")
                figures += generation_kl(own_scores, completions, sampled=self.request.temperature == 1.0)
                if self.request.temperature != 1.0:
                    self.notes.append("Sampled KL (k1, k3) is left out: it is unbiased at temperature 1 alone.")
        self._note_intervals(figures)
        names: dict[str, Any] = {"model": self.source.name}
        names |= {"checkpoint": self.source.checkpoint} if self.source.checkpoint else {}
        names |= {"reference": self.reference_source.name} if self.reference_source is not None else {}
        return EvaluationResult(names | flatten(figures), self.notes, self._settings(), rows, self.source.step, answers)

    def _answer_rows(self, scores: TokenScores) -> list[dict[str, Any]]:
        """The figures of each given answer next to its texts, under the same names as the overall figures."""
        decode = self.run.rows.tokenizer.decode
        rows = []
        for figures, tree, slot in figures_by_answer(scores, self.answers, self.beta):
            texts = {
                "source": tree.source,
                "prompt": decode(tree.prompt_ids.tolist(), skip_special_tokens=True),
                "completion": decode(tree.completion_ids[slot].tolist(), skip_special_tokens=True),
            }
            rows.append(texts | figures)
        return rows

    def _note_intervals(self, figures: Sequence[Figure]) -> None:
        """Add notes on intervals that are unreliable or missing."""
        counts = {"prompts with answers": len({t.prompt_key for t in self.answers})} if self.answers else {}
        counts |= {"documents": len(self.documents[1])} if self.request.text is not None else {}
        counts |= {"prompts written to": len(self.prompts)} if self.request.generate is not None else {}
        small = [f"{n} {label}" for label, n in counts.items() if n < FEW_PROMPTS]
        if small:
            self.notes.append(
                f"Intervals from fewer than {FEW_PROMPTS} prompts are too narrow to rely on: {', '.join(small)}."
            )
        if any(f.interval is None for f in figures):
            single = 1 in counts.values()
            which = "of a single prompt or document" if single else "that are the same for every prompt or document"
            self.notes.append(f"Figures {which} have no interval.")

    def _score(
        self,
        policy: LiveReference,
        reference: LiveReference | None,
        trees: Sequence[TokenTree],
        what: str,
        exact: bool | None = None,
    ) -> TokenScores:
        return score_tokens(
            policy,
            reference,
            trees,
            exact=self.exact if exact is None else exact,
            tokens_per_step=self.config.evaluation.tokens_per_step or self.config.train.tokens_per_step,
            progress=self.run.console.counter(f"log-probs of {what}"),
        )

    def _generate(self, policy: LiveReference) -> tuple[Completions, list[Figure], list[dict[str, Any]]]:
        """Sample completions; return them, their figures, and their rows for a file."""
        r, tokenizer = self.request, self.run.rows.tokenizer
        completions = sample_completions(
            policy.scorer.model,
            tokenizer,
            [t.prompt_ids.tolist() for t in self.prompts],
            n=r.samples,
            max_new_tokens=r.max_new_tokens,
            seed=r.seed,
            temperature=r.temperature,
            judge=self.judges.get(""),
            sources=[t.source for t in self.prompts],
            progress=self.run.console.counter("prompts written to"),
        )
        also = {
            n: score_completions(j, tokenizer, completions.trees, completions.texts)
            for n, j in self.judges.items()
            if n
        }
        figures = generation_figures(completions, also)
        references = [self.good_answers.get(t.prompt_ids.tobytes(), []) for t in self.prompts for _ in range(r.samples)]
        indices = [i for i, refs in enumerate(references) if refs]
        if self.overlap and indices:
            overlap, signature = overlap_figures(
                [completions.texts[i].strip() for i in indices],
                [references[i] for i in indices],
                completions.prompts[indices],
                stemmer=r.stemmer,
            )
            figures += overlap
            self.notes.append(f"{signature}.")
        return completions, figures, self._completion_rows(completions, also, references)

    def _completion_rows(
        self, generated: Completions, other_rewards: Mapping[str, np.ndarray], references: Sequence[Sequence[str]]
    ) -> list[dict[str, Any]]:
        decode = self.run.rows.tokenizer.decode
        rows = []
        for i, prompt in enumerate(generated.prompts.tolist()):
            tree = generated.trees[prompt]
            row: dict[str, Any] = {
                "source": tree.source,
                "prompt": decode(tree.prompt_ids.tolist(), skip_special_tokens=True),
                "sample": i % self.request.samples,
                "completion": generated.texts[i],
                **generated.row(i, other_rewards),
            }
            row |= {"references": list(references[i])} if references[i] else {}
            rows.append(row)
        return rows

    def _settings(self) -> dict[str, Any]:
        """Settings and fingerprints of the evaluation, for the log."""
        settings: dict[str, Any] = {"model": self.source.name, "checkpoint": self.source.checkpoint or None}
        reference = self.reference_source
        if reference is not None:
            settings["reference"] = reference.base.path if reference.name == START else reference.name
        if self.rows is not None and (self.answers or self.request.generate is not None):
            settings |= {"data": self.request.data or "held out", "fingerprint": self.rows.fingerprint}
            settings |= {"rows": self.rows.accepted, "kept_aside": len(self.rows.quarantined)}
        if self.request.text is not None:
            settings |= {"text": self.request.text, "text_fingerprint": self.documents[2]}
        settings |= self.request.settings() | {"beta": self.beta, "exact_kl": self.exact}
        return settings | {"dtype": str(self.run.dtype).removeprefix("torch."), "device": str(self.run.device)}


def evaluate_held_out(config: RunConfig, step: str, quiet: bool) -> EvaluationResult:
    """Compute a run's own held-out metrics, the same as during training."""
    run = Run(config, quiet=quiet)
    metrics = run.evaluate(step)
    held_out = run.rows.datasets[1]
    assert held_out is not None
    name = metrics["checkpoint"]
    settings = {"checkpoint": name, "data": "held out", "fingerprint": held_out.fingerprint, "rows": held_out.accepted}
    settings |= {"dtype": str(run.dtype).removeprefix("torch."), "device": str(run.device)}
    at_step = 0 if name == START else int(name.removeprefix("step-"))
    return EvaluationResult(metrics, changed_since(run.folder, run.config), settings, [], at_step)
