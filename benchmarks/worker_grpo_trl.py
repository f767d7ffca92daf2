"""TRL's worker for GRPO, in its own environment: GRPOTrainer on the given prompts. Takes a JSON spec, prints a JSON result."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
import trl
from measure import Clock, finish
from ppo_reward import warmth


class StepClock(transformers.TrainerCallback):
    """Marks the end of each step, which is one batch of rollouts, and keeps its logged reward, KL, length and tokens."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.rollouts: list[dict[str, float]] = []
        self.tokens: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.step()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
        if logs and "reward" in logs:
            self.rollouts.append(
                {"reward": logs["reward"], "kl": logs.get("kl", 0.0), "length": logs["completions/mean_length"]}
            )
            self.tokens.append(float(logs["num_tokens"]))


def config_of(spec: dict[str, Any]) -> Any:
    """TRL's config for a spec, with `peer.batch` completions per forward pass (0: all of a step)."""
    completions = spec["batch"] * spec["samples"]
    at_once = spec["peer"]["batch"] or completions
    return trl.GRPOConfig(
        output_dir=spec["work"],
        use_cpu=True,
        bf16=spec["precision"] == "bf16",
        gradient_checkpointing=False,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=completions // at_once,
        num_generations=spec["samples"],
        num_iterations=1,
        max_steps=spec["batches"],
        max_completion_length=spec["response_length"],
        temperature=spec["temperature"],
        beta=spec["beta"],
        epsilon=spec["clip"],
        loss_type="grpo",
        scale_rewards="group",
        shuffle_dataset=False,
        learning_rate=spec["lr"],
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        weight_decay=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=spec["seed"],
    )


def main() -> None:
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(spec["model"], padding_side="left")
    prompts_by_kind = json.loads(Path(spec["prompts"]).read_text())
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(prompts_by_kind["pad"])
    rows = prompts_by_kind[spec["kind"]][: spec["batch"] * spec["batches"]]
    clock = Clock(spec["warmup_batches"])
    steps = StepClock(clock)
    model = transformers.AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return warmth(prompts, completions)

    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=config_of(spec),
        train_dataset=datasets.Dataset.from_dict({"prompt": [tokenizer.decode(ids) for ids in rows]}),
        processing_class=tokenizer,
        callbacks=[steps],
    )
    trainer.train()
    warm = spec["warmup_batches"]
    finish(
        clock.result(
            name=f"trl {trl.__version__}",
            tokens=steps.tokens[-1] - steps.tokens[warm - 1],
            rollouts=steps.rollouts,
            notes=[],
            versions={m.__name__: m.__version__ for m in (torch, transformers)},
            trainable=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            dtypes=sorted({str(p.dtype) for p in model.parameters()}),
        )
    )


if __name__ == "__main__":
    main()
