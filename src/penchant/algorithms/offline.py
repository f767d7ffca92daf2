"""Losses on a fixed dataset, alone or in a weighted mix; all differences between them come from their specs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from penchant.algorithms.method import EvaluationContext, Method, Parts, Signal
from penchant.base.lazy import Tensor, lazy, torch
from penchant.base.machine import place_of
from penchant.data.packing import run_passes
from penchant.errors import ConfigError
from penchant.losses.helpers import Metrics, reward_metrics, side_metrics
from penchant.losses.registry import LossParams, LossSpec
from penchant.losses.schedules import Schedule
from penchant.losses.section import LossConfig
from penchant.losses.unpaired import kto_z0
from penchant.types import (
    Algorithm,
    ListLogps,
    LossOutput,
    PackedBatch,
    PairLogps,
    Scored,
    TokenTree,
    UnpairedLogps,
    Weighted,
)

if TYPE_CHECKING:
    from penchant import logprobs
    from penchant.logprobs import Scorer
    from penchant.logprobs import reference as references
    from penchant.logprobs.reference import Reference
    from penchant.losses import divergences
else:
    logprobs, divergences = lazy("penchant.logprobs"), lazy("penchant.losses.divergences")
    references = lazy("penchant.logprobs.reference")

# needs of a loss that do not affect the log-probs of held-out rows
SCORED_ALIKE = frozenset({"reference", "scores", "score_gap", "labels", "delta", "batch"})


@dataclass(frozen=True, slots=True)
class Losses(Method):
    """The `loss` section of a config: one loss or a mix, on given answers."""

    config: LossConfig

    @property
    def specs(self) -> list[LossSpec]:
        return [c.spec for c in self.config.components]

    @property
    def name(self) -> str:
        return "+".join(s.name for s in self.specs)

    @property
    def about(self) -> str:
        papers = {
            s.name: f" ([arXiv {s.paper}](https://arxiv.org/abs/{s.paper}))" if s.paper else "" for s in self.specs
        }
        return "\n\n".join(f"`{s.name}`: `{s.formula}`{papers[s.name]}" for s in self.specs)

    @property
    def signal(self) -> Signal:
        """The first of pairs, unpaired, lists and tokens that one of the losses learns from."""
        order: tuple[Signal, ...] = ("pairs", "unpaired", "lists", "tokens")
        return next(s for s in order if s in {spec.signal for spec in self.specs})

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(s.needs for s in self.specs))

    @property
    def live_reference(self) -> bool:
        return "divergence" in self.needs  # a cache does not hold whole distributions

    @property
    def metric(self) -> str:
        return "eval/loss" if {s.signal for s in self.specs} == {"tokens"} else "eval/rewards/accuracies"

    @property
    def loss_terms(self) -> tuple[str, ...]:
        first, *others = self.specs
        terms = ["main", *first.terms]
        terms += [f"{s.name}{part}" for s in others for part in ("", *(f"/{t}" for t in s.terms))]
        terms += ["nll"] if self.config.nll_weight else []
        return tuple(terms) if len(terms) > 1 else ()

    @property
    def default_lr(self) -> tuple[float, float]:
        return (2e-5, 2e-4) if self.signal == "tokens" else self.specs[0].lr

    def build(self, parts: Parts) -> Offline:
        config, train = self.config, parts.config.train
        if parts.config.data.weight and "batch" in self.needs:
            what = f"rows have weights, and {self.name} looks at all rows of a step together"
            raise ConfigError("data.weight", what, "leave it out, or choose another loss")
        return Offline(
            parts.scorer,
            [
                Component(spec, c.params, c.weight, c.schedules)
                for spec, c in zip(self.specs, config.components, strict=True)
            ],
            parts.reference,
            nll_weight=config.nll_weight,
            average_log_prob=config.average_log_prob,
            mismatched=parts.mismatched,
            tokens_per_step=parts.config.evaluation.tokens_per_step or train.tokens_per_step,
        )

    def evaluate(self, held_out: EvaluationContext) -> dict[str, Any]:
        from penchant.metrics.heldout import heldout_metrics

        algorithm: Offline = held_out.algorithm
        reference_moves = held_out.parts.config.reference.moves
        if reference_moves:  # rewards against a moved reference would not show what was learned
            algorithm = replace(algorithm, reference=held_out.start())
        scored, trees = held_out.scored(algorithm, alike=self.needs <= SCORED_ALIKE and not reference_moves)
        change = held_out.loss_change(algorithm, scored, trees)
        figures = heldout_metrics(algorithm, scored, trees) | held_out.by_set(algorithm, scored, trees)
        return figures | change | held_out.completions()


@dataclass(frozen=True, slots=True)
class Component:
    """One loss of a mix: its spec, hyperparameters, weight, and the hyperparameters that change over the run."""

    spec: LossSpec
    params: LossParams
    weight: float = 1.0
    schedules: Mapping[str, Schedule] = field(default_factory=dict)

    def at(self, t: float) -> LossParams:
        """The hyperparameters at progress t in [0, 1]."""
        return self.params.model_copy(update={name: s.at(t) for name, s in self.schedules.items()})


@dataclass(slots=True)
class Offline(Algorithm):
    """Losses of the registry on packed batches of a fixed dataset.

    ``loss = sum_c weight_c loss_c (+ nll_weight x SFT on the chosen completions)``

    Args:
        scorer: the policy.
        components: at least one loss; the first one's `rewards/*` are the run's.
        reference: where reference log-probs come from; required when a loss needs them.
        nll_weight: adds the chosen completions' negative log-likelihood, a mean over tokens.
        average_log_prob: losses get log-probs per token, of both policy and reference.
        mismatched: by dataset row, its prompt with another prompt's completion, to estimate KTO's z0.
        tokens_per_step: tokens in one forward pass over those.
    """

    scorer: Scorer
    components: Sequence[Component]
    reference: Reference | None = None
    nll_weight: float = 0.0
    average_log_prob: bool = False
    mismatched: Mapping[int, TokenTree] = field(default_factory=dict)
    tokens_per_step: int = 4096
    _params: list[LossParams] = field(default_factory=list)
    _z0: float = 0.0
    _reward_means: Tensor = field(default_factory=lambda: torch.zeros(2, 2, dtype=torch.float64))  # side x (sum, steps)

    def __post_init__(self) -> None:
        for c in self.components:
            if "reference" in c.spec.needs and self.reference is None:
                raise ConfigError("loss.name", f"{c.spec.name} needs a reference model", "set reference.kind")
        if "divergence" in self.needs and not isinstance(self.reference, references.LiveReference):
            what = "an exact divergence needs the reference's whole distribution, which a cache does not hold"
            raise ConfigError("reference.kind", what, "set reference.kind=frozen (or adapter, with LoRA)")
        self._params = [c.at(0.0) for c in self.components]

    @property
    def needs(self) -> frozenset[str]:
        return frozenset().union(*(c.spec.needs for c in self.components))

    @property
    def coupled(self) -> bool:
        return "batch" in self.needs

    @property
    def side_by_side(self) -> bool:
        live = self.reference if isinstance(self.reference, references.LiveReference) else None
        return self.scorer.side_by_side and (live is None or live.side_by_side)

    # ---- a step ---------------------------------------------------------------------------------------------------

    def begin_step(self, step: int, progress: float, trees: Sequence[TokenTree]) -> Sequence[TokenTree]:
        """Update scheduled hyperparameters, and estimate KTO's z0 over all rows of the step."""
        self._params = [c.at(progress) for c in self.components]
        if "z0" in self.needs:
            self._z0 = self._estimate_z0([replace(self.mismatched[t.row], weight=t.weight) for t in trees])
        return trees

    def _estimate_z0(self, trees: Sequence[TokenTree]) -> float:
        assert self.reference is not None
        reference, live = self.reference, references.LiveReference(self.scorer)

        def policy_and_reference(batch: PackedBatch) -> tuple[Tensor, Tensor]:
            size = batch.lengths if self.average_log_prob else 1
            return live.logps(batch) / size, reference.logps(batch) / size

        shared, device = self.scorer.shared, place_of(self.scorer.model)
        passes = run_passes(
            policy_and_reference, trees, self.tokens_per_step, shared=shared, device=device, lanes=self.side_by_side
        )
        order, logps = zip(*passes, strict=True)
        policy, ref = map(torch.cat, zip(*logps, strict=True))
        weights = policy.new_tensor(
            [trees[i].weight for members in order for i in members for _ in trees[i].completion_ids]
        )
        weights = weights / weights.mean()
        return kto_z0(policy * weights, ref * weights)

    def weights(self, batch: PackedBatch) -> Mapping[str, float]:
        """Every term's denominator, from the loss of dummy log-probs, as weights do not depend on them."""
        zeros = torch.zeros(len(batch.lengths), device=batch.lengths.device)
        names = (
            "ref_logps",
            "divergence",
            "alignment",
            "policy_shared_logps",
            "ref_shared_logps",
            "weighted_logps",
        )
        with torch.no_grad():
            out = self.loss(_scored(batch, zeros, **dict.fromkeys(names, zeros)))
        return {
            name: float(values.numel()) if weights is None else float(weights.double().sum())
            for name, (values, weights) in out.summands().items()
        }

    def columns(self, batch: PackedBatch) -> Mapping[str, Tensor]:
        if "reference" in self.needs and isinstance(self.reference, references.CachedReference):
            return self.reference.columns(batch, tokens="shared_logps" in self.needs)
        return {}

    def score(self, batch: PackedBatch) -> Scored:
        # the reference first, so that its activations are freed before the policy's are allocated
        needs, reference, per_completion = self.needs, self.reference, logprobs.per_completion
        shared = "shared_logps" in needs
        ref_tokens = ref = None
        if "divergence" in needs:
            assert isinstance(reference, references.LiveReference)
            (params,) = (p for c, p in zip(self.components, self._params, strict=True) if "divergence" in c.spec.needs)
            kind = divergences.DivergenceKind(params.divergence, params.direction, params.renyi_alpha)  # type: ignore[attr-defined]
            policy = self.scorer.divergence(batch, reference.row_logits(batch), kind)
            ref_tokens = policy.ref_tokens
        else:
            if reference is not None and "reference" in needs:
                ref_tokens = reference.token_logps(batch) if shared else None
                ref = None if shared else reference.logps(batch)
            policy = self.scorer.logps(batch, alignment="alignment" in needs)
        columns = {"ref_logps": ref, "alignment": policy.alignment}
        if "token_probs" in needs:
            weighted = policy.tokens.detach().exp() * policy.tokens
            columns["weighted_logps"] = per_completion(weighted, batch.lengths)
        if policy.divergence is not None:
            columns["divergence"] = per_completion(policy.divergence, batch.lengths)
        if ref_tokens is not None:
            columns["ref_logps"] = per_completion(ref_tokens, batch.lengths)
        if ref_tokens is not None and shared:
            first_tokens = _first_tokens(batch).to(policy.tokens.dtype)
            columns["policy_shared_logps"] = per_completion(policy.tokens * first_tokens, batch.lengths)
            columns["ref_shared_logps"] = per_completion(
                ref_tokens.to(first_tokens.dtype) * first_tokens, batch.lengths
            )
        return _scored(batch, policy.sums, **columns)

    def loss(self, scored: Scored) -> LossOutput:
        parts = [self._component(c, p, scored) for c, p in zip(self.components, self._params, strict=True)]
        first = parts[0]
        terms = dict(first.terms)
        metrics = {**first.metrics, **logp_metrics(scored)}
        for c, out in zip(self.components[1:], parts[1:], strict=True):
            terms |= {
                c.spec.name if name == "main" else f"{c.spec.name}/{name}": v for name, v in out.summands().items()
            }
            metrics |= {f"{c.spec.name}/{name}": v for name, v in out.metrics.items()}
        if self.nll_weight:
            learned, lengths = _learned(scored)
            terms["nll"] = (-self.nll_weight * learned, lengths)
            metrics["nll"] = (-learned.detach(), lengths)
        out = LossOutput(first.losses, first.weights, metrics, terms)
        if scored.row_weights is None:
            return out
        learned, _ = _learned(scored, scored.row_weights)
        return out.weighted(scored.row_weights, scored.matrix(scored.row_weights)[:, 0], learned)

    def _component(self, c: Component, params: LossParams, scored: Scored) -> LossOutput:
        out = c.spec.fn(self._view(c.spec, scored), **params.arguments())
        metrics = dict(out.metrics)
        if c.spec.signal == "unpaired" and scored.is_pairs and "rewards/chosen" in metrics:
            # with both answers of a prompt, margins and accuracies can be computed as for a pairwise loss
            rewards = metrics["rewards/chosen"][0] + metrics["rewards/rejected"][0]
            metrics |= reward_metrics(*scored.sides(rewards))
        terms = {name: (c.weight * values, weights) for name, (values, weights) in out.terms.items()}
        return LossOutput(c.weight * out.losses, out.weights, metrics, terms)

    def _view(self, spec: LossSpec, scored: Scored) -> PairLogps | UnpairedLogps | ListLogps:
        if self.average_log_prob and spec.signal != "tokens":
            n, ref = scored.lengths, scored.ref_logps
            scored = replace(scored, policy_logps=scored.policy_logps / n, ref_logps=None if ref is None else ref / n)
        if spec.signal == "pairs":
            return pair_view(scored)
        if spec.signal == "lists":
            return list_view(scored)
        if spec.signal == "tokens":
            policy, lengths = _learned(scored)
            weighted = None if scored.weighted_logps is None else _learned(scored, scored.weighted_logps)[0]
            return UnpairedLogps(policy, lengths, weighted_logps=weighted)
        return UnpairedLogps(
            policy_logps=scored.policy_logps,
            lengths=scored.lengths,
            ref_logps=scored.ref_logps,
            labels=scored.labels,
            divergence=scored.divergence,
            z0=self._z0 if "z0" in spec.needs else None,
            delta=self.delta if "delta" in spec.needs else None,
        )

    def end_step(self, step: int, means: Mapping[str, float]) -> None:
        """Update BCO's running mean of rewards and a moving reference."""
        for c in self.components:
            if "delta" in c.spec.needs:
                prefix = "" if c is self.components[0] else f"{c.spec.name}/"
                for side, name in enumerate(("rewards/chosen", "rewards/rejected")):
                    if prefix + name in means:
                        self._reward_means[side] += torch.tensor([means[prefix + name], 1.0], dtype=torch.float64)
        references.followed(self.reference, step)

    @property
    def delta(self) -> float:
        """BCO's shift: the mean over sides of the mean reward of all steps so far."""
        sides = [float(total / steps) for total, steps in self._reward_means.tolist() if steps]
        return sum(sides) / len(sides) if sides else 0.0

    def step_values(self) -> dict[str, float]:
        """The values behind the step's losses, for its log line: scheduled hyperparameters, z0, delta."""
        values: dict[str, float] = {}
        for i, (c, params) in enumerate(zip(self.components, self._params, strict=True)):
            prefix = "" if i == 0 else f"{c.spec.name}/"
            for name in c.schedules:
                alias = type(params).model_fields[name].alias or name
                values[f"{prefix}{alias}"] = float(getattr(params, name))
        if "z0" in self.needs:
            values["kl/z0"] = self._z0
        if "delta" in self.needs:
            values["delta"] = self.delta
        return values

    def state_tensors(self) -> dict[str, Tensor]:
        state = {"reward_means": self._reward_means.clone()} if "delta" in self.needs else {}
        return state | references.moved_state(self.reference)

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        if "reward_means" in tensors:
            self._reward_means = tensors["reward_means"].clone()
        references.load_moved_state(self.reference, tensors)


# ---- views ----


def _scored(batch: PackedBatch, policy_logps: Tensor, **columns: Tensor | None) -> Scored:
    """The result of a pass over a batch, in the dtype of the policy's log-probs; `columns`: further fields of `Scored`."""
    batch_columns = {n: getattr(batch, n) for n in ("lengths", "labels", "scores", "row_weights")}
    columns = {**batch_columns, **columns}
    typed: dict[str, Any] = {n: None if v is None else v.to(policy_logps.dtype) for n, v in columns.items()}
    return Scored(
        tree=batch.completion_tree,
        slot=batch.completion_slot,
        policy_logps=policy_logps,
        pairs=batch.pairs,
        shape=None if batch.most is None else (batch.trees, batch.most),
        **typed,
    )


def pair_view(scored: Scored) -> PairLogps:
    """Split a batch of pairs into chosen (slot 0) and rejected (slot 1) completions."""

    def split(name: str, values: Tensor | None) -> dict[str, Any]:
        chosen, rejected = (None, None) if values is None else scored.sides(values)
        return {name.format("chosen"): chosen, name.format("rejected"): rejected}

    return PairLogps(
        **split("policy_{}_logps", scored.policy_logps),
        **split("ref_{}_logps", scored.ref_logps),
        **split("{}_lengths", scored.lengths),
        **split("{}_scores", scored.scores),
        **split("policy_{}_shared_logps", scored.policy_shared_logps),
        **split("ref_{}_shared_logps", scored.ref_shared_logps),
        **split("{}_alignment", scored.alignment),
    )


def list_view(scored: Scored) -> ListLogps:
    """Arrange the completions of a batch as one row per prompt."""

    def as_matrix(values: Tensor | None) -> Tensor | None:
        return None if values is None else scored.matrix(values)

    policy = scored.matrix(scored.policy_logps)
    present = scored.matrix(torch.ones_like(scored.lengths)) > 0
    return ListLogps(policy, present, as_matrix(scored.ref_logps), as_matrix(scored.scores), as_matrix(scored.lengths))


def _learned(scored: Scored, values: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Log-probs (or other `values`) and lengths of what SFT learns: chosen completions, a list's best, good answers, else all."""
    columns = scored.policy_logps if values is None else values, scored.lengths
    if scored.is_pairs:
        return scored.sides(columns[0])[0], scored.sides(columns[1])[0]
    if scored.labels is None and (scored.scores is None or (scored.shape or (0, 0))[1] == 1):
        return columns
    good = scored.slot == 0 if scored.labels is None else scored.labels > 0
    return columns[0][good], columns[1][good]


def _first_tokens(batch: PackedBatch) -> Tensor:
    """(R,) 1 for the first min(|y_w|, |y_l|) tokens of each completion of a pair, else 0."""
    ends = batch.lengths.cumsum(0)
    position = torch.arange(len(batch.completion_of), device=ends.device) - (ends - batch.lengths)[batch.completion_of]
    shorter = batch.lengths.view(-1, 2).amin(1).repeat_interleave(2)
    return position < shorter[batch.completion_of]


def logp_metrics(scored: Scored) -> Metrics:
    """The `logps/*` metrics (nats per completion, and per token), and how often the policy itself ranks the chosen one higher."""
    policy = scored.policy_logps.detach()
    metrics: dict[str, Weighted] = {"logps/per_token": (policy, scored.lengths)}
    ratios = None if scored.ref_logps is None else policy - scored.ref_logps
    if scored.is_pairs:
        chosen, rejected = scored.sides(policy)
        metrics["logps/chosen"] = (chosen, None)
        metrics["logps/rejected"] = (rejected, None)
        metrics["logps/accuracies"] = ((chosen > rejected).to(chosen.dtype), None)
        if ratios is not None:
            chosen, rejected = scored.sides(ratios)
            metrics |= {"logratios/chosen": (chosen, None), "logratios/rejected": (rejected, None)}
    elif scored.labels is not None:
        sides = side_metrics(policy, scored.labels)
        metrics |= {name.replace("rewards", "logps"): v for name, v in sides.items()}
        if ratios is not None:
            sides = side_metrics(ratios, scored.labels)
            metrics |= {name.replace("rewards", "logratios"): v for name, v in sides.items()}
    return metrics
