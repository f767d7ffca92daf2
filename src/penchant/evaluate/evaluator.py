"""A model's figures: its rows, the models, what they find likely, what is written, and where it is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from penchant.config import RunConfig, config_from_mapping
from penchant.data.adapt import adapt
from penchant.data.load import Dataset, load_preferences
from penchant.data.tokenise import TokenisedDataset, tokenise
from penchant.errors import ConfigError, DataError, ModelError
from penchant.evaluate.request import Request
from penchant.evaluate.sources import START, Source, find_model
from penchant.evaluation.answers import answer_figures, is_answer
from penchant.evaluation.figures import Figure, flat
from penchant.evaluation.generated import kl_of_written, text_of_written
from penchant.evaluation.overlap import overlap_figures, require_overlap
from penchant.evaluation.perplexity import text_figures, without_eos
from penchant.evaluation.token_scores import TokenScores, score_tokens
from penchant.evaluation.written import Judge, Written, judged, write
from penchant.models.load import cast_parameters, load_tokenizer, looks_like_folder
from penchant.models.reward import load_model_config
from penchant.packing_check import choose_packing
from penchant.reference import LiveReference
from penchant.rewards import load_reward
from penchant.rewards.model import PolicyText
from penchant.run import Run
from penchant.types import TokenTree

NO_REFERENCE = "none"
DEFAULT_LENGTH = 1024
FEW = 10  # below it a percentile bootstrap is too narrow


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What an evaluation leaves.

    Args:
        metrics: ``eval/...`` with ``/ci`` and ``/n``, and what was evaluated; notes: sentences that belong to them.
        what: settings and fingerprints that they depend on; rows: the completions; step: of a run, else None.
    """

    metrics: dict[str, Any]
    notes: list[str]
    what: dict[str, Any]
    rows: list[dict[str, Any]]
    step: int | None


@dataclass
class Evaluation:
    """One evaluation of one model; everything is checked before a model is loaded.

    Args:
        source: the model; request: what is asked; overrides: ``key.path=value`` of a model that has no config of its own.

    Raises:
        CheckpointError, ConfigError, DataError, ModelError, RewardError: a person can mend it.
    """

    source: Source
    request: Request
    overrides: Sequence[str] = ()
    quiet: bool = False
    notes: list[str] = field(default_factory=list)

    # ---- the rows -------------------------------------------------------------------------------------------------

    @cached_property
    def config(self) -> RunConfig:
        """The run's settings, or those of a run on this model with the data as its own."""
        if self.source.run is not None:
            return self.source.run
        model = self.source.base.model_dump(exclude_unset=True) | {"tokenizer": self.source.tokenizer}
        values = {"model": model, "data": {"path": self.request.data or self.request.text or ""}, "output": "."}
        config = config_from_mapping(values, list(self.overrides))
        context = getattr(load_model_config(config.model.path), "max_position_embeddings", None)
        if context is not None and "max_length" not in config.data.model_fields_set:
            data = config.data.model_copy(update={"max_length": min(DEFAULT_LENGTH, context)})
            config = config.model_copy(update={"data": data})
        return config

    @property
    def policy_source(self) -> Source:
        """The model, with overrides such as ``model.revision``; those of a run are in its config already."""
        return self.source if self.source.run is not None else replace(self.source, base=self.config.model)

    @cached_property
    def run(self) -> Run:
        """Reads rows, makes tokens, and says in what precision and on which device models run."""
        run = Run(self.config, quiet=self.quiet)
        if self.source.adapter is not None or self.source.checkpoint not in ("", START):
            run.tokenizer = load_tokenizer(
                self.source.tokenizer
            )  # the checkpoint's own: what it started from may be gone
        return run

    @cached_property
    def rows(self) -> Dataset | None:
        """The rows with prompts: of --data, or the run's held-out ones; None where there are none."""
        data = self.config.data
        if self.request.data is None:
            if self.source.run is None:
                return None
            held = self.run.datasets[1]
            return None if held is None or held.kind == "text" else held
        own_limit = self.source.run is None or any(o.startswith("data.limit=") for o in self.overrides)
        rows = load_preferences(
            self.request.data,
            shape=data.shape,
            columns=data.columns,
            on_bad_row=data.on_bad_row,
            identical=data.identical,
            limit=data.limit if own_limit else None,
        )
        if rows.kind == "text":
            raise DataError(self.request.data, "holds texts without prompts", "give it as --text")
        if rows.quarantined:
            self.notes.append(f"Kept aside: {len(rows.quarantined):,} bad rows of {rows.total:,}.")
        if rows.kind == "scored" and data.pairs_from_scores != "off":
            rows = adapt(rows, "eval", "pairs", frozenset(), data, self.request.data)
        return rows

    @cached_property
    def tokens(self) -> TokenisedDataset:
        assert self.rows is not None
        made = self.run.tokenise_rows(self.rows)
        for what, count in (
            ("rows could not be made into tokens", len(made.quarantined)),
            ("prompts lost their start", len(made.cut_prompts)),
            ("rows have an answer that lost its end", len(made.cut_completions)),
        ):
            if count:
                self.notes.append(f"At data.max_length {self.config.data.max_length}: {count:,} {what}.")
        if not made.trees:
            raise DataError(
                str(self.request.data), "no row is left after cutting rows into tokens", "look at data.max_length"
            )
        return made

    @cached_property
    def answers(self) -> list[TokenTree]:
        """Rows whose answers are known to be good or bad."""
        if self.rows is None or self.rows.kind not in ("pairs", "sft", "unpaired"):
            return []
        return [t for t in self.tokens.trees if is_answer(t)]

    @cached_property
    def documents(self) -> tuple[list[TokenTree], dict[str, int], str]:
        """Chunks of --text, the bytes of each document, and the file's fingerprint."""
        assert self.request.text is not None
        data, tokenizer = self.config.data, self.run.tokenizer
        texts = load_preferences(self.request.text, shape="text", on_bad_row=data.on_bad_row)
        if texts.quarantined:
            self.notes.append(f"Kept aside: {len(texts.quarantined):,} bad documents of {texts.total:,}.")
        made = tokenise(
            texts, tokenizer, max_length=data.max_length, add_eos=tokenizer.eos_token_id is not None, on_bad_row="error"
        )
        if made.split_documents:
            self.notes.append(
                f"{made.split_documents:,} documents longer than data.max_length {data.max_length} are read in parts, "
                "each without what came before it."
            )
        size = {t.source: len(t.completions[0].text.encode()) for t in texts.trees}
        return without_eos(made.trees, tokenizer.eos_token_id), size, texts.fingerprint

    @cached_property
    def prompts(self) -> list[TokenTree]:
        """The first row of each prompt, as many as are asked for."""
        first: dict[bytes, TokenTree] = {}
        for t in self.tokens.trees:
            first.setdefault(t.prompt_ids.tobytes(), t)
        wanted = self.request.generate or 0
        if len(first) < wanted:
            self.notes.append(f"There are {len(first):,} prompts, not {wanted:,}.")
        return list(first.values())[:wanted]

    @cached_property
    def good_answers(self) -> dict[bytes, list[str]]:
        """The good answers' texts of every prompt."""
        assert self.rows is not None
        text_of = {t.source: t for t in self.rows.trees}
        found: dict[bytes, list[str]] = {}
        for t in self.answers:
            for i, c in enumerate(text_of[t.source].completions):
                if c.label if c.label is not None else i == 0:
                    found.setdefault(t.prompt_ids.tobytes(), []).append(c.text.strip())
        return found

    # ---- the models -----------------------------------------------------------------------------------------------

    @cached_property
    def judges(self) -> dict[str, Judge]:
        """The reward under "", and others by name."""
        assert self.rows is not None
        asked: dict[str, Any] = {} if self.request.reward is None else {"": self.request.reward}
        asked |= {name: name for name in self.request.also}
        prompts = {t.source: t.prompt for t in self.rows.trees}
        policy = PolicyText(self.run.tokenizer, self.config.data.template, prompts)
        try:
            return {name: load_reward(reward, policy, self.run.device) for name, reward in asked.items()}
        except ValidationError as error:  # a mapping that holds something else than names and weights
            said = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise ConfigError("--reward", said, "write NAME or {NAME: WEIGHT, ...}") from error

    @cached_property
    def reference_source(self) -> Source | None:
        """What the model is compared with, where that is known."""
        asked = self.request.reference
        if asked == NO_REFERENCE:
            return None
        if asked is not None:
            found = find_model(asked)
            self._check_same_tokens(found)
            return found
        start = self.source.start
        if start is not None and looks_like_folder(start.base.path) and not Path(start.base.path).expanduser().is_dir():
            self.notes.append(
                f"No reference: what it started from, {start.base.path}, is not there; name one with --reference."
            )
            return None
        return start

    def _check_same_tokens(self, other: Source) -> None:
        own, theirs = self.run.tokenizer, load_tokenizer(other.tokenizer)
        if own.get_vocab() != theirs.get_vocab():
            raise ConfigError(
                "--reference",
                f"{other.name} has another tokenizer than {self.source.name}",
                "log-probs and KL compare the same tokens: give a model with the same one",
            )

    def _load(self, source: Source) -> LiveReference:
        run = self.run
        model = source.load(run.device)
        run.set_threads(sum(p.numel() for p in model.parameters()))
        self._check_context(source, model)
        cast_parameters(model, run.dtype)
        model.requires_grad_(False).eval()
        return LiveReference(choose_packing(model, self.config.train.packing, self.config.model.kernels)[0])

    def _check_context(self, source: Source, model: Any) -> None:
        rows = model.get_input_embeddings().weight.shape[0]
        if len(self.run.tokenizer) > rows:
            raise ModelError(
                source.name, f"has {rows:,} embeddings, the tokenizer {len(self.run.tokenizer):,} tokens", ""
            )
        context = getattr(model.config, "max_position_embeddings", None)
        longest = max((len(t.prompt_ids) for t in self.prompts), default=0) if self.request.generate else 0
        new = self.request.max_new_tokens if self.request.generate else 0
        length = self.config.data.max_length
        if context is None or max(length, longest + new) <= context:
            return
        if length > context:
            raise ConfigError(
                "data.max_length",
                f"{length} is beyond the context of {source.name}, {context}",
                f"set data.max_length={context}",
            )
        raise ConfigError(
            "--max-new-tokens",
            f"the longest prompt has {longest} tokens, so {new} more go beyond the context of {source.name}, {context}",
            "lower it, or data.max_length, which cuts prompts",
        )

    # ---- the figures ----------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Everything that can be wrong before a model is loaded.

        Raises:
            ConfigError, DataError, ModelError, RewardError.
        """
        self.request.check()
        request = self.request
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
            if request.overlap and self.good_answers:
                require_overlap()
        elif request.data is not None and not self.answers:
            raise DataError(
                str(request.data),
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
        """Of the implicit reward: as asked, the run's where it is one number, else 1."""
        if self.request.beta is not None:
            return self.request.beta
        if self.source.run is None or self.source.run.algorithm is not None:
            return 1.0
        component = self.source.run.loss.components[0]
        beta = getattr(component.params, "beta", 1.0)
        return float(beta) if "beta" not in component.schedules else 1.0

    def measure(self) -> Evaluated:
        """All that is asked."""
        self.check()
        figures: list[Figure] = []
        rows: list[dict[str, Any]] = []
        policy = self._load(self.policy_source)
        reference = None if self.reference_source is None else self._load(self.reference_source)
        if self.answers:
            figures += answer_figures(self._scores(policy, reference, self.answers, "answers"), self.answers, self.beta)
            if reference is not None:
                self.notes.append(f"eval/rewards are beta x (log pi - log ref) with beta = {self.beta:g}.")
        if self.request.text is not None:
            chunks, size, _ = self.documents
            figures += text_figures(self._scores(policy, reference, chunks, "texts", exact=False), chunks, size)
        if self.request.generate is not None:
            written, more, rows = self._generated(policy)
            figures += more
            if reference is not None:
                scores = self._scores(policy, reference, written.trees, "own completions")
                figures += kl_of_written(scores, written, sampled=self.request.temperature == 1.0)
                if self.request.temperature != 1.0:
                    self.notes.append("Sampled KL (k1, k3) is left out: it is unbiased at temperature 1 alone.")
        self._about_intervals(figures)
        head: dict[str, Any] = {"model": self.source.name}
        head |= {"checkpoint": self.source.checkpoint} if self.source.checkpoint else {}
        head |= {"reference": self.reference_source.name} if self.reference_source is not None else {}
        return Evaluated(head | flat(figures), self.notes, self._what(), rows, self.source.step)

    def _about_intervals(self, figures: Sequence[Figure]) -> None:
        """Where they say less than they seem to."""
        counts = {"prompts with answers": len({t.prompt_ids.tobytes() for t in self.answers})} if self.answers else {}
        counts |= {"documents": len(self.documents[1])} if self.request.text is not None else {}
        counts |= {"prompts written to": len(self.prompts)} if self.request.generate is not None else {}
        few = [f"{n} {what}" for what, n in counts.items() if n < FEW]
        if few:
            self.notes.append(f"Intervals from fewer than {FEW} prompts are too narrow to rely on: {', '.join(few)}.")
        if any(f.interval is None for f in figures):
            self.notes.append("Figures of a single prompt or document have no interval.")

    def _scores(
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

    def _generated(self, policy: LiveReference) -> tuple[Written, list[Figure], list[dict[str, Any]]]:
        """What the model wrote, its figures, and its rows for a file."""
        r, tokenizer = self.request, self.run.tokenizer
        written = write(
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
        also = {n: judged(j, tokenizer, written.trees, written.texts) for n, j in self.judges.items() if n}
        figures = text_of_written(written, also)
        references = [self.good_answers.get(t.prompt_ids.tobytes(), []) for t in self.prompts for _ in range(r.samples)]
        have = [i for i, refs in enumerate(references) if refs]
        if r.overlap and have:
            overlap = overlap_figures(
                [written.texts[i].strip() for i in have],
                [references[i] for i in have],
                written.prompts[have],
                stemmer=r.stemmer,
            )
            figures += overlap.figures
            self.notes.append(f"{overlap.signature}.")
        return written, figures, self._completions(written, also, references)

    def _completions(
        self, written: Written, also: Mapping[str, np.ndarray], references: Sequence[Sequence[str]]
    ) -> list[dict[str, Any]]:
        decode = self.run.tokenizer.decode
        rows = []
        for i, prompt in enumerate(written.prompts.tolist()):
            tree = written.trees[prompt]
            row: dict[str, Any] = {
                "source": tree.source,
                "prompt": decode(tree.prompt_ids.tolist(), skip_special_tokens=True),
                "sample": i % self.request.samples,
                "completion": written.texts[i],
                "tokens": len(written.ids[i]),
                "ended": bool(written.ended[i]),
            }
            row |= {} if written.rewards is None else {"reward": float(written.rewards[i])}
            row |= {"also": {name: float(v[i]) for name, v in also.items()}} if also else {}
            row |= {"references": list(references[i])} if references[i] else {}
            rows.append(row)
        return rows

    def _what(self) -> dict[str, Any]:
        """Settings and fingerprints, for the log."""
        found: dict[str, Any] = {"model": self.source.name, "checkpoint": self.source.checkpoint or None}
        reference = self.reference_source
        if reference is not None:
            found["reference"] = reference.base.path if reference.name == START else reference.name
        if self.rows is not None and (self.answers or self.request.generate is not None):
            found |= {"data": self.request.data or "held out", "fingerprint": self.rows.fingerprint}
            found |= {"rows": self.rows.accepted, "kept_aside": len(self.rows.quarantined)}
        if self.request.text is not None:
            found |= {"text": self.request.text, "text_fingerprint": self.documents[2]}
        found |= self.request.settings() | {"beta": self.beta, "exact_kl": self.exact}
        return found | {"dtype": str(self.run.dtype).removeprefix("torch."), "device": str(self.run.device)}


def held_out_of_run(config: RunConfig, step: str, quiet: bool) -> Evaluated:
    """A run's own held-out metrics, as they are computed while it trains."""
    run = Run(config, quiet=quiet)
    metrics = run.evaluate(step)
    held = run.datasets[1]
    assert held is not None
    name = metrics["checkpoint"]
    what = {"checkpoint": name, "data": "held out", "fingerprint": held.fingerprint, "rows": held.accepted}
    what |= {"dtype": str(run.dtype).removeprefix("torch."), "device": str(run.device)}
    at = 0 if name == START else int(name.removeprefix("step-"))
    return Evaluated(metrics, [], what, [], at)
