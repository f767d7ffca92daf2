"""The peers' rollout worker: transformers `generate` or TRL's `batch_generation`. Takes a JSON spec, then one request per line.

Spec: `side` (generate, trl), `model`, `precision`, `prompts` (a file from prompts.py), `cache` (dynamic, static), `rows`
(sequences at once; 0: all), `threads`. Request: `kind`, `prompts`, `n`, `new_tokens`, `eos` (or null), `seed`.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from measure import finish, peak_bytes
from torch import Tensor

Writer = Callable[[Tensor, Tensor, Any], list[Tensor]]  # (ids, mask, settings) -> sequences, one tensor per batch


def padded(prompts: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Left-padded ids and their mask."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    return ids, torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])


def settings_of(spec: dict[str, Any], request: dict[str, Any], pad: int) -> Any:
    """Generation config that samples the full distribution, without top-k or top-p. Without an EOS the length is fixed."""
    return transformers.GenerationConfig(
        max_new_tokens=request["new_tokens"],
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        eos_token_id=request["eos"],
        pad_token_id=pad,
        cache_implementation="static" if spec["cache"] == "static" else None,  # None: generate's default dynamic cache
    )


def by_generate(model: Any, samples: int, rows: int) -> Writer:
    """Sample with transformers: each prompt once, with `num_return_sequences`."""

    def write(ids: Tensor, mask: Tensor, settings: Any) -> list[Tensor]:
        settings.num_return_sequences = samples
        at_once = max(1, rows // samples) if rows else len(ids)
        parts = zip(ids.split(at_once), mask.split(at_once), strict=True)
        return [model.generate(i, attention_mask=m, generation_config=settings) for i, m in parts]

    return write


def by_trl(model: Any, samples: int, rows: int, pad: int) -> Writer:
    """Sample with the function TRL's PPOTrainer calls. It takes a row per completion and keeps every token's logits."""
    from trl.experimental.ppo.ppo_trainer import batch_generation

    def write(ids: Tensor, mask: Tensor, settings: Any) -> list[Tensor]:
        queries = ids.repeat_interleave(samples, dim=0)
        return [batch_generation(model, queries, rows or len(queries), pad, settings)[0]]

    return write


def completions(sequences: list[Tensor], width: int, eos: int | None) -> list[list[int]]:
    """New tokens of each row, up to and including its first EOS."""
    rows = [row for part in sequences for row in part[:, width:].tolist()]
    if eos is None:
        return rows
    return [[*itertools.takewhile(lambda t: t != eos, r), *([eos] if eos in r else [])] for r in rows]


def main() -> None:
    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    prompts_by_kind = json.loads(Path(spec["prompts"]).read_text())
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[spec["precision"]]
    model = transformers.AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype).eval()
    version = transformers.__version__
    if spec["side"] == "trl":
        import trl

        version = trl.__version__
    static = ", static cache" if spec["cache"] == "static" else ""
    finish({"name": f"{spec['side']} {version}{static}", "torch": torch.__version__})
    for line in sys.stdin:
        request = json.loads(line)
        prompts = prompts_by_kind[request["kind"]][: request["prompts"]]
        model.generation_config.eos_token_id = request["eos"]  # generate fills in a None in the settings from here
        torch.manual_seed(request["seed"])
        started, cpu = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            ids, mask = padded(prompts, prompts_by_kind["pad"])
            if spec["side"] == "trl":
                write = by_trl(model, request["n"], spec["rows"], prompts_by_kind["pad"])
            else:
                write = by_generate(model, request["n"], spec["rows"])
            sequences = write(ids, mask, settings_of(spec, request, prompts_by_kind["pad"]))
            rows = completions(sequences, ids.shape[1], request["eos"])
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        finish({"seconds": seconds, "cpu_seconds": cpu, "lengths": [len(r) for r in rows], "peak_bytes": peak_bytes()})


if __name__ == "__main__":
    main()
