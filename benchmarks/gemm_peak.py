"""Measure the machine's matrix-multiply peak on a model's own shapes: best sustained GFLOP/s, per precision.

python benchmarks/gemm_peak.py '{"model": "FOLDER", "threads": 2}'    # "device": "cuda" measures a GPU
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from flops import ModelShape, read_shape
from measure import wait_for

TOKENS = 2048
SQUARE = 4096
AT_ONCE = {"cpu": 1, "cuda": 50}  # products between two clock readings; each reading synchronizes the GPU


def shapes_of(model: ModelShape) -> list[tuple[int, int, int]]:
    """(m, k, n) of the products that dominate training of this model, plus a large square one."""
    d, f, v = model.width, model.ffn, model.vocab
    return [
        (TOKENS, d, d),
        (TOKENS, d, f),
        (TOKENS, d, 2 * f),
        (TOKENS, f, d),
        (d, TOKENS, f),
        (512, d, v),
        (SQUARE, SQUARE, SQUARE),
    ]


def sustained(m: int, k: int, n: int, dtype: Any, seconds: float, repetitions: int, device: str = "cpu") -> float:
    """Best GFLOP/s of x W^T over `repetitions` of at least `seconds` each, by `torch.mm` and by oneDNN.

    torch's own fp32 product is MKL's, which falls back to AVX2 on AMD processors with AVX-512.
    """
    import torch

    x = torch.randn(m, k).to(device, dtype)
    w = torch.randn(n, k).to(device, dtype)
    out = torch.empty(m, n, dtype=dtype, device=device)

    def by_onednn() -> Any:
        return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")

    products: list[Any] = [lambda: torch.mm(x, w.t(), out=out)]
    with contextlib.suppress(AttributeError, RuntimeError):  # not in this build, on a GPU, or in bf16 on this CPU
        by_onednn()
        products.append(by_onednn)
    best = 0.0
    for product in products:
        product()
        wait_for(device)
        for _ in range(repetitions):
            count, started = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - started) < seconds:
                for _ in range(AT_ONCE[device]):
                    product()
                wait_for(device)
                count += AT_ONCE[device]
            best = max(best, 2.0 * m * k * n * count / elapsed / 1e9)
    return best


def main() -> None:
    import torch

    spec = json.loads(sys.argv[1])
    torch.set_num_threads(int(spec["threads"]))
    timing = (spec.get("seconds", 0.3), spec.get("repetitions", 4), spec.get("device", "cpu"))
    result: dict[str, Any] = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        by_shape = {
            "x".join(map(str, s)): round(sustained(*s, dtype, *timing), 1)
            for s in shapes_of(read_shape(Path(spec["model"])))
        }
        result[name] = {"gflops": max(by_shape.values()), "by_shape": by_shape}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
