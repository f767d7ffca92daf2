"""Prefix-shared == separate == padded == one by one, in log-probs and parameter gradients, on every family."""

from __future__ import annotations

import pytest
import torch
import transformers
from families import VOCAB, family_configs, some_trees, tiny_model

from penchant.data.packing import pack
from penchant.logprobs import Scorer
from penchant.logprobs.head import token_logps
from penchant.models.lora import add_lora
from penchant.models.options import LoraConfig
from penchant.models.tree_attention import install_tree_attention
from penchant.types import TokenTree


def _flat_grad(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def _one_by_one(model: torch.nn.Module, trees: list[TokenTree], temperature: float = 1.0) -> torch.Tensor:
    """From transformers' full logits, one unpadded sequence at a time."""
    sums = []
    for tree in trees:
        for completion in tree.completion_ids:
            ids = torch.tensor([*tree.prompt_ids.tolist(), *completion.tolist()])[None]
            logps = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1] / temperature, -1)
            picked = logps.gather(1, ids[0, 1:, None]).squeeze(1)
            sums.append(picked[len(tree.prompt_ids) - 1 :].sum())
    return torch.stack(sums)


@pytest.mark.parametrize("family", sorted(family_configs()))
def test_every_packing_equals_one_by_one(family: str) -> None:
    trees = some_trees()
    results = {}
    for packing in ("one", "shared", "separate", "padded"):
        model = tiny_model(family)
        if packing == "one":
            if family == "gemma2":  # its eager attention computes the softmax in float32 for any model dtype
                install_tree_attention(model)
            sums = _one_by_one(model, trees)
        else:
            sums = Scorer(model, packing).logps(pack(trees, shared=packing == "shared")).sums  # type: ignore[arg-type]
        (sums * torch.linspace(-1, 1, len(sums), dtype=sums.dtype)).sum().backward()
        results[packing] = (sums.detach(), _flat_grad(model))
    sums, grad = results.pop("one")
    for packing, (other_sums, other_grad) in results.items():
        assert torch.allclose(other_sums, sums, rtol=1e-9, atol=0), packing
        assert (other_grad - grad).norm() <= 1e-9 * grad.norm(), packing


def test_the_mask_matters() -> None:
    """Guards the test above: changing a neighboring completion must not change the others, changing the prompt must."""
    trees = some_trees()
    scorer = Scorer(tiny_model("llama"), "shared")
    before = scorer.logps(pack(trees)).sums
    first = trees[0]
    changed = TokenTree(
        0, first.prompt_ids, (first.completion_ids[0], first.completion_ids[1][::-1].copy()), (False,) * 2
    )
    after = scorer.logps(pack([changed, *trees[1:]])).sums
    moved = (before - after).abs() > 1e-9
    assert moved.tolist() == [False, True] + [False] * (len(before) - 2)
    other_prompt = TokenTree(0, first.prompt_ids[::-1].copy(), first.completion_ids, (False,) * 2)
    after = scorer.logps(pack([other_prompt, *trees[1:]])).sums
    assert ((before - after).abs() > 1e-9).tolist() == [True, True] + [False] * (len(before) - 2)


def test_a_tree_does_not_depend_on_its_neighbors_in_fp64() -> None:
    trees = some_trees()
    scorer = Scorer(tiny_model("llama"), "shared")
    together = scorer.logps(pack(trees)).sums
    alone = torch.cat([scorer.logps(pack([t])).sums for t in trees])
    assert torch.allclose(together, alone, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale,softcap,with_bias", [(1.0, None, False), (0.5, 3.0, True), (2.0, None, True)])
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_token_logps_equal_log_softmax(scale: float, softcap: float | None, with_bias: bool, chunk: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True) if with_bias else None
    targets = torch.randint(0, 11, (7,))
    inputs = [t for t in (hidden, weight, bias) if t is not None]
    coefficients = torch.randn(7, dtype=torch.float64)

    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    expected = torch.log_softmax(logits, -1).gather(1, targets[:, None]).squeeze(1)
    expected_grads = torch.autograd.grad((expected * coefficients).sum(), inputs)
    got, _ = token_logps(hidden, weight, targets, bias, scale=scale, softcap=softcap, chunk=chunk)
    grads = torch.autograd.grad((got * coefficients).sum(), inputs)
    assert torch.allclose(got, expected, rtol=1e-12)
    for g, e in zip(grads, expected_grads, strict=True):
        assert torch.allclose(g, e, rtol=1e-10, atol=1e-13)


def test_token_logps_gradcheck() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 5, 2, 2])
    assert torch.autograd.gradcheck(lambda h, w: token_logps(h, w, targets, softcap=2.0, chunk=3)[0], (hidden, weight))


def test_logits_that_would_overflow_a_plain_softmax_stay_finite() -> None:
    hidden = torch.tensor([[1e4, 0.0]])
    weight = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]])
    got, _ = token_logps(hidden, weight, torch.tensor([1]))
    assert got.item() == pytest.approx(-2e4)


def test_the_boundary_is_not_off_by_one() -> None:
    """Every completion's first token is predicted from the prompt's last token."""
    tree = some_trees()[0]
    batch = pack([tree])
    p = len(tree.prompt_ids)
    first_of = [int((batch.completion_of == c).nonzero()[0]) for c in range(2)]
    assert [int(batch.predict_index[i]) for i in first_of] == [p - 1, p - 1]
    assert [int(batch.target_ids[i]) for i in first_of] == [int(c[0]) for c in tree.completion_ids]
    assert len(batch.target_ids) == sum(len(c) for c in tree.completion_ids)
    assert int(batch.target_ids.max()) < VOCAB


@pytest.mark.parametrize("head", ["plain", "with a bias", "with an adapter"])
def test_a_temperature_divides_the_logits_of_every_head(head: str) -> None:
    model = tiny_model("llama")
    if head == "with a bias":
        model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCAB, dtype=torch.float64))
    elif head == "with an adapter":
        model = add_lora(model, LoraConfig(r=2, target_modules=["lm_head"]), seed=0)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p)
    trees = some_trees()
    with torch.no_grad():
        got = Scorer(model, "shared", temperature=0.7).logps(pack(trees)).sums
        assert torch.allclose(got, _one_by_one(model, trees, 0.7), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["granite", "cohere"])
def test_a_models_own_scale_of_its_logits_counts(name: str) -> None:
    """Granite divides its logits by a constant, Cohere multiplies them."""
    common = family_configs()["llama"]().to_dict()
    sizes = {k: v for k, v in common.items() if k.endswith("_size") or k.startswith(("num_", "max_position"))}
    config = {
        "granite": lambda: transformers.GraniteConfig(**sizes, logits_scaling=4.0),
        "cohere": lambda: transformers.CohereConfig(**sizes, logit_scale=4.0),
    }[name]()
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    trees = some_trees()
    with torch.no_grad():
        got = Scorer(model, "shared").logps(pack(trees)).sums
        assert torch.allclose(got, _one_by_one(model, trees), rtol=1e-4, atol=0)
