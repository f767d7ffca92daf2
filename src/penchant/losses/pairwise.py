"""Losses on pairs against a reference.

``d = log pi(y|x) - log ref(y|x)`` of the chosen (``d_w``) and the rejected answer (``d_l``), ``h = d_w - d_l``, ``s`` a score.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from penchant.base.lazy import F, Tensor, torch
from penchant.losses.helpers import expm1_then_linear, logistic, pair_logratios, pair_output, require, reward_metrics
from penchant.losses.registry import Beta, Key, LabelSmoothing, LossParams, Range, loss
from penchant.losses.schedules import Schedule
from penchant.types import LossOutput, PairLogps

LOG2 = math.log(2.0)


@loss(
    "dpo",
    "-(1-eps) log sigmoid(beta h) - eps log sigmoid(-beta h),  h = d_w - d_l",
    paper="2305.18290",
    equal=LOG2,
)
def dpo(
    logps: PairLogps,
    *,
    beta: Annotated[
        float, Range(gt=0), "strength of the pull towards the reference; with a larger one the policy stays closer"
    ] = 0.1,
    label_smoothing: Annotated[
        float, Range(ge=0, lt=0.5), "assumed share of flipped labels (cDPO); 0 is plain DPO"
    ] = 0.0,
) -> LossOutput:
    """DPO: a logistic loss on the difference of policy/reference log-ratios.

    Label smoothing: Mitchell (2023), "A note on DPO with noisy preferences".
    """
    chosen, rejected = pair_logratios(logps)
    return pair_output(logistic(beta * (chosen - rejected), label_smoothing), beta * chosen, beta * rejected)


class ShiftSchedule(LossParams):
    """How DPO-Shift's lambda changes over the run."""

    schedule: Literal["fixed", "increase_linear", "decrease_linear", "linear_increase", "linear_decrease"] = Field(
        "fixed", description="how lambda changes from the first optimizer step to the last"
    )
    lambda_min: float = Field(0.5, gt=0, le=1, description="lowest lambda of a linear schedule")
    lambda_max: float = Field(1.0, gt=0, le=1, description="highest lambda of a linear schedule")

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> ShiftSchedule:
        if self.schedule != "fixed" and "lam" in self.model_fields_set:
            raise ValueError(
                "lambda is set, but a linear schedule goes from lambda_min to lambda_max; keep one of the two"
            )
        if self.schedule == "fixed" and self.model_fields_set & {"lambda_min", "lambda_max"}:
            raise ValueError("lambda_min and lambda_max are of a linear schedule; set schedule, or lambda alone")
        if self.lambda_min > self.lambda_max:
            raise ValueError(f"lambda_min ({self.lambda_min:g}) is above lambda_max ({self.lambda_max:g}); swap them")
        return self

    def to_mapping(self) -> dict[str, Any]:
        unused = {"lambda_min", "lambda_max"} if self.schedule == "fixed" else {"lambda"}
        return {k: v for k, v in super().to_mapping().items() if k not in unused}

    def schedules(self) -> dict[str, Schedule]:
        if self.schedule == "fixed":
            start = end = self.arguments()["lam"]
        elif "increase" in self.schedule:
            start, end = self.lambda_min, self.lambda_max
        else:
            start, end = self.lambda_max, self.lambda_min
        return {"lam": Schedule(start=start, end=end)}


@loss("dpo_shift", "-log sigmoid(beta (d_w - lambda d_l))", paper="2502.07599", equal=LOG2, params=ShiftSchedule)
def dpo_shift(
    logps: PairLogps,
    *,
    beta: Beta = 0.1,
    lam: Annotated[
        float, Range(gt=0, le=1), Key("lambda"), "weight of the rejected log-ratio when it is fixed; 1 is DPO"
    ] = 0.75,
) -> LossOutput:
    """DPO-Shift: DPO with the rejected log-ratio weighted by lambda. Schedules pass in the current value."""
    chosen, rejected = pair_logratios(logps)
    return pair_output(logistic(beta * (chosen - lam * rejected)), beta * chosen, beta * rejected)


@loss(
    "rdpo",
    "(-(1-eps) log sigmoid(beta h) + eps log sigmoid(-beta h)) / (1 - 2 eps)",
    paper="2403.00409",
    equal=LOG2,
)
def rdpo(
    logps: PairLogps,
    *,
    beta: Beta = 0.1,
    label_smoothing: Annotated[float, Range(ge=0, lt=0.5), "share of flipped labels; 0 is DPO"] = 0.1,
) -> LossOutput:
    """Robust DPO: its expectation over flipped labels is the DPO loss on clean ones.

    The loss has no lower bound if label_smoothing is above 0.
    """
    chosen, rejected = pair_logratios(logps)
    z, eps = beta * (chosen - rejected), label_smoothing
    losses = (-(1 - eps) * F.logsigmoid(z) + eps * F.logsigmoid(-z)) / (1 - 2 * eps)
    return pair_output(losses, beta * chosen, beta * rejected)


@loss(
    "ipo",
    "(h - 1/(2 beta))^2,  h per token by default",
    paper="2310.12036",
    equal=lambda beta, **_: (1 / (2 * beta)) ** 2,
    uses_lengths=True,
)
def ipo(
    logps: PairLogps,
    *,
    beta: Annotated[float, Range(gt=0), "regularization (tau in the paper); the target margin is 1 / (2 beta)"] = 0.1,
    average: Annotated[
        bool,
        "use log-ratios per token, so that the target means the same for short and long answers (the authors advise it); "
        "false: the paper's sums",
    ] = True,
) -> LossOutput:
    """IPO: a squared loss pulls the log-ratio margin to ``1 / (2 beta)``, so that it cannot grow without bound.

    Averaging is the default because a margin of 1 / (2 beta) nats over a whole sequence is almost nothing for long answers and a
    lot for short ones.
    """
    chosen, rejected = pair_logratios(logps)
    if average:
        chosen_lengths, rejected_lengths = require(logps, "chosen_lengths", "rejected_lengths")
        chosen, rejected = chosen / chosen_lengths, rejected / rejected_lengths
    return pair_output((chosen - rejected - 1 / (2 * beta)) ** 2, beta * chosen, beta * rejected)


@loss("hinge", "max(0, 1 - beta h)", paper="2309.06657", equal=1.0)
def hinge(
    logps: PairLogps,
    *,
    beta: Annotated[
        float, Range(gt=0), "the loss of a pair is zero from a margin of 1 / beta nats on (gamma in RSO)"
    ] = 0.1,
) -> LossOutput:
    """RSO's hinge: SLiC's loss on normalized likelihoods."""
    chosen, rejected = pair_logratios(logps)
    return pair_output(torch.relu(1 - beta * (chosen - rejected)), beta * chosen, beta * rejected)


@loss("dpop", "-log sigmoid(beta (h - penalty max(0, -d_w)))", paper="2402.13228", equal=LOG2)
def dpop(
    logps: PairLogps,
    *,
    beta: Beta = 0.1,
    penalty: Annotated[
        float, Range(ge=0), "weight of the penalty on a falling log-prob of the chosen answer (lambda); 0 is DPO"
    ] = 50.0,
) -> LossOutput:
    """DPO-Positive (Smaug): penalizes a chosen answer that is less likely than under the reference."""
    chosen, rejected = pair_logratios(logps)
    losses = logistic(beta * (chosen - rejected - penalty * torch.relu(-chosen)))
    return pair_output(losses, beta * chosen, beta * rejected)


@loss("rpo", "-log sigmoid(beta h) - alpha log pi_w / |y_w|", paper="2404.19733", uses_lengths=True)
def rpo(
    logps: PairLogps,
    *,
    beta: Beta = 0.1,
    alpha: Annotated[
        float, Range(ge=0), "weight of the chosen answer's negative log-likelihood per token; 0 is DPO"
    ] = 1.0,
) -> LossOutput:
    """Iterative RPO's loss: DPO plus the chosen answer's likelihood."""
    chosen, rejected = pair_logratios(logps)
    (lengths,) = require(logps, "chosen_lengths")
    losses = logistic(beta * (chosen - rejected)) - alpha * logps.policy_chosen_logps / lengths
    return pair_output(losses, beta * chosen, beta * rejected)


@loss("r_dpo", "-log sigmoid(beta h + alpha (|y_w| - |y_l|))", paper="2403.19159", uses_lengths=True)
def r_dpo(
    logps: PairLogps,
    *,
    beta: Beta = 0.1,
    alpha: Annotated[float, Range(ge=0), "penalty per token of length; 0 is DPO"] = 0.01,
) -> LossOutput:
    """R-DPO: DPO for the reward ``r - alpha |y|``; a longer chosen answer is already explained by its length."""
    chosen, rejected = pair_logratios(logps)
    chosen_lengths, rejected_lengths = require(logps, "chosen_lengths", "rejected_lengths")
    losses = logistic(beta * (chosen - rejected) + alpha * (chosen_lengths - rejected_lengths))
    return pair_output(losses, beta * chosen, beta * rejected)


@loss(
    "ld_dpo",
    "-log sigmoid(beta (d'_w - d'_l)),  d' = (1-alpha) d(first min(|y_w|, |y_l|) tokens) + alpha d",
    paper="2409.06411",
    needs=("reference", "shared_logps"),
    equal=LOG2,
    uses_lengths=True,
)
def ld_dpo(
    logps: PairLogps,
    *,
    beta: Beta = 0.1,
    alpha: Annotated[
        float, Range(ge=0, le=1), "weight of the tokens beyond the shorter answer's length; 1 is DPO"
    ] = 0.5,
) -> LossOutput:
    """LD-DPO, length-desensitized: tokens beyond the other answer's length count less."""
    chosen, rejected = pair_logratios(logps)
    shared = require(
        logps,
        "policy_chosen_shared_logps",
        "policy_rejected_shared_logps",
        "ref_chosen_shared_logps",
        "ref_rejected_shared_logps",
    )
    chosen = (1 - alpha) * (shared[0] - shared[2]) + alpha * chosen
    rejected = (1 - alpha) * (shared[1] - shared[3]) + alpha * rejected
    return pair_output(logistic(beta * (chosen - rejected)), beta * chosen, beta * rejected)


@loss(
    "wpo",
    "min(1, w_w w_l) (-log sigmoid(beta h)),  w = exp(mean_t [log pi(y_t) - log sum_v pi(v)^2])",
    paper="2406.11827",
    needs=("reference", "alignment"),
)
def wpo(logps: PairLogps, *, beta: Beta = 0.1) -> LossOutput:
    """WPO with sampled alignment: DPO weighted by how on-policy both answers are; the weight carries no gradient.

    The alignments (the mean in the exponent, nats) come with the log-probs.
    """
    chosen, rejected = pair_logratios(logps)
    chosen_alignment, rejected_alignment = require(logps, "chosen_alignment", "rejected_alignment")
    weights = (chosen_alignment + rejected_alignment).detach().clamp(max=0.0).exp()
    metrics = {**reward_metrics(beta * chosen, beta * rejected), "weights": (weights, None)}
    return LossOutput(weights * logistic(beta * (chosen - rejected)), metrics=metrics)


@loss("apo_zero", "1 - sigmoid(beta d_w) + sigmoid(beta d_l)", paper="2408.06266", equal=1.0)
def apo_zero(logps: PairLogps, *, beta: Beta = 0.1) -> LossOutput:
    """APO-zero: chosen up, rejected down; for chosen answers that are better than the model's own."""
    chosen, rejected = pair_logratios(logps)
    losses = torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)
    return pair_output(losses, beta * chosen, beta * rejected)


@loss("apo_down", "sigmoid(beta d_w) + 1 - sigmoid(beta (d_w - d_l))", paper="2408.06266", equal=1.0)
def apo_down(logps: PairLogps, *, beta: Beta = 0.1) -> LossOutput:
    """APO-down: chosen down, rejected down more; for chosen answers that are worse than the model's own."""
    chosen, rejected = pair_logratios(logps)
    losses = torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))
    return pair_output(losses, beta * chosen, beta * rejected)


@loss(
    "sppo",
    "(d_w - 1/(2 beta))^2 + (d_l + 1/(2 beta))^2",
    paper="2405.00675",
    equal=lambda beta: 2 * (1 / (2 * beta)) ** 2,
)
def sppo(
    logps: PairLogps,
    *,
    beta: Annotated[
        float, Range(gt=0), "1 / eta; the targets are +-1 / (2 beta) nats (the paper's eta is 1000: beta 0.001)"
    ] = 0.1,
) -> LossOutput:
    """SPPO with win probabilities 1 and 0: each log-ratio has its own target."""
    chosen, rejected = pair_logratios(logps)
    target = 1 / (2 * beta)
    return pair_output((chosen - target) ** 2 + (rejected + target) ** 2, beta * chosen, beta * rejected)


@loss(
    "exo",
    "s log(s / (1-eps)) + (1-s) log((1-s) / eps),  s = sigmoid(beta h)",
    paper="2402.00856",
    equal=lambda label_smoothing, **_: -LOG2 - 0.5 * (math.log1p(-label_smoothing) + math.log(label_smoothing)),
)
def exo(
    logps: PairLogps,
    *,
    beta: Beta = 0.1,
    label_smoothing: Annotated[
        float, Range(gt=0, lt=0.5), "probability that a label is wrong; 0 would make the target infinite"
    ] = 1e-3,
) -> LossOutput:
    """EXO on pairs (equation 16 of the paper)."""
    chosen, rejected = pair_logratios(logps)
    z, eps = beta * (chosen - rejected), label_smoothing
    losses = torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-eps))
    losses = losses + torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(eps))
    return pair_output(losses, beta * chosen, beta * rejected)


@loss(
    "nca",
    "-log sigmoid(beta d_w) - 0.5 log sigmoid(-beta d_w) - 0.5 log sigmoid(-beta d_l)",
    paper="2402.05369",
    equal=2 * LOG2,
)
def nca(logps: PairLogps, *, beta: Beta = 0.1) -> LossOutput:
    """NCA on pairs: absolute rewards, so that the chosen answer's probability does not fall."""
    chosen, rejected = pair_logratios(logps)
    w, r = beta * chosen, beta * rejected
    return pair_output(-F.logsigmoid(w) - 0.5 * F.logsigmoid(-w) - 0.5 * F.logsigmoid(-r), w, r)


@loss(
    "aot",
    "l(beta (m_i - ref m_(rank i))),  m = log pi_w - log pi_l, sorted over the optimizer step",
    paper="2406.05882",
    needs=("reference", "batch"),
    equal=LOG2,
)
def aot(logps: PairLogps, *, beta: Beta = 0.1, label_smoothing: LabelSmoothing = 0.0) -> LossOutput:
    """AOT, paired: the k-th smallest policy margin of the batch against the k-th smallest reference margin.

    l is the (smoothed) logistic loss. Row i's margin is compared with the reference margin of its rank.
    """
    chosen, rejected = pair_logratios(logps)
    margins = logps.policy_chosen_logps - logps.policy_rejected_logps
    assert logps.ref_chosen_logps is not None and logps.ref_rejected_logps is not None
    ref_margins = logps.ref_chosen_logps - logps.ref_rejected_logps
    losses = logistic(beta * (margins - match_ranks(ref_margins, margins)), label_smoothing)
    return pair_output(losses, beta * chosen, beta * rejected)


@loss(
    "aot_unpaired",
    "l(beta (d_w,i - d_l,(rank i))),  sorted over the optimizer step",
    paper="2406.05882",
    needs=("reference", "batch"),
    equal=LOG2,
)
def aot_unpaired(logps: PairLogps, *, beta: Beta = 0.1, label_smoothing: LabelSmoothing = 0.0) -> LossOutput:
    """AOT, unpaired: the k-th smallest chosen log-ratio of the batch against the k-th smallest rejected one.

    l is the (smoothed) logistic loss. Which answers were paired in the data does not matter.
    """
    chosen, rejected = pair_logratios(logps)
    losses = logistic(beta * (chosen - match_ranks(rejected, chosen)), label_smoothing)
    return pair_output(losses, beta * chosen, beta * rejected)


def match_ranks(values: Tensor, like: Tensor) -> Tensor:
    """Reorder `values` like `like`: the k-th smallest value goes to the position of the k-th smallest number of `like`."""
    ranks = torch.argsort(torch.argsort(like.detach(), stable=True))
    return values.sort(stable=True).values[ranks]


@loss(
    "discopop",
    "(1-m) (-log sigmoid(z)) + m e^-z,  z = beta h,  m = sigmoid(z / tau)",
    paper="2406.08414",
    equal=0.5 * LOG2 + 0.5,
)
def discopop(
    logps: PairLogps,
    *,
    beta: Beta = 0.05,
    tau: Annotated[float, Range(gt=0, lt=1), "temperature of the modulation"] = 0.05,
) -> LossOutput:
    """DiscoPOP: logistic for wrongly ranked pairs, exponential for correctly ranked ones."""
    chosen, rejected = pair_logratios(logps)
    z = beta * (chosen - rejected)
    # m e^-z as one exponential: each factor alone is 0 or infinite for large |z|
    losses = torch.sigmoid(-z / tau) * logistic(z) + torch.exp(F.logsigmoid(z / tau) - z)
    return pair_output(losses, beta * chosen, beta * rejected)


@loss(
    "cal_dpo",
    "-log sigmoid(h) + calibration ((d_w - 1/(2 beta))^2 + (d_l + 1/(2 beta))^2)",
    paper="2412.14516",
    equal=lambda beta, calibration: LOG2 + 2 * calibration * (1 / (2 * beta)) ** 2,
)
def cal_dpo(
    logps: PairLogps,
    *,
    beta: Annotated[float, Range(gt=0), "the log-ratios are pulled to +-1 / (2 beta) nats"] = 0.1,
    calibration: Annotated[float, Range(ge=0), "weight of the squared terms (the authors' own runs use 0.5)"] = 1.0,
) -> LossOutput:
    """Cal-DPO: calibrates the scale of the implicit rewards, not only their order."""
    chosen, rejected = pair_logratios(logps)
    target = 1 / (2 * beta)
    losses = logistic(chosen - rejected) + calibration * ((chosen - target) ** 2 + (rejected + target) ** 2)
    return pair_output(losses, beta * chosen, beta * rejected)


def _idle_of_f_dpo(divergence: str, **_: Any) -> dict[str, str]:
    return {} if divergence == "alpha" else {"alpha": f"on {divergence}; set divergence: alpha, or leave {{}} out"}


@loss(
    "f_dpo",
    "-log sigmoid(beta f'(u_w) - beta f'(u_l)),  u = e^d",
    paper="2309.16240",
    equal=LOG2,
    idle=_idle_of_f_dpo,
)
def f_dpo(
    logps: PairLogps,
    *,
    beta: Beta = 0.1,
    divergence: Annotated[
        Literal["reverse_kl", "forward_kl", "js", "alpha"], "which f-divergence; reverse_kl is DPO"
    ] = "js",
    alpha: Annotated[
        float, Range(gt=0, lt=1), "for divergence=alpha: near 0 it is the reverse KL, near 1 the forward KL"
    ] = 0.5,
) -> LossOutput:
    """f-DPO: the implicit reward is ``beta f'(u)`` with ``u = pi(y|x) / ref(y|x) = e^d``.

    f' without its constant: reverse KL ``d``; forward KL ``-e^(-d)``; JS ``log 2 + d - log(1 + e^d)``; alpha
    ``(1 - e^(-alpha d)) / alpha``. Beyond an exponent of 20, e^x continues as its tangent, so that a chosen answer that has become
    very unlikely keeps a finite gradient.
    """
    chosen, rejected = (beta * f_prime(d, divergence, alpha) for d in pair_logratios(logps))
    return pair_output(logistic(chosen - rejected), chosen, rejected)


def f_prime(d: Tensor, divergence: str, alpha: float) -> Tensor:
    """f'(e^d), shape of d."""
    if divergence == "reverse_kl":
        return d
    if divergence == "forward_kl":
        return -1 - expm1_then_linear(-d)
    if divergence == "js":
        return LOG2 - F.softplus(-d)  # d - log(1 + e^d) without cancellation
    if divergence == "alpha":
        return -expm1_then_linear(-alpha * d) / alpha
    raise ValueError(f"{divergence!r} is none of reverse_kl, forward_kl, js, alpha")


@loss(
    "chi_po",
    "-log sigmoid(clip(beta (phi_w - phi_l), +-2 r_max)),  phi = e^d + d",
    paper="2407.13399",
    equal=LOG2,
)
def chi_po(
    logps: PairLogps,
    *,
    beta: Beta = 0.1,
    r_max: Annotated[float, Range(gt=0), "bound of the reward: the margin is clipped to +-2 r_max"] = 10.0,
) -> LossOutput:
    """chi-PO, chi-squared plus KL regularization: DPO's log-ratio becomes ``u + log u`` with ``u = e^d``.

    A pair beyond the clip gives no gradient.
    """
    chosen, rejected = (beta * (1 + expm1_then_linear(d) + d) for d in pair_logratios(logps))
    losses = logistic((chosen - rejected).clamp(-2 * r_max, 2 * r_max))
    return pair_output(losses, chosen, rejected)


@loss("rebel", "(h / eta - (s_w - s_l))^2", paper="2404.16767", needs=("reference", "scores"))
def rebel(
    logps: PairLogps,
    *,
    eta: Annotated[float, Range(gt=0), "step size: the margin's target is eta x the score gap, in nats"] = 1.0,
) -> LossOutput:
    """REBEL: regress the log-ratio margin onto the difference of rewards."""
    chosen, rejected = pair_logratios(logps)
    chosen_scores, rejected_scores = require(logps, "chosen_scores", "rejected_scores")
    losses = ((chosen - rejected) / eta - (chosen_scores - rejected_scores)) ** 2
    return pair_output(losses, chosen / eta, rejected / eta)


@loss(
    "odpo",
    "-log sigmoid(beta h - alpha f(s_w - s_l)),  f = log or identity",
    paper="2402.10571",
    needs=("reference", "scores", "score_gap"),
)
def odpo(
    logps: PairLogps,
    *,
    beta: Beta = 0.1,
    alpha: Annotated[float, Range(ge=0), "weight of the offset; 0 is DPO"] = 0.5,
    offset: Annotated[Literal["log", "linear"], "how the score gap g becomes the offset: log g, or g itself"] = "log",
) -> LossOutput:
    """ODPO, DPO with an offset: the score gap determines how far apart the two answers must be.

    A chosen score that is not above the rejected one raises ValueError, on the CPU only.
    """
    chosen, rejected = pair_logratios(logps)
    chosen_scores, rejected_scores = require(logps, "chosen_scores", "rejected_scores")
    gap = chosen_scores - rejected_scores
    # checked on the CPU only, where the loop computes a batch's weights: on a GPU it would force a synchronization
    if gap.device.type == "cpu" and bool((gap <= 0).any()):
        raise ValueError("odpo needs chosen_scores above rejected_scores; drop the other pairs")
    losses = logistic(beta * (chosen - rejected) - alpha * (torch.log(gap) if offset == "log" else gap))
    return pair_output(losses, beta * chosen, beta * rejected)
