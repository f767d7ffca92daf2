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
        reason = "with gkd, which samples by itself; leave it out"
        reasons = dict.fromkeys((f"rollout.{name}" for name in RolloutConfig.model_fields), reason)
        reasons["data.weight"] = "with gkd, which does not weight rows; leave it out"
        if self.divergence != "jsd":
            reasons["beta"] = "on a KL; set divergence: jsd, or leave {} out"
        if not self.lam:
            sampling_keys = ("max_new_tokens", "top_p", "min_p", "top_k", "repetition_penalty")
            reasons |= dict.fromkeys(sampling_keys, "where lambda is 0 and the policy writes nothing; leave it out")
        return reasons

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
        policy_size, teacher_size = (_vocabulary(model) for model in (parts.model, teacher.scorer.model))
        if teacher_size < policy_size:
            what = f"has {teacher_size:,} rows in its head and the student {policy_size:,}"
            raise ConfigError("teacher.path", what, "take a teacher with at least as many (resize_token_embeddings)")
        writer = Writer(parts.model, parts.tokenizer, None, self, config.train.seed, parts.engine)
        return GKD(parts.scorer, teacher, writer, self, policy_size if teacher_size > policy_size else None)

    def evaluate(self, held_out: EvaluationContext) -> dict[str, Any]:
        """The divergence on the held-out answers, or on the policy's own if the data has only prompts."""
        from penchant.metrics.completions import EVALUATION_ITERATION
        from penchant.metrics.heldout import heldout_metrics, score_heldout

        algorithm: GKD = replace(held_out.algorithm, samples_answers=False)
        if self.signal == "tokens":
            scored, trees = held_out.scored(algorithm)
            return heldout_metrics(algorithm, scored, trees) | held_out.completions()
        answers, *_ = algorithm.writer.written(held_out.parts.trees[1], EVALUATION_ITERATION, 1)
        scored, order = score_heldout(
            algorithm,
            answers,
            shared=algorithm.scorer.shared,
            tokens_per_step=held_out.budget,
            device=held_out.parts.device,
        )
        return heldout_metrics(algorithm, scored, [answers[i] for i in order])


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
        divergence = self.config.divergence
        if divergence == "jsd":
            return divergences.DivergenceKind("js", js_beta=self.config.beta)
        return divergences.DivergenceKind("kl", "ref_policy" if divergence == "forward_kl" else "policy_ref")

    def begin_step(self, step: int, progress: float, trees: Sequence[TokenTree]) -> Sequence[TokenTree]:
        """Replace the answers of a fraction `lambda` of the rows (drawn from seed and step) with the policy's own."""
        if not self.samples_answers:
            return trees
        rng = np.random.default_rng([self.writer.seed, step])
        expected_count = self.config.lam * len(trees)
        count = int(expected_count) + int(rng.random() < expected_count - int(expected_count))
        indices = sorted(rng.permutation(len(trees))[:count].tolist())
        answers = self.writer.written([trees[i] for i in indices], step, 1)[0] if indices else []
        self._values = {"gkd/on_policy": count / len(trees)}
        if answers:
            self._values["completions/length"] = float(np.mean([len(t.completion_ids[0]) for t in answers]))
            self._values["completions/ended"] = 1.0 - float(np.mean([t.truncated[0] for t in answers]))
        by_index = dict(zip(indices, answers, strict=True))
        return [by_index.get(i, t) for i, t in enumerate(trees)]

    def weights(self, batch: PackedBatch) -> Mapping[str, float]:
        return {"main": float(batch.lengths.sum())}

    def score(self, batch: PackedBatch) -> Scored:
        teacher_logits = self.teacher.row_logits(batch)
        policy = self.scorer.divergence(
            batch, teacher_logits if self.rows is None else _first(teacher_logits, self.rows), self.kind
        )
        assert policy.divergence is not None and policy.ref_tokens is not None
        sums = [logprobs.per_completion(v, batch.lengths) for v in (policy.ref_tokens, policy.divergence)]
        return Scored(
            tree=batch.completion_tree,
            slot=batch.completion_slot,
            lengths=batch.lengths.to(policy.sums.dtype),
            policy_logps=policy.sums,
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

    def truncated(part: slice) -> Tensor:
        return logits(part)[:, :rows]

    return truncated
