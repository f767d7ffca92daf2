"""unsloth's worker, in its own environment: SFT on its CPU path, on the given rows. Takes a JSON spec, prints a JSON result."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

SPEC: dict[str, Any] = json.loads(sys.argv[1])
Path(SPEC["work"]).mkdir(parents=True, exist_ok=True)
os.chdir(SPEC["work"])  # unsloth writes a folder of compiled code

import unsloth  # noqa: E402  before the libraries that it patches

import datasets  # noqa: E402  isort:skip
import torch  # noqa: E402  isort:skip
import transformers  # noqa: E402  isort:skip
import trl  # noqa: E402  isort:skip
from measure import Clock, finish  # noqa: E402  isort:skip
from worker_trl import Timer  # noqa: E402  isort:skip

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def read_rows() -> list[dict[str, Any]]:
    """Read prompt and chosen completion of the rows of all steps, sorted by length within each step to reduce padding."""
    all_rows = json.loads(Path(SPEC["rows"]).read_text())[: SPEC["batch"] * SPEC["steps"]]
    rows = [
        {
            "input_ids": r["prompt_ids"] + r["completion_ids"][0],
            "labels": [-100] * len(r["prompt_ids"]) + r["completion_ids"][0],
        }
        for r in all_rows
    ]
    steps = [rows[i : i + SPEC["batch"]] for i in range(0, len(rows), SPEC["batch"])]
    return [r for step in steps for r in sorted(step, key=lambda r: len(r["input_ids"]), reverse=True)]


def load() -> Any:
    """Load the model, with a LoRA adapter if the spec has a rank."""
    dtype = torch.bfloat16 if SPEC["precision"] == "bf16" else torch.float32
    lora = SPEC["lora_rank"]
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        SPEC["model"],
        max_seq_length=SPEC["max_length"],
        dtype=dtype,
        load_in_4bit=False,
        full_finetuning=lora is None,
        use_gradient_checkpointing=False,
    )
    if lora is None:
        return model
    return unsloth.FastLanguageModel.get_peft_model(
        model,
        r=lora,
        lora_alpha=2 * lora,
        lora_dropout=0.0,
        target_modules=LINEAR,
        use_gradient_checkpointing=False,
        random_state=SPEC["seed"],
    )


def main() -> None:
    torch.set_num_threads(SPEC["threads"])
    rows, clock, micro = read_rows(), Clock(SPEC["warmup_steps"]), SPEC["peer"]["micro"]
    config = trl.SFTConfig(
        output_dir=SPEC["work"],
        use_cpu=True,
        bf16=SPEC["precision"] == "bf16",
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=SPEC["batch"] // micro,
        max_steps=SPEC["steps"],
        max_length=SPEC["max_length"],
        learning_rate=SPEC["lr"],
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        weight_decay=0.0,
        max_grad_norm=SPEC["max_grad_norm"],
        gradient_checkpointing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="sequential",
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=SPEC["seed"],
    )
    trainer = trl.SFTTrainer(
        model=load(),
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(SPEC["model"]),
        callbacks=[Timer(clock)],
    )
    trainer.train()
    timed = rows[SPEC["warmup_steps"] * SPEC["batch"] :]
    parts = [timed[i : i + micro] for i in range(0, len(timed), micro)]
    finish(
        clock.result(
            name=f"unsloth {unsloth.__version__}",
            pairs=len(timed),
            computed_tokens=sum(len(part) * max(len(r["input_ids"]) for r in part) for part in parts),
            settings=SPEC["peer"],
            versions={m.__name__: m.__version__ for m in (unsloth, trl, torch, transformers)},
            trainable=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            dtypes=sorted({str(p.dtype) for p in trainer.model.parameters()}),
        )
    )


if __name__ == "__main__":
    main()
