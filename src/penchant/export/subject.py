"""The model of a run's checkpoint, loaded as the run has it or as one complete model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penchant.config import RunConfig, with_absolute_paths
from penchant.data.templates import set_eos_token_ids
from penchant.errors import CheckpointError
from penchant.models.folder import check_folder, loading
from penchant.models.load import load_causal_model, load_tokenizer, own_memory, without_cache
from penchant.models.lora import is_adapter, with_adapter
from penchant.models.merge import merged_model
from penchant.models.options import ModelConfig, check_exists, check_text_alone
from penchant.models.reward import ADAPTER, choose_padding, load_model_config, load_reward_model, set_padding
from penchant.runfolder.read import read_folder
from penchant.runs.find import check_base, find_run, runs_in
from penchant.training.checkpoint import find_checkpoint, load_checkpoint

CPU = torch.device("cpu")
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# sample texts to compare on, tokens of each, tokens of the fixed row
MAX_PROMPTS, MAX_TOKENS, RANDOM_TOKENS = (4, 96, 24)


@dataclass(frozen=True, slots=True)
class Subject:
    """The model to export.

    Args:
        run: the run's folder; config: its settings; checkpoint: the checkpoint's folder; reward: whether it is a reward model.
        adapter: the folder with its LoRA adapter, None if the whole model was trained.
    """

    run: Path
    config: RunConfig
    checkpoint: Path
    reward: bool
    adapter: Path | None

    @property
    def step(self) -> int:
        return int(self.checkpoint.name.removeprefix("step-"))

    @property
    def folder(self) -> Path:
        """The checkpoint's model folder."""
        return self.checkpoint / "model"

    @property
    def base(self) -> ModelConfig:
        return self.config.model

    def tokenizer(self) -> Any:
        """Load the tokenizer the run was trained with."""
        if (self.folder / "tokenizer_config.json").exists():
            return load_tokenizer(str(self.folder))
        return load_tokenizer(self.base.tokenizer or self.base.path, self.base.revision_of(self.base.tokenizer))

    def dtype(self) -> torch.dtype:
        """Return the dtype that the checkpoint's weights are stored in."""
        from safetensors import safe_open

        folder = self.adapter if self.adapter is not None and not self.reward else self.folder
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    dtype = file.get_tensor(name).dtype
                    if dtype in DTYPE_NAMES:
                        return dtype
        return torch.float32

    def model_config(self) -> Any:
        """Load the model's config; an adapter uses its base model's."""
        saved = (self.folder / "config.json").exists()
        return load_model_config(str(self.folder) if saved else self.base.path)

    def load_own(self) -> Any:
        """Load the model as the run has it, in fp32: an adapter stays beside its base (a reward model is stored merged)."""
        if self.reward:
            return read_model(self.folder, reward=True)
        if self.adapter is None:
            return load_causal_model(ModelConfig(path=str(self.folder)), CPU).eval()
        base = load_causal_model(self.base, CPU, self.config.train.seed)
        check_base(self.run, self.base, base)
        return with_adapter(base, self.adapter)

    def load_merged(self) -> Any:
        """Load the complete model, in fp32, with any adapter merged into it."""
        if self.reward:
            return self.load_own()
        if self.adapter is None:
            model = self.load_own()
        else:
            check = partial(check_base, self.run, self.base)
            model = merged_model(self.base, self.adapter, CPU, self.config.train.seed, check).eval()
        set_eos_token_ids(model, self.tokenizer())
        return model

    def load_base(self) -> Any:
        """Load the model that the adapter is applied to, in fp32."""
        seed = self.config.train.seed
        if not self.reward:
            return load_causal_model(self.base, CPU, seed)
        loaded = load_reward_model(self.base, CPU, seed)
        if not loaded.encoder:
            tokenizer = self.tokenizer()
            choose_padding(tokenizer)
            set_padding(loaded.model, tokenizer)
        return loaded.model

    def rows(self) -> list[list[int]]:
        """Return token ids to compare models on: the run's own samples, and a fixed row of random tokens."""
        tokenizer = self.tokenizer()
        texts = [
            str(s.get("prompt", "")) + str(s.get("after", "")) for s in read_folder(self.run).samples[:MAX_PROMPTS]
        ]
        sample_ids = [tokenizer(text, add_special_tokens=False)["input_ids"][:MAX_TOKENS] for text in texts]
        vocab_size = min(len(tokenizer), int(self.model_config().get_text_config().vocab_size))
        random_ids = torch.randint(0, vocab_size, (RANDOM_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
        # without padding tokens: a reward model's score is read at the last token that is not padding
        fixed = [i for i in random_ids if i != tokenizer.pad_token_id]
        return [*(row for row in sample_ids if row), fixed]


def find_subject(run_path: str | Path, step: str = "last") -> Subject:
    """Find the model that a run's folder (or a checkpoint in it) and a step refer to.

    Raises:
        CheckpointError: there is no such run or checkpoint, or the checkpoint's files have changed since they were written.
    """
    match = find_run(str(run_path), step)
    if match is None:
        check_exists(str(run_path), hub=False)
        runs = runs_in(str(run_path))
        how = f"name one of its runs: {', '.join(runs)}" if runs else "give a run's folder"
        raise CheckpointError(str(run_path), "is not a run", how)
    config = with_absolute_paths(match[0])
    check_text_alone(config.model, str(run_path), "export")
    run = Path(config.output)
    checkpoint = find_checkpoint(run, match[1])
    if checkpoint is None:
        raise CheckpointError(
            str(run_path), "there is no trained checkpoint to export", "train it first, or name a step"
        )
    load_checkpoint(checkpoint)  # its sums are checked: what is exported is what was trained
    reward = config.method.learns_reward
    model = checkpoint / "model"
    inside_adapter = model / ADAPTER
    adapter = model if is_adapter(model) else inside_adapter if reward and inside_adapter.is_dir() else None
    return Subject(run, config, checkpoint, reward, adapter)


def auto_class(reward: bool) -> Any:
    """Return the transformers class that loads such a model."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    return AutoModelForSequenceClassification if reward else AutoModelForCausalLM


def read_model(folder: Path, reward: bool = False, **options: Any) -> Any:
    """Load a model folder as a transformers user would, in fp32."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    check_folder(folder)
    with loading(str(folder), "the model could not be loaded", "export it again"):
        model = auto_class(reward).from_pretrained(folder, dtype=torch.float32, trust_remote_code=False, **options)
    own_memory(model)  # otherwise their alignment in the file would affect the last bits
    return model.eval()


def outputs(model: Any, rows: list[list[int]]) -> Tensor:
    """Return the logits of every token of all rows, concatenated; for a reward model, its scores."""
    with torch.inference_mode():
        logits = [model(input_ids=torch.tensor([row]), **without_cache(model)).logits[0].float() for row in rows]
    return torch.cat([f.reshape(-1, f.shape[-1]) for f in logits])


def round_weights(model: Any, stored_value: Callable[[str, Tensor], Tensor]) -> None:
    """Replace every weight by the value that its stored form decodes to; the model stays in fp32."""
    for name, p in model.named_parameters():
        p.data = stored_value(name, p.data).to(torch.float32)
