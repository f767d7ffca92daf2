"""The chunked head: log-probs, collision probabilities, divergences and gradients equal a plain softmax's for any chunk size."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import some_trees, tiny_model
from torch import nn

from penchant.data.packing import pack
from penchant.logprobs import Scorer, per_completion
from penchant.logprobs.head import (
    divergence_logps,
    module_divergence_logps,
    module_token_logps,
    rows_at_once,
    token_logps,
)
from penchant.logprobs.reference import LiveReference, adapter_off
from penchant.losses.divergences import DivergenceKind, divergence
from penchant.models.cpu.head import fast_token_logps
from penchant.plan.memory import LiveBytes

KINDS = [
    DivergenceKind("kl"),
    DivergenceKind("kl", "policy_ref"),
    DivergenceKind("js"),
    DivergenceKind("renyi", "ref_policy", 1.5),
    DivergenceKind("renyi", "ref_policy", 3.0),
]


def _made_up() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    draw = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64)  # noqa: E731
    return draw(7, 5).requires_grad_(), draw(11, 5).requires_grad_(), draw(11).requires_grad_(), draw(7, 11) * 2


TARGETS = torch.tensor([0, 10, 3, 3, 7, 1, 5])


@pytest.mark.parametrize("chunk", [1, 3, 100])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("scale,softcap,with_bias", [(1.0, None, False), (0.5, 3.0, True)])
def test_divergence_equals_whole_vocabulary_autograd(
    kind: DivergenceKind, chunk: int, scale: float, softcap: float | None, with_bias: bool
) -> None:
    hidden, weight, bias, ref = _made_up()
    leaves = (hidden, weight, bias) if with_bias else (hidden, weight)
    logits = scale * (hidden @ weight.t() + (bias if with_bias else 0.0))
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    rows = torch.arange(7)
    logps, values = torch.log_softmax(logits, -1)[rows, TARGETS], divergence(logits, ref, kind)
    mix = torch.linspace(-1, 2, 7, dtype=torch.float64)
    expected = torch.autograd.grad((logps * mix).sum() + (values * mix.flip(0)).sum(), leaves)

    got = divergence_logps(
        hidden,
        weight,
        TARGETS,
        lambda part: ref[part],
        kind,
        bias if with_bias else None,
        scale=scale,
        softcap=softcap,
        chunk=chunk,
    )
    assert torch.allclose(got.logps, logps, rtol=1e-13)
    assert torch.allclose(got.divergence, values, rtol=1e-11)
    assert torch.equal(got.ref_logps, torch.log_softmax(ref, -1)[rows, TARGETS])
    grads = torch.autograd.grad((got.logps * mix).sum() + (got.divergence * mix.flip(0)).sum(), leaves)
    for a, b in zip(grads, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-13)


def test_a_head_with_an_adapter_takes_the_plain_way() -> None:
    hidden, weight, _, ref = _made_up()
    head = nn.Linear(5, 11, bias=False).double()
    head.weight.data = weight.detach()
    kind = KINDS[3]
    plain = divergence_logps(hidden, weight, TARGETS, lambda part: ref[part], kind)
    other = module_divergence_logps(head, hidden, TARGETS, lambda part: ref[part], kind, 1.0, None, chunk=3)
    for a, b in zip(plain, other, strict=True):
        assert torch.allclose(a, b, rtol=1e-12)
    (a,) = torch.autograd.grad(plain.divergence.sum() + plain.logps.sum(), hidden)
    (b,) = torch.autograd.grad(other.divergence.sum() + other.logps.sum(), hidden)
    assert torch.allclose(a, b, rtol=1e-11)


def test_collision_probability_of_every_head() -> None:
    hidden, weight, _, _ = _made_up()
    logps = torch.log_softmax(hidden @ weight.t(), -1)
    expected = logps.exp().square().sum(-1).log()
    head = nn.Linear(5, 11, bias=False).double()
    head.weight.data = weight.detach()
    for _, collision in (
        token_logps(hidden, weight, TARGETS, chunk=3, alignment=True),
        fast_token_logps(hidden, weight, TARGETS, alignment=True),
        module_token_logps(head, hidden, TARGETS, 1.0, None, alignment=True),
    ):
        assert torch.allclose(collision, expected, rtol=1e-12)
        assert not collision.requires_grad


# ---- through models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "smollm-tied", "gemma2", "gpt2"])
@pytest.mark.parametrize("packing", ["shared", "separate", "padded"])
def test_every_packing_gives_the_divergence_of_full_logits(family: str, packing: Any) -> None:
    trees = some_trees()
    policy, ref = tiny_model(family), tiny_model(family, seed=1)
    kind = DivergenceKind("js")
    batch = pack(trees, shared=packing == "shared")
    out = Scorer(policy, packing).divergence(batch, LiveReference(Scorer(ref, packing)).row_logits(batch), kind)
    assert out.divergence is not None
    sums = per_completion(out.divergence, batch.lengths)
    if family == "gemma2":  # its eager softmax is in float32, so compare the packings with each other
        shared = pack(trees)
        other = Scorer(policy, "shared").divergence(
            shared, LiveReference(Scorer(ref, "shared")).row_logits(shared), kind
        )
        assert other.divergence is not None
        expected = per_completion(other.divergence, shared.lengths)
    else:
        expected = torch.stack(
            [_of_one(policy, ref, t.prompt_ids.tolist(), c.tolist(), kind) for t in trees for c in t.completion_ids]
        )
    assert torch.allclose(sums, expected, rtol=1e-8)
    ref_logps = LiveReference(Scorer(ref, packing)).token_logps(batch)  # including its head's scale and cap
    assert out.ref_tokens is not None and torch.allclose(out.ref_tokens, ref_logps, rtol=1e-10)


def _of_one(policy: Any, ref: Any, prompt: list[int], completion: list[int], kind: DivergenceKind) -> torch.Tensor:
    ids = torch.tensor([[*prompt, *completion]])
    with torch.no_grad():
        p, q = (m(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1] for m in (policy, ref))
        return divergence(p, q, kind).sum()


@pytest.mark.parametrize("on_head", [False, True])
def test_with_lora_the_adapter_is_off_in_the_reference(on_head: bool) -> None:
    from penchant.models.lora import add_lora
    from penchant.models.options import LoraConfig

    targets = ["q_proj", "lm_head"] if on_head else ["q_proj"]
    model = add_lora(tiny_model("llama"), LoraConfig(r=2, target_modules=targets), 0)
    scorer = Scorer(model, "shared")
    reference = adapter_off(scorer)
    batch = pack(some_trees())
    assert scorer.plain_head != on_head
    start = scorer.divergence(batch, reference.row_logits(batch), KINDS[0])
    assert start.divergence is not None and start.divergence.abs().max() < 1e-15
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    out = scorer.divergence(batch, reference.row_logits(batch), KINDS[0])
    assert out.divergence is not None and out.divergence.median() > 1e-6
    assert out.ref_tokens is not None and torch.allclose(out.ref_tokens, reference.token_logps(batch), rtol=1e-10)
    out.divergence.sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "lora_B" in n)


def test_gradients_reach_a_bf16_models_fp32_buffers() -> None:
    """`main_grad` receives the head's weight gradient in fp32, as without a divergence."""
    from penchant.training.optim import MasterAdamW

    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model("smollm-tied", dtype=torch.float32)
        MasterAdamW(model.named_parameters(), dtype=dtype)
        ref = tiny_model("smollm-tied", dtype=torch.float32, seed=1).to(dtype)
        batch = pack(some_trees())
        scorer = Scorer(model, "shared", "auto")
        out = scorer.divergence(batch, LiveReference(Scorer(ref, "shared", "auto")).row_logits(batch), KINDS[0])
        assert out.divergence is not None
        (out.divergence.sum() - out.sums.sum()).backward()
        weight = model.get_input_embeddings().weight
        grads.append((weight.main_grad if dtype == torch.bfloat16 else weight.grad).flatten())
    assert torch.cosine_similarity(grads[0], grads[1], dim=0) > 0.99


@pytest.mark.parametrize("kind", [None, DivergenceKind("kl")], ids=str)
@pytest.mark.parametrize("buffered", [False, True])
def test_the_weight_gradient_of_a_bf16_head_loses_nothing_by_being_summed_in_chunks(
    kind: DivergenceKind | None, buffered: bool
) -> None:
    """Summed in bf16, 128 chunks were three times less accurate than one. The sum goes into `main_grad` if there is one."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2048, 16, generator=g).bfloat16(), (torch.randn(128, 16, generator=g) * 0.3).bfloat16()
    targets, rows = torch.randint(0, 128, (2048,), generator=g), torch.randn(2048, generator=g) * 0.01
    other = torch.randn(2048, 128, generator=g)

    def grad(dtype: torch.dtype, chunk: int) -> torch.Tensor:
        w = weight.to(dtype).clone().requires_grad_()
        if buffered:
            w.main_grad = torch.zeros(w.shape, dtype=torch.promote_types(dtype, torch.float32))  # type: ignore[attr-defined]
        if kind is None:
            logps = token_logps(hidden.to(dtype), w, targets, chunk=chunk)[0]
        else:
            logps = divergence_logps(
                hidden.to(dtype), w, targets, lambda p: other[p].to(dtype), kind, chunk=chunk
            ).logps
        (logps * rows).sum().backward()
        assert (w.grad is None) == buffered
        found = w.main_grad if buffered else w.grad  # type: ignore[attr-defined]
        return found.double()

    truth = grad(torch.float64, 2048)
    one, many = ((grad(torch.bfloat16, chunk) - truth).norm() / truth.norm() for chunk in (2048, 16))
    assert many < 1.5 * one < 0.01


def test_a_gpu_takes_rows_enough_for_a_product_that_arithmetic_bounds() -> None:
    """With a vocabulary of 128k, 130 rows at a time would be memory-bound on a GPU. The CPU keeps its 64 MB."""
    cpu, gpu = (SimpleNamespace(shape=(128_256, 8), device=torch.device(d)) for d in ("cpu", "cuda"))
    assert rows_at_once(cpu, 1 << 24) == 130 and rows_at_once(gpu, 1 << 24) >= 1000  # type: ignore[arg-type]
    assert rows_at_once(SimpleNamespace(shape=(1 << 24, 8), device=torch.device("cpu")), 1 << 24) == 16  # type: ignore[arg-type]


def test_a_passing_chunk_holds_its_logits_once() -> None:
    hidden, targets, weight = torch.randn(96, 2), torch.arange(96), torch.randn(1000, 2)
    for x in (hidden, weight):
        x.requires_grad_()
    logps, _ = token_logps(hidden, weight, targets, chunk=32)
    chunk = 32 * 1000 * 4
    with LiveBytes() as live:
        logps.sum().backward()
    assert chunk <= live.peak < 1.5 * chunk
