"""The engine alone: DPO's forward and backward passes on synthetic pairs, as a share of the matrix-multiply peak.

    .venv/bin/python benchmarks/engine_share.py                     # bf16, two threads
    .venv/bin/python benchmarks/engine_share.py --threads 1 --cpu   # CPU time of one thread, for a shared machine
    .venv/bin/python benchmarks/engine_share.py --kernels off       # plain transformers with the tree attention
    .venv/bin/python benchmarks/engine_share.py --lora 16 --dora    # an adapter of rank 16 on every layer; also --dropout 0.05

The model has SmolLM2-135M's shape and random weights, so nothing is downloaded. There is no optimizer and no data pipeline.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from flops import ModelShape, flops, work_of

SHAPE = ModelShape(layers=30, width=576, heads=9, head_dim=64, kv_heads=3, ffn=1536, vocab=49152)
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "MALLOC_ARENA_MAX": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "10000",
}


def made_up_pairs(count: int) -> list[Any]:
    """Random pairs with lengths like hh-rlhf's: prompts of about 130 tokens, completions of about 50."""
    import numpy as np

    from penchant.types import TokenTree

    rng = np.random.default_rng(0)

    def ids(mean: float) -> Any:
        n = int(np.clip(rng.lognormal(np.log(mean), 0.7), 2, 256))
        return rng.integers(0, SHAPE.vocab, n).astype(np.int32)

    return [TokenTree(i, ids(110), (ids(40), ids(40)), (False, False)) for i in range(count)]


def build_model(dtype: Any, **lora: Any) -> Any:
    """A random model of shape `SHAPE`, with an adapter if `lora` is given. bf16 parameters get fp32 gradient buffers, as in training."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from penchant.models.load import cast_parameters
    from penchant.models.lora import add_lora
    from penchant.models.options import LoraConfig
    from penchant.training.optim import MasterAdamW

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=SHAPE.vocab,
        hidden_size=SHAPE.width,
        intermediate_size=SHAPE.ffn,
        num_hidden_layers=SHAPE.layers,
        num_attention_heads=SHAPE.heads,
        num_key_value_heads=SHAPE.kv_heads,
        head_dim=SHAPE.head_dim,
        tie_word_embeddings=True,
    )
    model: Any = LlamaForCausalLM(config)
    if lora:
        model = add_lora(model, LoraConfig(**lora), seed=0)
    MasterAdamW(model.named_parameters(), dtype=dtype)
    cast_parameters(model, dtype)
    return model.train()


def peak_gflops(dtype: Any, clock: Callable[[], float]) -> float:
    """Best GFLOP/s of ten 2048^3 products."""
    import torch

    a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
    best = min(_timed(lambda: torch.mm(a, b.t()), clock) for _ in range(10))
    return 2 * 2048**3 / best / 1e9


def _timed(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    started = clock()
    call()
    return clock() - started


def main() -> None:
    """Print the pass sizes, the peak, and seconds per step and share of the peak with a live and a cached reference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--kernels", choices=["auto", "off"], default="auto")
    parser.add_argument("--lora", type=int, metavar="RANK", help="train an adapter of this rank on every linear layer")
    parser.add_argument("--dora", action="store_true", help="make it a DoRA adapter")
    parser.add_argument("--dropout", type=float, default=0.0, help="dropout on the adapter's input")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--tokens-per-step", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpu", action="store_true", help="measure CPU time instead of wall time (with --threads 1)")
    args = parser.parse_args()
    if not ALLOCATOR.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})
    import torch

    from penchant.base.lanes import Turns, side_by_side
    from penchant.data.packing import max_concurrent_passes, pack, plan_passes, tree_tokens
    from penchant.logprobs import Scorer
    from penchant.logprobs.reference import LiveReference, adapter_off

    clock = time.process_time if args.cpu else time.perf_counter
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    torch.set_num_threads(args.threads)
    trees = made_up_pairs(args.pairs)
    lora = {} if args.lora is None else {"r": args.lora, "dora": args.dora, "dropout": args.dropout}
    model = build_model(dtype, **lora)
    scorer = Scorer(model, "shared", args.kernels)
    plan = plan_passes([tree_tokens(t, True) for t in trees], args.tokens_per_step, scorer.side_by_side)
    batches = [replace(pack([trees[i] for i in members]), seed=number) for number, members in enumerate(plan)]
    at_once = (
        max_concurrent_passes([b.tokens for b in batches], args.tokens_per_step, len(trees))
        if scorer.side_by_side
        else 1
    )

    reference_of = adapter_off(scorer) if lora else LiveReference(scorer)

    def step(live: bool) -> None:
        def one_pass(batch: Any) -> None:
            reference = reference_of.logps(batch) if live else torch.zeros(len(batch.lengths))
            policy = scorer.logps(batch).sums
            torch.nn.functional.softplus(-0.1 * (policy - reference)).sum().backward()

        turns = Turns()
        list(side_by_side(one_pass, batches, most=at_once, turns=turns if scorer.side_by_side else None))
        with torch.no_grad():
            turns.close()
        model.zero_grad()

    best = {True: float("inf"), False: float("inf")}
    peak = peak_gflops(dtype, clock)
    for _ in range(args.repeats):
        best = {live: min(seconds, _timed(lambda live=live: step(live), clock)) for live, seconds in best.items()}
    peak = max(peak, peak_gflops(dtype, clock))
    work = work_of((len(t.prompt_ids), [len(c) for c in t.completion_ids]) for t in trees)
    needed = {live: flops(SHAPE, work, reference_runs=live, lora_rank=args.lora) for live in best}
    share = {live: needed[live] / best[live] / 1e9 / peak for live in best}
    sizes = ", ".join(str(b.tokens) for b in batches)
    print(
        f"{args.dtype}, {args.threads} thread(s), kernels {args.kernels}, passes of {sizes} tokens, at most {at_once} at once"
    )
    print(
        f"peak {peak:.0f} GFLOP/s; live reference: {best[True]:.2f} s, {share[True]:.1%} of peak; "
        f"cached reference: {best[False]:.2f} s, {share[False]:.1%} of peak"
    )


if __name__ == "__main__":
    main()
