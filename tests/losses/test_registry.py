"""Contracts that every registered loss keeps."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace
from typing import Annotated, Any, Literal

import pytest
import torch
from golden import ORDINARY, pairs
from pydantic import ValidationError

from penchant.losses import LOSSES, LossSpec
from penchant.losses.registry import NEEDS, Key, Range, loss, params_of
from penchant.training.steps import reduced
from penchant.types import ListLogps, LossOutput, PairLogps, UnpairedLogps

NAMES = sorted(LOSSES)
PAIRWISE = [n for n in NAMES if LOSSES[n].signal == "pairs"]
LABELLED = [n for n in NAMES if LOSSES[n].signal == "unpaired"]
Inputs = PairLogps | UnpairedLogps | ListLogps


def inputs(spec: LossSpec, n: int = 6, dtype: torch.dtype = torch.float64, scale: float = 3.0) -> Inputs:
    """Random, ordinary inputs with everything that a loss could need."""
    g = torch.Generator().manual_seed(0)
    vector = lambda s=scale: (torch.randn(n, generator=g, dtype=torch.float64) * s).to(dtype)  # noqa: E731
    logps = lambda: -vector().abs() - 1  # noqa: E731
    lengths = torch.arange(1, n + 1, dtype=dtype)
    if spec.signal == "lists":
        policy, ref, scores = (torch.stack([logps() for _ in range(4)], 1) for _ in range(3))
        present = torch.arange(4) < 2 + torch.arange(n)[:, None] % 3
        return ListLogps(policy * present, present, ref * present, scores * present, lengths[:, None].expand(n, 4))
    if spec.signal != "pairs":
        labels = (torch.arange(n) % 3 != 0).to(dtype)
        of = logps(), lengths, logps(), labels, vector().abs()
        return UnpairedLogps(*of, z0=0.3, delta=0.2, weighted_logps=-vector().abs() - 0.1)
    scores = vector()
    values = {f.name: logps() for f in fields(PairLogps) if "logps" in f.name}
    return PairLogps(
        **values,
        chosen_lengths=lengths,
        rejected_lengths=lengths.flip(0),
        chosen_scores=scores,
        rejected_scores=scores - vector().abs() - 0.1,
        chosen_alignment=-vector().abs() / 9,
        rejected_alignment=-vector().abs() / 9,
    )


def tensors(x: Inputs) -> dict[str, torch.Tensor]:
    return {f.name: v for f in fields(x) if isinstance(v := getattr(x, f.name), torch.Tensor)}


def call(name: str, x: Inputs, **params: Any) -> LossOutput:
    spec = LOSSES[name]
    return spec.fn(x, **(spec.params().arguments() | params))


def total(out: LossOutput) -> torch.Tensor:
    """The loss reduced as in the loop, where a term without weight is exactly zero."""
    counts = {k: float(v.numel() if w is None else w.sum()) for k, (v, w) in out.summands().items()}
    return reduced(out, counts)


@pytest.mark.parametrize("name", NAMES)
def test_permuting_rows_permutes_losses(name: str) -> None:
    x = inputs(LOSSES[name])
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    y = replace(x, **{k: v[order] for k, v in tensors(x).items()})
    for (a, _), (b, _) in zip(call(name, x).summands().values(), call(name, y).summands().values(), strict=True):
        assert torch.allclose(a[order], b, rtol=1e-14, atol=0)


# other settings that a hyperparameter needs to have an effect
SETTINGS: dict[tuple[str, str], dict[str, Any]] = {
    ("dpo_shift", "lambda_min"): {"schedule": "increase_linear"},
    ("dpo_shift", "lambda_max"): {"schedule": "increase_linear"},
    ("f_dpo", "alpha"): {"divergence": "alpha"},
}
OTHER = {
    ("dpo_shift", "schedule"): "decrease_linear",
    ("ipo", "average"): False,
    ("f_dpo", "divergence"): "forward_kl",
    ("odpo", "offset"): "linear",
    ("pmpo", "weighting"): "unit",
    ("pmpo", "reduction"): "sequence_sum",
    ("chi_po", "r_max"): 0.01,
    ("lipo", "gains"): "scores",
}
BY_THE_HEAD = {("pmpo", "divergence"), ("pmpo", "direction"), ("pmpo", "renyi_alpha")}  # in tests/test_head.py


@pytest.mark.parametrize(
    "name,field", [(n, f) for n in NAMES for f in LOSSES[n].params.model_fields if (n, f) not in BY_THE_HEAD]
)
def test_every_hyperparameter_changes_the_result(name: str, field: str) -> None:
    spec = LOSSES[name]
    start = spec.params(**SETTINGS.get((name, field), {}))
    other = start.model_copy(
        update={field: OTHER[name, field] if (name, field) in OTHER else _moved(getattr(start, field))}
    )

    def at_the_start(params: Any) -> torch.Tensor:
        now = params.model_copy(update={k: s.at(0.0) for k, s in params.schedules().items()})
        later = params.model_copy(update={k: s.at(1.0) for k, s in params.schedules().items()})
        # `total`, not `losses`, because PMPO's beta is in a separate term
        return torch.stack([total(call(name, inputs(spec), **p.arguments())) for p in (now, later)])

    assert not torch.allclose(at_the_start(start), at_the_start(other)), f"{name}.{field} is ignored"


def _moved(value: Any) -> Any:
    assert isinstance(value, float), "a hyperparameter that is not a number needs a line in OTHER"
    return value * 0.7 if value else 0.1


@pytest.mark.parametrize("name", NAMES)
def test_metrics_are_detached_and_losses_unreduced(name: str) -> None:
    x = inputs(LOSSES[name])
    first = "policy_chosen_logps" if LOSSES[name].signal == "pairs" else "policy_logps"
    first = "weighted_logps" if name == "dft" else first
    x = replace(x, **{first: getattr(x, first).requires_grad_()})
    out = call(name, x)
    assert out.losses.shape == (6,) and out.losses.requires_grad
    assert tuple(out.terms) == LOSSES[name].terms
    for metric, (values, weights) in out.metrics.items():
        assert values.shape == (6,) and not values.requires_grad, metric
        assert weights is None or not weights.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name: str) -> None:
    x = inputs(LOSSES[name])
    policy = [k for k in tensors(x) if k.startswith("policy") or k in ("divergence", "weighted_logps")]
    leaves = [getattr(x, k).clone().requires_grad_() for k in policy]

    def of(*values: torch.Tensor) -> torch.Tensor:
        return total(call(name, replace(x, **dict(zip(policy, values, strict=True)))))

    assert torch.autograd.gradcheck(of, leaves)


@pytest.mark.parametrize("far", [1e4, -1e4])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_finite_in_fp32_at_extreme_log_probs(name: str, side: int, far: float) -> None:
    """With |log-ratio| = 1e4 nats on one side, the loss and its gradient may be large, but never NaN or infinite."""
    spec = LOSSES[name]
    x = inputs(spec, dtype=torch.float32)
    key = "policy_logps" if spec.signal != "pairs" else ("policy_chosen_logps", "policy_rejected_logps")[side]
    ref = key.replace("policy", "ref")
    key = "weighted_logps" if name == "dft" else key
    value = torch.full_like(getattr(x, key), min(far, 0.0))
    x = replace(x, **{key: value.requires_grad_()})
    if hasattr(x, ref):
        x = replace(x, **{ref: torch.full_like(value, min(-far, 0.0))})
    out = call(name, x)
    total(out).backward()
    assert all(torch.isfinite(v).all() for v, _ in out.summands().values())
    assert value.grad is None or torch.isfinite(value.grad).all()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_missing_is_named(name: str) -> None:
    spec = LOSSES[name]
    x = inputs(spec)
    fields_of = {
        "reference": ("ref_chosen_logps",) if spec.signal == "pairs" else ("ref_logps",),
        "scores": ("rejected_scores",) if spec.signal == "pairs" else ("scores",),
        "token_probs": ("weighted_logps",),
        "labels": ("labels",),
        "shared_logps": ("ref_rejected_shared_logps",),
        "alignment": ("chosen_alignment",),
        "divergence": ("divergence",),
        "z0": ("z0",),
        "delta": ("delta",),
    }
    checked = 0
    for need in spec.needs:
        if name == "pmpo" and need == "reference":
            continue  # its divergence is computed with the reference; the log-ratio is only a metric
        for field in fields_of.get(need, ()):
            checked += 1
            with pytest.raises(ValueError, match=field):
                call(name, replace(x, **{field: None}))
    assert checked or not spec.needs
    first = next(k for k in tensors(x) if k.startswith("policy"))
    with pytest.raises(ValueError, match="same shape"):
        call(name, replace(x, **{first: torch.zeros(7)}))


@pytest.mark.parametrize("name", PAIRWISE)
def test_an_equal_policy_gives_the_value_that_the_spec_says(name: str) -> None:
    spec = LOSSES[name]
    if spec.equal_policy_loss is None:
        return
    x = inputs(spec)
    assert isinstance(x, PairLogps)
    equal = replace(
        x,
        ref_chosen_logps=x.policy_chosen_logps,
        ref_rejected_logps=x.policy_rejected_logps,
        ref_chosen_shared_logps=x.policy_chosen_shared_logps,
        ref_rejected_shared_logps=x.policy_rejected_shared_logps,
    )
    expected = spec.equal_policy_loss(**spec.params().arguments())
    assert call(name, equal).losses.tolist() == pytest.approx([expected] * 6, rel=1e-14)


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_a_batch_of_one_side_alone_learns_that_side(name: str, label: float) -> None:
    x = inputs(LOSSES[name])
    assert isinstance(x, UnpairedLogps)
    x = replace(x, policy_logps=x.policy_logps.requires_grad_(), labels=torch.full((6,), label, dtype=torch.float64))
    out = call(name, x)
    total(out).backward()
    grad = x.policy_logps.grad
    assert grad is not None and (grad < 0).all() if label else (grad > 0).all()
    absent = out.metrics["rewards/rejected" if label else "rewards/chosen"]
    assert absent[1] is not None and not absent[1].any()  # a mean over nothing is left out, not zero


@pytest.mark.parametrize("name", [n for n in PAIRWISE if LOSSES[n].needs == {"reference"}])
def test_it_learns_the_preference_from_equality(name: str) -> None:
    """At equality with the reference, chosen rises relative to rejected, except for losses known to differ."""
    logps = pairs(ORDINARY[2:], grad=True)
    call(name, logps).losses.sum().backward()
    chosen, rejected = logps.policy_chosen_logps.grad, logps.policy_rejected_logps.grad
    assert chosen is not None and rejected is not None
    pull = float(rejected - chosen)  # the step's effect on the margin
    assert (pull < 0) == (name == "discopop")  # its modulation rises faster than its losses fall, see test_pairwise.py


@pytest.mark.parametrize("name", NAMES)
def test_specs_describe_themselves(name: str) -> None:
    spec = LOSSES[name]
    assert spec.name == name and spec.formula
    assert spec.needs <= NEEDS.keys()
    assert spec.paper == "" or spec.paper in (spec.fn.__doc__ or "")
    for field, info in spec.params.model_fields.items():
        assert info.description, f"{name}.{field} has no description"
    assert "Raises:" in (spec.fn.__doc__ or "")


def test_a_spec_that_needs_what_nobody_gives_is_refused() -> None:
    spec = LOSSES["dpo"]
    with pytest.raises(ValueError, match="needs \\['luck'\\]"):
        replace(spec, needs=frozenset({"luck"}))


def test_naming_the_losses_imports_no_torch() -> None:
    """`penchant losses` and reading a config must be fast."""
    code = (
        "import sys, penchant.losses, penchant.losses.section, penchant.losses.page\n"
        "penchant.losses.page.text()\n"
        "penchant.losses.section.LossConfig.from_mapping({'mix': [{'name': 'dpo', 'beta': 0.2}, {'name': 'pmpo'}]})\n"
        "print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_hyperparameters_are_read_off_the_keyword_only_arguments() -> None:
    def fn(
        logps: "NothingThatCouldBeLookedUp",  # type: ignore[name-defined]  # noqa: F821, UP037
        *,
        beta: Annotated[float, Range(gt=0, le=2), "pull"] = 0.5,
        lam: Annotated[float, Key("lambda")] = 1.0,
        kind: Literal["a", "b"] = "a",
        plain=3,  # type: ignore[no-untyped-def]
    ) -> LossOutput: ...

    params = params_of(fn)
    assert params().arguments() == {"beta": 0.5, "lam": 1.0, "kind": "a", "plain": 3}
    assert params.model_validate({"lambda": 0.25}).to_mapping()["lambda"] == 0.25
    assert params.model_fields["beta"].description == "pull"
    for wrong in ({"beta": 0}, {"beta": 3}, {"kind": "c"}, {"plain": "x"}, {"other": 1}):
        with pytest.raises(ValidationError):
            params.model_validate(wrong)


def test_a_hyperparameter_that_a_config_cannot_give_is_refused() -> None:
    with pytest.raises(ValueError, match="beta has no default"):
        params_of(lambda logps, *, beta: None)
    with pytest.raises(ValueError, match="weights is neither"):
        params_of(lambda logps, *, weights=(1.0, 2.0): None)


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(ValueError, match="called dpo already"):
        loss("dpo", "0")(lambda logps: logps)
    assert LOSSES["dpo"].fn.__module__ == "penchant.losses.pairwise"
