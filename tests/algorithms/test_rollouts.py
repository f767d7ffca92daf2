"""Groups that a policy writes: whose prompt a reward sees, what the draws depend on, EOS and its price."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny_model
from tiny import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from penchant.algorithms.group import GroupPolicyGradient
from penchant.algorithms.options import OnlineConfig
from penchant.algorithms.rollouts import Buffer, Group, Writer
from penchant.data.packing import pack
from penchant.logprobs import Scorer
from penchant.logprobs.reference import LiveReference
from penchant.rewards.functions import Reward, RewardTerm
from penchant.types import TokenTree

EOS = 1


@pytest.fixture(scope="module")
def model() -> Any:
    """A model of the byte tokenizer's vocabulary that ends about every fourth token."""
    torch.manual_seed(0)
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=260,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=16,
            max_position_embeddings=64,
            tie_word_embeddings=False,
        )
    ).eval()
    made.lm_head = torch.nn.Linear(16, 260, bias=True)
    torch.nn.init.zeros_(made.lm_head.bias)
    with torch.no_grad():
        made.lm_head.bias[EOS] = 4.5
    return made


def prompts(*texts: str) -> list[TokenTree]:
    tokenizer = tiny_tokenizer()
    ids = [np.array(tokenizer(t, add_special_tokens=False)["input_ids"], np.int32) for t in texts]
    return [TokenTree(10 + i, p, (), (), f"made-up:{i}") for i, p in enumerate(ids)]


def writer(model: Any, seen: list[tuple[str, str]] | None = None, seed: int = 0, **config: Any) -> Writer:
    def judge(asked: Sequence[str], answers: Sequence[str]) -> list[float]:
        if seen is not None:
            seen.extend(zip(asked, answers, strict=True))
        return [float(len(p)) for p in asked]

    settings = {"name": "rloo", "samples": 3, "max_new_tokens": 6, "temperature": 1.0, **config}
    return Writer(model, tiny_tokenizer(), Reward((RewardTerm("mine", judge),)), OnlineConfig(**settings), seed)


def ids(groups: Sequence[Group]) -> list[list[list[int]]]:
    return [[c.tolist() for c in g.tree.completion_ids] for g in groups]


def test_a_reward_sees_each_completion_with_its_own_prompt(model: Any) -> None:
    seen: list[tuple[str, str]] = []
    groups = writer(model, seen).write(prompts("a", "bcd"), 0)
    assert [p for p, _ in seen] == ["a"] * 3 + ["bcd"] * 3
    assert [t for _, t in seen] == [text for g in groups for text in g.texts]
    assert [g.rewards.tolist() for g in groups] == [[1.0] * 3, [3.0] * 3]


def test_draws_belong_to_seed_iteration_and_row(model: Any) -> None:
    """Not to what else is in the batch: a prompt gets the same completions alone."""
    one, two = prompts("a", "bcd")
    whole = ids(writer(model).write([one, two], 0))
    assert ids(writer(model).write([one, two], 0)) == whole
    assert ids(writer(model).write([two], 0)) == whole[1:]
    assert ids(writer(model).write([one, two], 1)) != whole
    assert ids(writer(model, seed=1).write([one, two], 0)) != whole
    assert ids(writer(model, seed=1).write([one, two], 0)) != ids(writer(model).write([one, two], 1))


def test_completions_end_with_eos_and_those_that_do_not_pay_for_it(model: Any) -> None:
    (group,) = writer(model, samples=24, missing_eos_penalty=0.25).write(prompts("abc"), 0)
    cut = np.array(group.tree.truncated)
    assert cut.any() and not cut.all()
    for c, unfinished in zip(group.tree.completion_ids, cut, strict=True):
        assert (EOS in c) != unfinished and EOS not in c[:-1] and (len(c) == 6 or not unfinished)
    assert group.rewards.tolist() == [2.75 if unfinished else 3.0 for unfinished in cut]


def test_minibatches_are_cut_anew_in_every_epoch_and_miss_nobody(model: Any) -> None:
    buffer = Buffer(writer(model, samples=2, max_new_tokens=1), epochs=3, minibatches=2)
    trees = prompts(*(str(i) for i in range(8)))
    parts = [sorted(t.row for t in buffer.part(step, trees, lambda groups: None)) for step in range(6)]
    assert all(sorted(a + b) == [10 + i for i in range(8)] for a, b in zip(parts[::2], parts[1::2], strict=True))
    assert len({tuple(p) for p in parts[::2]}) > 1


def test_a_later_update_is_measured_against_the_policy_that_wrote() -> None:
    model = tiny_model("llama")
    tree = TokenTree(
        0, np.array([5, 6], np.int32), (np.array([7, 8, 9], np.int32), np.array([10], np.int32)), (True,) * 2
    )

    class Fixed:
        seed = 0

        def write(self, *_: Any) -> list[Group]:
            return [Group(tree, torch.tensor([1.0, 0.0], dtype=torch.float64))]

    config = OnlineConfig(name="grpo", samples=2, max_new_tokens=4, epochs=2)
    reference = LiveReference(Scorer(tiny_model("llama", seed=1), "shared"))
    algorithm = GroupPolicyGradient(Scorer(model, "shared"), reference, Fixed(), config, 50)  # type: ignore[arg-type]
    batch = pack(algorithm.begin_step(0, 0.0, []))
    wrote = algorithm.scorer.logps(batch).tokens.detach()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.05)
    algorithm.begin_step(1, 1.0, [])
    out = algorithm.loss(algorithm.score(batch))
    expected = torch.exp(algorithm.scorer.logps(batch).tokens.detach() - wrote)
    assert torch.allclose(out.metrics["ratio"][0], expected, rtol=1e-9) and (expected - 1).abs().max() > 1e-3
