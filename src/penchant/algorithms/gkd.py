"""GKD: a student learns a teacher's distribution over the whole vocabulary, on given answers and on its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from penchant.algorithms.method import EvaluationContext, Parts, Rollouts, Signal
from penchant.algorithms.rollouts import SamplingConfig, Writer
from penchant.base.lazy import Tensor, lazy
from penchant.data.tokenize import same_tokens
from penchant.errors import ConfigError
from penchant.rollout.options import RolloutConfig
from penchant.types import Algorithm, LossOutput, PackedBatch, Scored, TokenTree

if TYPE_CHECKING:
    from penchant import logprobs
    from penchant.logprobs import Scorer
    from penchant.logprobs.head import RowLogits
    from penchant.logprobs.reference import LiveReference
    from penchant.losses import divergences
else:
    logprobs, divergences = lazy("penchant.logprobs"), lazy("penchant.losses.divergences")


class GKDConfig(SamplingConfig):
    """On-policy distillation: match a teacher with the same tokenizer at every token of given answers and the student's own."""

    name: Literal["gkd"] = Field(description="gkd")
    samples: Literal[1] = Field(1, description="completions of each prompt")
    lam: float = Field(
        0.5,
        alias="lambda",
        ge=0,
        le=1,
        description="share of rows that the policy answers itself; 1: prompts are enough",
    )
    divergence: Literal["jsd", "forward_kl", "reverse_kl"] = Field(
        "jsd",
        description="forward_kl: KL(teacher || policy); reverse_kl: KL(policy || teacher); jsd: between them, by beta",
    )
    beta: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="the teacher's share in jsd's mean: near 0 it is a forward, near 1 a reverse KL (scaled)",
    )

    about: ClassVar[str] = (
        "`gkd`: on-policy distillation (GKD): the divergence from a teacher at every token of given and own answers."
    )
    needs: ClassVar[frozenset[str]] = frozenset({"reference"})
    live_reference: ClassVar[bool] = True
    metric: ClassVar[str] = "eval/loss"
    default_lr: ClassVar[tuple[float, float]] = (2e-5, 2e-4)

    @property
    def idle(self) -> dict[str, str]:
        why = "with gkd, which samples by itself; leave it out"
        found = dict.fromkeys((f"rollout.{name}" for name in RolloutConfig.model_fields), why)
        found["data.weight"] = "with gkd, which does not weight rows; leave it out"
        if self.divergence != "jsd":
            found["beta"] = "on a KL; set divergence: jsd, or leave {} out"
        if not self.lam:
            written = ("max_new_tokens", "top_p", "min_p", "top_k", "repetition_penalty")
            found |= dict.fromkeys(written, "where lambda is 0 and the policy writes nothing; leave it out")
        return found

    @property
    def signal(self) -> Signal:
        """``prompts`` if the policy writes all answers, else ``tokens``."""
        return "prompts" if self.lam == 1.0 else "tokens"

    @property
    def rollouts(self) -> Rollouts | None:
        return Rollouts(1, 1, self.max_new_tokens) if self.lam else None

    def check(self, parts: Parts) -> None:
        from penchant.models.load import load_tokenizer

        path = parts.config.reference.path
        if parts.config.reference.moves:
            raise ConfigError(
                "reference", "would follow the student, and it is the teacher", "leave out ema and sync_every"
            )
        if path is None:
            how = "give a model with the student's tokenizer"
            raise ConfigError("teacher.path", "is missing: gkd has no teacher", how)
        if not same_tokens(parts.tokenizer, load_tokenizer(path), template=False):
            what = f"{path} has another tokenizer than {parts.config.model.path}, so their distributions cannot be compared"
            how = "take a teacher of the same family, or train on its answers (loss.name=sft)"
            raise ConfigError("teacher.path", what, how)
        SamplingConfig.check(self, parts)

    def build(self, parts: Parts) -> GKD:
        teacher, config = parts.live_reference, parts.config
        parts.scorer.temperature = teacher.scorer.temperature = self.temperature
        own, other = (_vocabulary(model) for model in (parts.model, teacher.scorer.model))
        if other < own:
            what = f"has {other:,} rows in its head and the student {own:,}"
            raise ConfigError("teacher.path", what, "take a teacher with at least as many (resize_token_embeddings)")
        writer = Writer(parts.model, parts.tokenizer, None, self, config.train.seed, parts.engine)
        return GKD(parts.scorer, teacher, writer, self, own if other > own else None)

    def evaluate(self, held_out: EvaluationContext) -> dict[str, Any]:
        """The divergence on the held-out answers, or on the policy's own if the data has only prompts."""
        from penchant.metrics.completions import EVALUATION_ITERATION
        from penchant.metrics.heldout import heldout_metrics, score_heldout

        algorithm: GKD = replace(held_out.algorithm, samples_answers=False)
        if self.signal == "tokens":
            scored, trees = held_out.scored(algorithm)
            return heldout_metrics(algorithm, scored, trees) | held_out.completions()
        written, *_ = algorithm.writer.written(held_out.parts.trees[1], EVALUATION_ITERATION, 1)
        scored, order = score_heldout(
            algorithm,
            written,
            shared=algorithm.scorer.shared,
            tokens_per_step=held_out.budget,
            device=held_out.parts.device,
        )
        return heldout_metrics(algorithm, scored, [written[i] for i in order])


def _vocabulary(model: Any) -> int:
    from penchant.models.load import base_model_of

    return int(base_model_of(model).get_output_embeddings().weight.shape[0])


@dataclass(slots=True)
class GKD(Algorithm):
    """GKD (arXiv 2306.13649): ``loss = sum_t D(teacher_t, policy_t) / tokens``, exact over the vocabulary, in chunks.

    With ``m = beta teacher + (1 - beta) policy``: ``jsd = beta KL(teacher || m) + (1 - beta) KL(policy || m)``. There is no
    gradient through the sampling of own answers.

    Args:
        teacher: runs in each step; writer: samples; rows: vocabulary size of both heads, if the teacher's is larger.
        samples_answers: whether a step samples answers; False while scoring held-out ones.
    """

    scorer: Scorer
    teacher: LiveReference
    writer: Writer
    config: GKDConfig
    rows: int | None = None
    samples_answers: bool = True
    _values: dict[str, float] = field(default_factory=dict)

    @property
    def side_by_side(self) -> bool:
        return self.scorer.side_by_side and self.teacher.side_by_side

    @property
    def kind(self) -> divergences.DivergenceKind:
        how = self.config.divergence
        if how == "jsd":
            return divergences.DivergenceKind("js", js_beta=self.config.beta)
        return divergences.DivergenceKind("kl", "ref_policy" if how == "forward_kl" else "policy_ref")

    def begin_step(self, step: int, progress: float, trees: Sequence[TokenTree]) -> Sequence[TokenTree]:
        """Replace the answers of a fraction `lambda` of the rows (drawn from seed and step) with the policy's own."""
        if not self.samples_answers:
            return trees
        rng = np.random.default_rng([self.writer.seed, step])
        wanted = self.config.lam * len(trees)
        count = int(wanted) + int(rng.random() < wanted - int(wanted))
        own = sorted(rng.permutation(len(trees))[:count].tolist())
        made = self.writer.written([trees[i] for i in own], step, 1)[0] if own else []
        self._values = {"gkd/on_policy": count / len(trees)}
        if made:
            self._values["completions/length"] = float(np.mean([len(t.completion_ids[0]) for t in made]))
            self._values["completions/ended"] = 1.0 - float(np.mean([t.truncated[0] for t in made]))
        found = dict(zip(own, made, strict=True))
        return [found.get(i, t) for i, t in enumerate(trees)]

    def weights(self, batch: PackedBatch) -> Mapping[str, float]:
        return {"main": float(batch.lengths.sum())}

    def score(self, batch: PackedBatch) -> Scored:
        theirs = self.teacher.row_logits(batch)
        made = self.scorer.divergence(batch, theirs if self.rows is None else _first(theirs, self.rows), self.kind)
        assert made.divergence is not None and made.ref_tokens is not None
        sums = [logprobs.per_completion(v, batch.lengths) for v in (made.ref_tokens, made.divergence)]
        return Scored(
            tree=batch.completion_tree,
            slot=batch.completion_slot,
            lengths=batch.lengths.to(made.sums.dtype),
            policy_logps=made.sums,
            ref_logps=sums[0],
            divergence=sums[1],
            pairs=batch.pairs,
        )

    def loss(self, scored: Scored) -> LossOutput:
        assert scored.divergence is not None and scored.ref_logps is not None
        metrics = {
            "logps/per_token": (scored.policy_logps.detach(), scored.lengths),
            "gkd/teacher_logps": (scored.ref_logps.detach(), scored.lengths),
        }
        return LossOutput(scored.divergence, scored.lengths, metrics)

    def step_values(self) -> Mapping[str, float]:
        return self._values


def _first(logits: RowLogits, rows: int) -> RowLogits:
    """Restrict logits to the first `rows` tokens; further rows of a head are only padding."""

    def few(part: slice) -> Tensor:
        return logits(part)[:, :rows]

    return few
