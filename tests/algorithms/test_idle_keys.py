"""Every key of every online method, of rollouts and of rewards has an effect or is refused with an error."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from tiny import tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from penchant.algorithms import ALGORITHMS
from penchant.algorithms.gkd import GKD
from penchant.algorithms.grpo import PRESETS, GroupConfig, GroupPolicyGradient
from penchant.algorithms.offline import Component
from penchant.algorithms.online_dpo import OnlineDPO
from penchant.algorithms.ppo import PPO
from penchant.algorithms.rollouts import Writer
from penchant.base.section import recorded
from penchant.config import config_from_mapping, dump_config, load_config
from penchant.config.yaml import RESOLVED, parse_yaml
from penchant.data.packing import pack
from penchant.errors import ConfigError
from penchant.logprobs import Scorer
from penchant.logprobs.reference import LiveReference
from penchant.losses import LOSSES
from penchant.models.reward import ValueHead
from penchant.rewards.functions import Reward, RewardTerm
from penchant.rollout.options import RolloutConfig
from penchant.training.steps import reduced
from penchant.types import TokenTree

EOS = 1

# values to try; a method's own default shows nothing
OTHER: dict[str, tuple[Any, ...]] = {
    "samples": (3,),
    "max_new_tokens": (4,),
    "temperature": (0.6,),
    "top_p": (0.5,),
    "min_p": (0.4,),
    "top_k": (2,),
    "repetition_penalty": (3.0,),
    "entropy_coef": (0.5,),
    "beta": (0.7,),
    "epochs": (3,),
    "minibatches": (2,),
    "clip": (1e-5, 0.9),
    "clip_high": (1e-5, 0.9),
    "clip_dual": (1.00001,),
    "scale_rewards": ("none", "group"),
    "loss_mean": ("constant", "sequence"),
    "missing_eos_penalty": (0.5,),
    "kl_in": ("loss", "reward"),
    "kl_estimator": ("k2",),
    "dynamic_sampling": (0, 1),
    "overlong_filter": (True, False),
    "group_baseline": (True,),
    "kl_control": ("adaptive",),
    "kl_target": (1e6,),
    "kl_horizon": (5.0,),
    "gamma": (0.5,),
    "lambda": (0.1,),
    "value_coef": (0.5,),
    "value_clip": (1e-6,),
    "whiten_advantages": (False,),
    "whiten_rewards": (True,),
    "normalise_scores": (True,),
    "score_clip": (0.1,),
    "adam_eps": (1e-3,),
    "ratio_limit": (1.000001,),
    "divergence": ("forward_kl",),
}
NEEDS: dict[str, dict[str, Any]] = {"kl_target": {"kl_control": "adaptive"}, "kl_horizon": {"kl_control": "adaptive"}}
ELSEWHERE = ("name", "value", "value_init")  # needs another model: tests/rewards/test_reward_models.py

BASE: dict[str, dict[str, Any]] = {"online_dpo": {"samples": 4}, "gkd": {}}
REFUSED: dict[str, set[str]] = {
    "rloo": {"scale_rewards", "loss_mean", "group_baseline"},
    "grpo": {"group_baseline"},
    "dr_grpo": {"group_baseline"},
    "dapo": {"group_baseline"},
    "gspo": {"group_baseline"},
    "cispo": {"group_baseline", "clip", "clip_dual"},
    "reinforce_pp": {"scale_rewards"},
    "ppo": {"scale_rewards", "loss_mean"},
    "online_dpo": {
        *("entropy_coef", "clip", "clip_high", "clip_dual", "scale_rewards", "loss_mean"),
        *("epochs", "minibatches"),  # each pair is trained on in one step
    },
    "gkd": {"samples"},  # fixed at 1
}


@cache
def weights(seed: int) -> Any:
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    made = LlamaForCausalLM(LlamaConfig(vocab_size=260, tie_word_embeddings=False, **shape)).eval()
    made.lm_head = torch.nn.Linear(16, 260, bias=True)
    torch.nn.init.zeros_(made.lm_head.bias)
    with torch.no_grad():  # about every second token ends a completion
        made.lm_head.weight.mul_(8.0)
        made.lm_head.bias[EOS] = 4.0
    return made


def prompts(answered: bool, *texts: str) -> list[TokenTree]:
    tokenizer = tiny_tokenizer()
    ids = [np.array(tokenizer(t, add_special_tokens=False)["input_ids"], np.int32) for t in texts]
    answer = ((np.array([70, 71, EOS], np.int32),), (False,)) if answered else ((), ())
    return [TokenTree(i, p, *answer, f"x:{i}") for i, p in enumerate(ids)]


def judged(asked: list[str], written: list[str]) -> list[float]:
    """Prompts with a z give no gradient."""
    return [0.5 if "z" in p else sum(map(ord, t)) % 7 / 3 for p, t in zip(asked, written, strict=True)]


def algorithm_of(config: Any, policy: Any) -> Any:
    scorer, reference = (Scorer(m, "shared", temperature=config.temperature) for m in (policy, weights(1)))
    writer = Writer(policy, tiny_tokenizer(), Reward((RewardTerm("mine", judged),)), config, 0)
    live = LiveReference(reference)
    if isinstance(config, GroupConfig):
        return GroupPolicyGradient(scorer, live, writer, config, 400, prompts(False, "a", "b", "z", "de", "fg", "h"))
    if config.name == "ppo":
        torch.manual_seed(0)
        head = ValueHead(16)
        torch.nn.init.normal_(head.weight, std=0.3)
        return PPO(scorer, live, writer, config, 400, head)
    if config.name == "gkd":
        return GKD(scorer, live, writer, config)
    dpo = LOSSES["dpo"]
    component = Component(dpo, dpo.params.model_validate({"beta": config.kl_weight}))
    return OnlineDPO(scorer, [component], live, writer=writer)


def figures(config: Any) -> Iterator[Any]:
    """Results of a few steps: completions, logs, losses and gradients of each."""
    policy = copy.deepcopy(weights(0))
    made = algorithm_of(config, policy)
    yield dict(config.optimizer)
    trees = prompts(config.name == "gkd", "a", "b", "z", "de")
    for step in range(4):
        some = made.begin_step(step, 0.0, trees)
        if not some:
            yield None
            continue
        batch = pack(some)
        out = made.loss(made.score(batch))
        policy.zero_grad()
        reduced(out, made.weights(batch)).backward()
        norm = sum(float(p.grad.square().sum()) for p in policy.parameters() if p.grad is not None)
        means = {name: float(values.double().mean()) for name, (values, _) in out.metrics.items()}
        yield [
            batch.input_ids.tolist(),
            float(out.losses.detach().sum()),
            norm,
            means,
            made.step_values(),
            made.accepts(means),
        ]
        torch.manual_seed(step)
        with torch.no_grad():  # moved at random, so that ratios are above and below 1
            for p in policy.parameters():
                p += 3e-4 * torch.randn_like(p)
        made.end_step(step + 1, means)


SLOW = ("rloo", "dr_grpo", "dapo", "gspo", "reinforce_pp")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in REFUSED])
def test_every_key_of_a_method_changes_something_or_is_refused(name: str) -> None:
    base: dict[str, Any] = {"name": name, "max_new_tokens": 6} | BASE.get(
        name, {"beta": 0.1, "epochs": 2, "samples": 4}
    )
    section = ALGORITHMS[name]
    refused, plain = set(), {}
    for field, info in section.model_fields.items():
        if field in ELSEWHERE:
            continue
        key = info.alias or field
        context = base | NEEDS.get(key, {})
        before = section.model_validate(context)
        taken = []
        for value in (v for v in OTHER[key] if v != getattr(before, field)):
            try:
                taken.append(section.model_validate(context | {key: value}))
            except ValidationError as error:
                assert key in str(error)
        if not taken:
            refused.add(key)
            continue
        own = plain[str(context)] = plain.get(str(context)) or list(figures(before))
        assert any(a != b for after in taken for a, b in zip(figures(after), own, strict=True)), key
    assert refused == REFUSED[name]


ONCE = {
    **dict.fromkeys(("rloo", "grpo", "dr_grpo", "dapo", "gspo", "reinforce_pp"), ("clip", "clip_high", "clip_dual")),
    "cispo": ("clip_high",),
    "ppo": ("clip", "clip_high", "clip_dual", "value_clip", "ratio_limit"),
}
FIRST_FIGURES = 3  # of `figures`: the optimizer's settings, and two rollouts, the second by a policy that has moved


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in ONCE])
def test_with_one_update_a_batch_clips_change_nothing_and_are_refused(name: str) -> None:
    once = {"name": name, "max_new_tokens": 6, "beta": 0.1, "epochs": 1, "samples": 4}
    section = ALGORITHMS[name]
    plain = section.model_validate(once)
    before = list(islice(figures(plain), FIRST_FIGURES))
    for key in ONCE[name]:
        for value in (v for v in OTHER[key] if v != getattr(plain, key)):
            with pytest.raises(ValidationError, match=f"{key} has no effect with one update a batch"):
                section.model_validate(once | {key: value})
            with recorded():
                idle = section.model_validate(once | {key: value})
            assert list(islice(figures(idle), FIRST_FIGURES)) == before, key
            section.model_validate(once | {key: value, "minibatches": 2})


def test_every_online_method_is_there() -> None:
    writes = {n for n, section in ALGORITHMS.items() if section.model_validate({"name": n}).rollouts is not None}
    assert writes == REFUSED.keys() and set(PRESETS) <= writes


VLLM = {"engine": "vllm", "url": "http://127.0.0.1:9"}


@pytest.mark.parametrize(
    "section,what",
    [
        ({"algorithm": {"name": "cispo", "clip_dual": 3.0}}, "clip_dual has no effect with cispo"),
        ({"algorithm": {"name": "ppo", "kl_target": 3.0}}, "kl_target has no effect while beta is fixed"),
        ({"algorithm": {"name": "ppo", "kl_horizon": 3.0}}, "kl_horizon has no effect"),
        ({"algorithm": {"name": "ppo", "beta": 0.0, "kl_estimator": "k3"}}, "kl_estimator has no effect"),
        ({"algorithm": {"name": "ppo", "beta": 0.0, "kl_control": "adaptive"}}, "kl_control has no effect"),
        ({"algorithm": {"name": "ppo", "value_init": "zero"}}, "value_init has no effect"),
        ({"algorithm": {"name": "ppo", "value_coef": 0.0, "value_clip": 0.1}}, "value_clip has no effect"),
        ({"algorithm": {"name": "dapo", "kl_estimator": "k1"}}, "kl_estimator has no effect where beta is 0"),
        ({"algorithm": {"name": "grpo", "beta": 0.0, "kl_in": "reward"}}, "kl_in has no effect where beta is 0"),
        ({"algorithm": {"name": "online_dpo"}, "rollout": {"lag": 1}}, "rollout.lag has no effect"),
        ({"algorithm": {"name": "online_dpo"}, "rollout": {"correction": "tis"}}, "rollout.correction has no effect"),
        ({"algorithm": {"name": "gkd"}, "rollout": {"lag": 1}}, "rollout.lag has no effect with gkd"),
        ({"algorithm": {"name": "gkd"}, "rollout": {"correction": "tis"}}, "rollout.correction has no effect with gkd"),
        ({"algorithm": {"name": "gkd"}, "rollout": VLLM}, "rollout.engine has no effect with gkd"),
        ({"algorithm": {"name": "gkd", "divergence": "reverse_kl", "beta": 0.1}}, "beta has no effect"),
        ({"algorithm": {"name": "gkd", "lambda": 0.0, "top_p": 0.9}}, "top_p has no effect where lambda is 0"),
        ({"algorithm": {"name": "ppo"}, "train": {"adam_eps": 1e-6}}, "train.adam_eps has no effect with ppo"),
        ({"algorithm": {"name": "gspo", "clip": 0.1}}, "clip has no effect with one update"),
        ({"algorithm": {"name": "ppo", "epochs": 1, "value_clip": None}}, "value_clip has no effect with one update"),
        ({"rollout": {"turns": 2}}, "turns has no effect without environment"),
        ({"rollout": {"environment_timeout": 2.0}}, "environment_timeout has no effect without environment"),
        ({"rollout": {"environment_timeout": None}}, "environment_timeout has no effect without environment"),
        ({"rollout": {"tolerance": 0.1}}, "tolerance has no effect on the own engine"),
        ({"rollout": {"correction_level": "sequence"}}, "correction_level has no effect without correction"),
        ({"rollout": {"correction_high": 3.0}}, "correction_high has no effect without correction"),
        ({"rollout": {"correction": "tis", "correction_low": 0.5}}, "correction_low has no effect"),
        ({"rollout": {"engine": "vllm", "model": "m"}}, "model has no effect without a server"),
        ({"rollout": {"engine": "vllm", "key_env": "KEY"}}, "key_env has no effect without a server"),
        ({"rollout": {"engine": "vllm", "timeout": 3.0}}, "timeout has no effect without a server"),
        ({"rollout": {**VLLM, "update": "nccl", "folder": "w"}}, "folder has no effect"),
        ({"reward": {"runs/reward": 1.0, "timeout": 5.0}}, "timeout has no effect on reward models"),
        ({"reward": {"words": 1.0, "mine.py:f": 1.0, "device": "cuda"}}, "device has no effect without a reward model"),
    ],
    ids=str,
)
def test_a_key_that_changes_nothing_is_a_sentence(section: dict[str, Any], what: str) -> None:
    base = {"model": {"path": "m"}, "data": {"path": "d"}, "algorithm": {"name": "grpo"}, "output": "o"}
    config = base | section
    config |= {"teacher": "t"} if config["algorithm"]["name"] == "gkd" else {"reward": section.get("reward", "words")}
    with pytest.raises(ConfigError, match=what) as caught:
        config_from_mapping(config, [])
    assert len(str(caught.value)) < 250 and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "section",
    [
        {"rollout": {"environment": "calculator", "turns": 2, "environment_timeout": None}},
        {"rollout": {**VLLM, "tolerance": 0.1, "model": "m", "timeout": 5.0, "folder": "w"}},
        {
            "rollout": {
                "correction": "mis",
                "correction_low": 0.5,
                "correction_high": 3.0,
                "correction_level": "sequence",
            }
        },
        {"algorithm": {"name": "cispo", "clip": 0.3, "clip_high": None, "epochs": 2}},
        {"algorithm": {"name": "gspo", "clip": 0.1, "minibatches": 2}},
        {"algorithm": {"name": "ppo", "adam_eps": 1e-6}},
        {"algorithm": {"name": "ppo", "kl_control": "adaptive", "kl_target": 2.0, "beta": "auto"}},
        {"algorithm": {"name": "reinforce_pp", "group_baseline": True, "kl_estimator": "k2"}},
        {"reward": {"words": 1.0, "runs/reward": 1.0, "device": "cpu", "timeout": 5.0}},
    ],
    ids=str,
)
def test_where_it_changes_something_it_is_taken_and_comes_back_from_a_file(section: dict[str, Any]) -> None:
    base = {
        "model": {"path": "m"},
        "data": {"path": "d"},
        "algorithm": {"name": "grpo"},
        "reward": "words",
        "output": "o",
    }
    config = config_from_mapping(base | section, [])
    assert config_from_mapping(parse_yaml(dump_config(config), "")[0], []) == config


@pytest.mark.parametrize("name", REFUSED)
def test_a_resolved_config_has_every_key_and_is_taken(name: str) -> None:
    base = {"model": {"path": "m"}, "data": {"path": "d"}, "algorithm": {"name": name}, "output": "o"}
    base |= {"teacher": "t"} if name == "gkd" else {"reward": "words"}
    config = config_from_mapping(base, [])
    again = parse_yaml(dump_config(config), "")[0]
    assert again["rollout"].keys() == RolloutConfig.model_fields.keys()
    assert config_from_mapping(again, []) == config


@pytest.mark.parametrize(
    ("key", "name", "section"),
    [("turns", "rollout", {"turns": 2}), ("device", "reward", {"words": 1.0, "device": "cuda:1"})],
)
def test_a_run_of_an_earlier_version_keeps_a_key_that_changes_nothing(
    key: str, name: str, section: dict[str, Any], tmp_path: Path
) -> None:
    given = {"model": {"path": "m"}, "data": {"path": "d"}, "algorithm": "grpo", "reward": "words", "output": "o"}
    given |= {name: section}
    for file in ("run.yaml", RESOLVED):
        (tmp_path / file).write_text(json.dumps(given))  # JSON is YAML
    kept = load_config(tmp_path / RESOLVED).model_dump(mode="json")[name]
    assert section.items() <= kept.items()
    with pytest.raises(ConfigError, match=f"{key} has no effect"):
        load_config(tmp_path / "run.yaml")
