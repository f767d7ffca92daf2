"""TRL's worker for PPO, in its own environment: its last PPOTrainer on the given prompts. Takes a JSON spec, prints a JSON result."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import torch
import transformers
from measure import Clock, finish
from ppo_reward import of_text
from torch import Tensor, nn


class EpisodeClock(transformers.TrainerCallback):
    """Marks the end of each TRL step, which is one batch of episodes, and keeps its logged reward and KL."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.rollouts: list[dict[str, float]] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.step()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
        if logs and "objective/scores" in logs:
            self.rollouts.append({"reward": logs["objective/scores"], "kl": logs["objective/kl"]})


class TextReward(nn.Module):
    """`ppo_reward` with the interface that TRL expects: a backbone whose last hidden state goes through a `score` layer."""

    base_model_prefix = "backbone"

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.score = nn.Identity()

    def backbone(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Any:
        """Return the text's reward at every position. TRL picks the last."""
        texts = [
            self.tokenizer.decode(ids[mask], skip_special_tokens=True)
            for ids, mask in zip(input_ids, attention_mask.bool(), strict=True)
        ]
        rewards = torch.tensor([of_text(t) for t in texts])
        return SimpleNamespace(hidden_states=[rewards[:, None, None].expand(-1, input_ids.shape[1], 1)])


def config_of(spec: dict[str, Any], trl_ppo: Any) -> Any:
    """TRL's config for a spec. No gradient accumulation, with which TRL would step only once for all minibatches."""
    return trl_ppo.PPOConfig(
        output_dir=spec["work"],
        use_cpu=True,
        bf16=autocast(spec),
        gradient_checkpointing=False,
        per_device_train_batch_size=spec["batch"],
        gradient_accumulation_steps=1,
        num_mini_batches=spec["minibatches"],
        num_ppo_epochs=spec["epochs"],
        total_episodes=spec["batch"] * spec["batches"],
        local_rollout_forward_batch_size=spec["peer"]["rollout_batch"] or spec["batch"],
        response_length=spec["response_length"],
        stop_token="eos",
        missing_eos_penalty=spec["missing_eos_penalty"],
        temperature=spec["temperature"],
        kl_coef=spec["beta"],
        cliprange=spec["clip"],
        cliprange_value=spec["clip"],
        vf_coef=spec["value_coef"],
        gamma=spec["gamma"],
        lam=spec["lam"],
        whiten_rewards=spec["whiten_rewards"],
        learning_rate=spec["lr"],
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        adam_epsilon=spec["adam_eps"],
        weight_decay=0.0,
        num_sample_generations=0,
        logging_steps=1,
        save_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=spec["seed"],
    )


def autocast(spec: dict[str, Any]) -> bool:
    """Whether TRL runs bf16 by autocast over fp32 weights, like Penchant's fp32 masters, rather than with bf16 weights only."""
    return spec["precision"] == "bf16" and spec["peer"]["bf16"] == "autocast"


def models_of(spec: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Policy, reference and value model, all from one folder. In bf16 the frozen reference needs no fp32 weights."""
    bf16 = spec["precision"] == "bf16"
    trained = torch.bfloat16 if bf16 and not autocast(spec) else torch.float32
    causal, path = transformers.AutoModelForCausalLM, spec["model"]
    policy = causal.from_pretrained(path, dtype=trained)
    reference = causal.from_pretrained(path, dtype=torch.bfloat16 if bf16 else torch.float32).requires_grad_(False)
    value = transformers.AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, dtype=trained)
    return policy, reference, value


def tokenizer_of(spec: dict[str, Any]) -> Any:
    """Tokenizer with left padding and a pad token other than EOS, since TRL ends a completion at any pad token."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(spec["model"], padding_side="left")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(json.loads(Path(spec["prompts"]).read_text())["pad"])
    return tokenizer


def main() -> None:
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    if autocast(spec):  # PPOTrainer creates its Accelerator without a precision and ignores the config's bf16
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    import trl
    from trl.experimental import ppo

    tokenizer = tokenizer_of(spec)
    rows = json.loads(Path(spec["prompts"]).read_text())[spec["kind"]][: spec["batch"] * spec["batches"]]
    policy, reference, value = models_of(spec)
    clock = Clock(spec["warmup_batches"])
    episodes = EpisodeClock(clock)
    data = datasets.Dataset.from_dict({"input_ids": rows})
    trainer = ppo.PPOTrainer(
        args=config_of(spec, ppo),
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=TextReward(tokenizer),
        value_model=value,
        train_dataset=data,
        eval_dataset=data.select(range(1)),  # not used, but PPOTrainer builds a data loader from it
        callbacks=[episodes],
    )
    # keep our prompts and batches, since TRL shuffles its own data loader
    trainer.dataloader = torch.utils.data.DataLoader(data, batch_size=spec["batch"], collate_fn=trainer.data_collator)
    trainer.train()
    finish(
        clock.result(
            name=f"trl {trl.__version__}",
            episodes=spec["batch"] * (spec["batches"] - spec["warmup_batches"]),
            rollouts=episodes.rollouts,
            notes=[f"mixed precision: {trainer.accelerator.mixed_precision}"],
            versions={m.__name__: m.__version__ for m in (torch, transformers)},
            trainable=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            dtypes=sorted({str(p.dtype) for m in (policy, reference, value) for p in m.parameters()}),
        )
    )


if __name__ == "__main__":
    main()
