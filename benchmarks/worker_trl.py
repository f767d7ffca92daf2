"""TRL's worker for DPO, in its own environment: DPOTrainer on the given rows. Takes a JSON spec, prints a JSON result."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
import transformers
import trl
from measure import Clock, finish


class Timer(transformers.TrainerCallback):
    """Marks the end of each of TRL's steps on the clock and keeps its logged loss."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.step()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **__: Any) -> None:
        if logs and "loss" in logs:
            self.clock.losses.append(float(logs["loss"]))


class GivenTokens(trl.DPOTrainer):
    """DPOTrainer that uses the rows' token ids as given, so that both sides train on the same ones."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


def read_rows(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """Read the rows of all steps, optionally sorted by length within each step, which reduces TRL's padding."""
    rows = json.loads(Path(spec["rows"]).read_text())[: spec["batch"] * spec["steps"]]
    if not spec["peer"]["sort_in_step"]:
        return rows
    steps = [rows[i : i + spec["batch"]] for i in range(0, len(rows), spec["batch"])]
    return [r for step in steps for r in sorted(step, key=padded_length, reverse=True)]


def padded_length(row: dict[str, Any]) -> int:
    """Number of tokens in the longer of the row's two sequences."""
    return len(row["prompt_ids"]) + max(len(c) for c in row["completion_ids"])


def padded_tokens(rows: list[dict[str, Any]], micro: int) -> int:
    """Number of tokens that go through the model, including padding."""
    return sum(
        2 * len(part) * max(map(padded_length, part))
        for part in (rows[i : i + micro] for i in range(0, len(rows), micro))
    )


def config_of(spec: dict[str, Any]) -> trl.DPOConfig:
    """TRL's config for a spec."""
    peer, on_gpu = spec["peer"], spec["device"] == "cuda"
    weights_bf16 = spec["precision"] == "bf16" and peer["bf16"] == "weights"
    return trl.DPOConfig(
        output_dir=spec["work"],
        model_init_kwargs={
            "dtype": "bfloat16" if weights_bf16 else "float32",
            "attn_implementation": peer["attention"],
        },
        use_cpu=not on_gpu,
        bf16=spec["precision"] == "bf16" and not weights_bf16,
        per_device_train_batch_size=peer["micro"],
        gradient_accumulation_steps=spec["batch"] // peer["micro"],
        max_steps=spec["steps"],
        max_length=spec["max_length"],
        learning_rate=spec["lr"],
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        weight_decay=0.0,
        max_grad_norm=spec["max_grad_norm"],
        beta=spec["beta"],
        precompute_ref_log_probs=spec["reference"] == "cached",
        gradient_checkpointing=False,
        torch_compile=peer["compile"],
        train_sampling_strategy="sequential",
        dataloader_num_workers=0,
        dataloader_pin_memory=on_gpu,
        use_liger_kernel=on_gpu and transformers.utils.is_liger_kernel_available(),
        logging_steps=1,
        logging_strategy="steps",
        save_strategy="no",
        eval_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=spec["seed"],
    )


def quantization_of(spec: dict[str, Any]) -> transformers.BitsAndBytesConfig | None:
    """The 4-bit quantization config with the case's compute dtype, None if the spec has no quantization."""
    if spec["quantize"] == "none":
        return None
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec["quantize"],
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16" if spec["precision"] == "bf16" else "float32",
    )


def main() -> None:
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    rows = read_rows(spec)
    columns = {
        "prompt_ids": [r["prompt_ids"] for r in rows],
        "chosen_ids": [r["completion_ids"][0] for r in rows],
        "rejected_ids": [r["completion_ids"][1] for r in rows],
    }
    lora = None
    if spec["lora_rank"] is not None:
        lora = peft.LoraConfig(
            r=spec["lora_rank"],
            lora_alpha=2 * spec["lora_rank"],
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
    clock = Clock(spec["warmup_steps"], spec["device"])
    trainer = GivenTokens(
        model=spec["model"],
        args=config_of(spec),
        train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=transformers.AutoTokenizer.from_pretrained(spec["model"]),
        peft_config=lora,
        quantization_config=quantization_of(spec),
        callbacks=[Timer(clock)],
    )
    trainer.train()
    timed = rows[spec["warmup_steps"] * spec["batch"] :]
    finish(
        clock.result(
            name=f"trl {trl.__version__}",
            pairs=len(timed),
            computed_tokens=padded_tokens(timed, spec["peer"]["micro"]),
            settings=spec["peer"] | ({"liger": True} if trainer.args.use_liger_kernel else {}),
            versions={m.__name__: m.__version__ for m in (trl, torch, transformers, peft, datasets)},
            trainable=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            dtypes=sorted({str(p.dtype) for p in trainer.model.parameters()}),
        )
    )


if __name__ == "__main__":
    main()
