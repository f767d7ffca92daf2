"""Every loss on real batches: views, precomputed weights, z0, delta, mixes, modifiers, coupling."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from families import make_tree, some_pairs, tiny_model
from parameters import one_of_each_kind
from steps import step_gradient

from penchant.algorithms.offline import Component, Offline, pair_view
from penchant.data.adapt import mismatched_rows
from penchant.data.packing import pack
from penchant.errors import ConfigError
from penchant.logprobs import Scorer
from penchant.logprobs.reference import CachedReference, LiveReference, MovingReference, compute_logps
from penchant.losses import LOSSES
from penchant.losses.schedules import Schedule
from penchant.types import Scored, TokenTree


def pairs(n: int = 6) -> list[TokenTree]:
    rng = np.random.default_rng(3)
    return [
        replace(t, labels=(True, False), scores=(float(rng.random()) + 1.0, float(rng.random()))) for t in some_pairs(n)
    ]


def singles() -> list[TokenTree]:
    """Labeled completions, one per tree, three good and two bad."""
    return [replace(make_tree(i, 3 + i, (2 + i,)), labels=(i % 2 == 0,), scores=(float(i),)) for i in range(5)]


def mismatched(trees: list[TokenTree]) -> dict[int, TokenTree]:
    partners = mismatched_rows([t.prompt_ids.tobytes() for t in trees])
    assert partners is not None
    return {
        t.row: TokenTree(100 + t.row, t.prompt_ids, trees[p].completion_ids[:1], (False,))
        for t, p in zip(trees, partners, strict=True)
    }


def offline(*names: str, trees: list[TokenTree] | None = None, policy: Any = None, **more: Any) -> Offline:
    policy = policy or tiny_model("llama")
    reference = more.pop("reference", None) or LiveReference(Scorer(tiny_model("llama", seed=1), "shared"))
    components = [Component(LOSSES[n], LOSSES[n].params()) for n in names]
    return Offline(
        Scorer(policy, "shared"),
        more.pop("components", components),
        reference,
        mismatched=mismatched(trees) if trees else {},
        tokens_per_step=40,
        **more,
    )


@pytest.mark.parametrize("name", one_of_each_kind(n for n in LOSSES if "batch" not in LOSSES[n].needs))
def test_one_batch_equals_many_micro_batches(name: str) -> None:
    """Also if a micro-batch has one side only, and with KTO's z0, which belongs to the whole step."""
    for trees in [pairs(5)] + [singles()] * (LOSSES[name].signal in ("unpaired", "tokens")):
        algorithm = offline(name, trees=trees)
        whole = step_gradient(algorithm, trees, [5])
        for sizes in ([1] * 5, [2, 3]):
            parts = step_gradient(algorithm, trees, sizes)
            assert (whole - parts).norm() <= 1e-9 * whole.norm(), sizes


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_weights_known_beforehand_are_the_losss_own(name: str) -> None:
    trees = pairs()
    algorithm = offline(name, trees=trees)
    algorithm.begin_step(0, 0.0, trees)
    batch = pack(trees)
    out = algorithm.loss(algorithm.score(batch))
    said = {k: float(v.numel() if w is None else w.sum()) for k, (v, w) in out.summands().items()}
    assert algorithm.weights(batch) == pytest.approx(said)


def test_views_take_pairs_apart() -> None:
    trees = pairs(3)
    algorithm = offline("dpo")
    scored = algorithm.score(pack(trees))
    view = pair_view(scored)
    assert view.chosen_lengths is not None and view.chosen_scores is not None
    assert view.chosen_lengths.tolist() == [len(t.completion_ids[0]) for t in trees]
    assert view.rejected_scores is not None
    assert view.rejected_scores.tolist() == pytest.approx([t.scores[1] for t in trees])
    sums = compute_logps(LiveReference(algorithm.scorer), trees, tokens_per_step=99).sums.reshape(-1, 2)
    assert torch.allclose(view.policy_rejected_logps, sums[:, 1], rtol=1e-9)


def test_shared_log_probs_are_over_the_shorter_answers_length() -> None:
    trees = [make_tree(0, 4, (3, 7)), make_tree(1, 2, (6, 2))]
    algorithm = offline("ld_dpo")
    scored = algorithm.score(pack(trees))
    tokens = compute_logps(LiveReference(algorithm.scorer), trees, tokens_per_step=99).tokens.split([3, 7, 6, 2])
    expected = [tokens[0][:3].sum(), tokens[1][:3].sum(), tokens[2][:2].sum(), tokens[3][:2].sum()]
    assert scored.policy_shared_logps is not None and scored.ref_shared_logps is not None
    assert torch.allclose(scored.policy_shared_logps, torch.stack(expected), rtol=1e-9)
    assert not torch.allclose(scored.ref_shared_logps, scored.policy_shared_logps)


def test_alignment_is_the_mean_over_tokens() -> None:
    tree = make_tree(0, 4, (3, 5))
    algorithm = offline("wpo")
    scored = algorithm.score(pack([tree]))
    ids = torch.tensor([[*tree.prompt_ids.tolist(), *tree.completion_ids[1].tolist()]])
    logps = torch.log_softmax(algorithm.scorer.model(input_ids=ids, use_cache=False).logits[0, 3:-1], -1)
    picked = logps.gather(1, ids[0, 4:, None]).squeeze(1)
    expected = (picked - logps.exp().square().sum(-1).log()).mean()
    assert scored.alignment is not None
    assert scored.alignment[1].item() == pytest.approx(expected.item(), rel=1e-9)


# ---- a step as a whole ------------------------------------------------------------------------------------------------


def test_z0_is_the_mean_log_ratio_of_mismatched_completions() -> None:
    trees = pairs()
    algorithm = offline("kto", trees=trees)
    algorithm.begin_step(0, 0.0, trees[:4])
    other = [algorithm.mismatched[t.row] for t in trees[:4]]
    assert algorithm.reference is not None
    ratios = [
        compute_logps(m, other, tokens_per_step=99).sums for m in (LiveReference(algorithm.scorer), algorithm.reference)
    ]
    expected = max(0.0, float((ratios[0] - ratios[1]).mean()))
    assert algorithm.step_values()["kl/z0"] == pytest.approx(expected, rel=1e-6)
    assert expected > 0
    algorithm.begin_step(0, 0.0, trees[4:])
    assert algorithm.step_values()["kl/z0"] != pytest.approx(expected)


def test_z0_is_per_token_where_the_loss_is() -> None:
    trees = pairs()
    algorithm = offline("kto", trees=trees, average_log_prob=True)
    algorithm.begin_step(0, 0.0, trees)
    other = [algorithm.mismatched[t.row] for t in trees]
    assert algorithm.reference is not None
    lengths = torch.tensor([len(t.completion_ids[0]) for t in other])
    a, b = (
        compute_logps(m, other, tokens_per_step=99).sums / lengths
        for m in (LiveReference(algorithm.scorer), algorithm.reference)
    )
    assert algorithm.step_values()["kl/z0"] == pytest.approx(max(0.0, float((a - b).mean())), rel=1e-6)


def test_mismatch_never_pairs_a_prompt_with_itself() -> None:
    for prompts in ([b"a", b"a", b"b", b"c", b"a"], [b"x", b"y"], [b"a"] * 5 + [b"b"] + [b"a"] * 3):
        partners = mismatched_rows(prompts)
        assert partners is not None
        assert all(prompts[i] != prompts[p] for i, p in enumerate(partners))
    assert mismatched_rows([b"a"] * 4) is None and mismatched_rows([]) is None


def test_delta_is_the_running_mean_over_both_sides() -> None:
    algorithm = offline("bco")
    assert algorithm.delta == 0.0
    algorithm.end_step(1, {"rewards/chosen": 1.0, "rewards/rejected": -0.5})
    algorithm.end_step(2, {"rewards/chosen": 2.0})  # a step without rejected answers
    assert algorithm.delta == pytest.approx((1.5 - 0.5) / 2)
    other = offline("bco")
    other.load_state_tensors(algorithm.state_tensors())
    assert other.delta == algorithm.delta


def test_a_schedule_changes_the_loss_and_is_told() -> None:
    spec = LOSSES["dpo"]
    scheduled = Component(spec, spec.params(), schedules={"beta": Schedule(start=0.1, end=0.5)})
    algorithm = offline(components=[scheduled])
    scored = algorithm.score(pack(pairs()))
    for t, beta in ((0.0, 0.1), (0.5, 0.3), (1.0, 0.5)):
        algorithm.begin_step(0, t, [])
        assert algorithm.step_values() == {"beta": pytest.approx(beta)}
        assert torch.allclose(algorithm.loss(scored).losses, spec.fn(pair_view(scored), beta=beta).losses)


# ---- mixes and modifiers ----------------------------------------------------------------------------------------------


def test_a_mix_is_the_weighted_sum_of_its_losses() -> None:
    trees = pairs()
    policy = tiny_model("llama")
    single = {n: step_gradient(offline(n, policy=policy), trees, [6]) for n in ("dpo", "sft", "bco")}
    parts = {"dpo": 0.7, "sft": 0.2, "bco": 0.1}
    components = [Component(LOSSES[n], LOSSES[n].params(), w) for n, w in parts.items()]
    mixed = offline(components=components, policy=policy)
    got = step_gradient(mixed, trees, [2, 4])
    expected = sum(w * single[n] for n, w in parts.items())
    assert (got - expected).norm() <= 1e-9 * expected.norm()
    metrics = mixed.loss(mixed.score(pack(trees))).metrics
    assert {"rewards/margins", "bco/rewards/margins", "sft/nll"} <= metrics.keys()


def test_nll_weight_adds_sft_on_the_chosen_answer() -> None:
    trees = pairs()
    policy = tiny_model("llama")
    got = step_gradient(offline("dpo", policy=policy, nll_weight=0.3), trees, [6])
    parts = [step_gradient(offline(n, policy=policy), trees, [6]) for n in ("dpo", "sft")]
    assert (got - parts[0] - 0.3 * parts[1]).norm() <= 1e-9 * got.norm()


def test_average_log_prob_divides_policy_and_reference_by_length() -> None:
    algorithm = offline("dpo", average_log_prob=True)
    scored = algorithm.score(pack(pairs()))
    assert scored.ref_logps is not None
    by_hand = replace(
        scored, policy_logps=scored.policy_logps / scored.lengths, ref_logps=scored.ref_logps / scored.lengths
    )
    expected = LOSSES["dpo"].fn(pair_view(by_hand)).losses
    assert torch.allclose(algorithm.loss(scored).losses, expected)
    assert not torch.allclose(offline("dpo").loss(scored).losses, expected)


# ---- references -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dpo", "ld_dpo"])
def test_a_cached_reference_serves_sums_and_tokens(name: str) -> None:
    trees = pairs()
    live = LiveReference(Scorer(tiny_model("llama", seed=1), "shared"))
    made = compute_logps(live, trees, tokens_per_step=30)
    cached = CachedReference(
        dict(enumerate(made.sums.split([2] * 6))),
        dict(enumerate(made.tokens.split([sum(map(len, t.completion_ids)) for t in trees]))),
    )
    policy = tiny_model("llama")
    a, b = (step_gradient(offline(name, policy=policy, reference=r), trees, [3, 3]) for r in (live, cached))
    assert (a - b).norm() <= 1e-9 * a.norm()


def test_a_divergence_refuses_a_cached_reference() -> None:
    with pytest.raises(ConfigError, match="a cache does not hold"):
        offline("pmpo", reference=CachedReference({}))


@pytest.mark.parametrize("every,mixup", [(1, 0.01), (2, 0.5), (3, 1.0)])
def test_a_moving_reference_follows_the_policy(every: int, mixup: float) -> None:
    ref = tiny_model("llama", seed=1)
    start = {n: p.detach().clone() for n, p in ref.named_parameters()}
    policy = dict(tiny_model("llama").named_parameters())
    moving = MovingReference(Scorer(ref, "shared"), policy=lambda: policy, every=every, mixup=mixup)
    for step in range(1, 7):
        moving.after_step(step)
    updates = 6 // every
    for name, p in ref.named_parameters():
        expected = start[name] * (1 - mixup) ** updates + policy[name] * (1 - (1 - mixup) ** updates)
        assert torch.allclose(p, expected, rtol=1e-9, atol=1e-12), name


def test_small_steps_of_a_bf16_reference_are_not_rounded_away() -> None:
    ref = tiny_model("llama", seed=1, dtype=torch.float32).to(torch.bfloat16)
    weight = ref.get_input_embeddings().weight
    start = weight.detach().float().clone()
    target = {"model.embed_tokens.weight": start + 0.01}
    moving = MovingReference(Scorer(ref, "shared"), policy=lambda: target, every=1, mixup=0.01)
    for step in range(1, 301):
        moving.after_step(step)
    moved = (moving.state_tensors()["model.embed_tokens.weight"] - start).mean().item()
    assert moved == pytest.approx(0.01 * (1 - 0.99**300), rel=1e-3)
    assert torch.equal(weight, moving.state_tensors()["model.embed_tokens.weight"].to(torch.bfloat16))


def test_parts_of_a_held_out_set_concatenate() -> None:
    algorithm = offline("dpo")
    trees = pairs()
    whole = algorithm.score(pack(trees))
    parts = Scored.cat([algorithm.score(pack(trees[:2])), algorithm.score(pack(trees[2:]))])
    assert torch.allclose(whole.policy_logps, parts.policy_logps, rtol=1e-9)
    assert torch.equal(whole.tree, parts.tree)


def test_sft_learns_the_chosen_answer_of_a_pair_and_the_good_one_of_singles() -> None:
    """Alone and as nll_weight: the negative log-probs of those answers, over their tokens."""
    for trees, wanted in ((pairs(), [0, 2, 4, 6, 8, 10]), (singles(), [0, 2, 4])):
        algorithm = offline("sft")
        scored = algorithm.score(pack(trees))
        out = algorithm.loss(scored)
        assert torch.equal(out.losses, -scored.policy_logps[wanted])
        assert out.weights is not None and torch.equal(out.weights, scored.lengths[wanted])
    with_nll = offline("dpo", nll_weight=0.3).loss(offline("dpo").score(pack(pairs()))).terms["nll"]
    scored = offline("dpo").score(pack(pairs()))
    assert torch.allclose(with_nll[0], -0.3 * scored.policy_logps[::2])


def test_a_weight_is_of_every_term_of_a_loss() -> None:
    """PMPO has three terms: good answers, bad ones, and the divergence."""
    scored = offline("pmpo").score(pack(pairs()))
    whole = offline("pmpo").loss(scored).summands()
    half = offline("pmpo", components=[Component(LOSSES["pmpo"], LOSSES["pmpo"].params(), 0.5)]).loss(scored).summands()
    assert whole.keys() == half.keys() and len(whole) == 3
    for name, (values, _) in whole.items():
        assert torch.allclose(half[name][0], 0.5 * values) and values.any()


def test_a_hard_update_comes_after_every_so_many_steps() -> None:
    ref, policy = tiny_model("llama", seed=1), dict(tiny_model("llama").named_parameters())
    moving = MovingReference(Scorer(ref, "shared"), policy=lambda: policy, every=3, mixup=1.0)
    weight = ref.get_input_embeddings().weight
    equal = []
    for step in range(1, 4):
        moving.after_step(step)
        equal.append(torch.equal(weight, policy["model.embed_tokens.weight"]))
    assert equal == [False, False, True]


# ---- lists, and SFT weighed by probability ----------------------------------------------------------------------------


def ranked(n: int = 4) -> list[TokenTree]:
    """Prompts with two, three, four, two, ... scored answers, best first."""
    sizes = [(3, 5), (4, 2, 6), (1, 2, 3, 4)]
    made = [make_tree(i, 3 + i, sizes[i % 3]) for i in range(n)]
    return [replace(t, scores=tuple(9.0 - 2 * i for i in range(len(t.completion_ids)))) for t in made]


@pytest.mark.parametrize("name", ["plackett_luce", "lipo"])
def test_lists_of_unequal_length_do_not_feel_each_other(name: str) -> None:
    trees = ranked()
    algorithm = offline(name)
    whole = step_gradient(algorithm, trees, [4])
    for sizes in ([1] * 4, [3, 1]):
        assert (whole - step_gradient(algorithm, trees, sizes)).norm() <= 1e-9 * whole.norm()
    apart = [algorithm.loss(algorithm.score(pack([t]))).losses for t in trees]
    scored = algorithm.score(pack(trees))
    assert torch.allclose(algorithm.loss(scored).losses, torch.cat(apart), rtol=1e-9)
    held_out = Scored.cat([algorithm.score(pack(trees[:1])), algorithm.score(pack(trees[1:]))])
    assert torch.allclose(algorithm.loss(held_out).losses, torch.cat(apart), rtol=1e-9)
    assert torch.allclose(algorithm.loss(held_out.of_trees([1, 3])).losses, torch.cat([apart[1], apart[3]]), rtol=1e-9)


def test_plackett_luce_on_pairs_has_dpos_gradient() -> None:
    trees = pairs()
    of_dpo, of_lists = (step_gradient(offline(name), trees, [2, 4]) for name in ("dpo", "plackett_luce"))
    assert (of_dpo - of_lists).norm() <= 1e-9 * of_dpo.norm()


def test_sft_beside_lists_learns_the_best_answer() -> None:
    trees = ranked(3)
    best = [replace(t, completion_ids=t.completion_ids[:1], truncated=(False,), scores=t.scores[:1]) for t in trees]
    assert torch.allclose(step_gradient(offline("sft"), trees, [3]), step_gradient(offline("sft"), best, [3]))


def test_dfts_gradient_is_sfts_of_each_token_times_its_probability() -> None:
    tree = make_tree(0, 4, (6,))
    algorithm = offline("dft")
    got = step_gradient(algorithm, [tree], [1])
    model = algorithm.scorer.model
    model.zero_grad()
    ids = torch.tensor([[*tree.prompt_ids.tolist(), *tree.completion_ids[0].tolist()]])
    logps = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, 3:-1], -1)
    picked = logps.gather(1, ids[0, 4:, None]).squeeze(1)
    (-(picked.detach().exp() * picked).mean()).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert (got - expected).norm() <= 1e-9 * expected.norm()
