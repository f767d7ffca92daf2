"""Operations of the CPU fast path: elementwise functions with their backward, matrix products, and gradient accumulation.

Elementwise functions work in row tiles that stay in cache. Tiles of half-precision inputs are computed in fp32, others in
their own dtype.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from penchant.base.lanes import turn
from penchant.base.machine import kind_of, of_processor

_ROWS_TOGETHER = 16  # entries of embedding-row gradients that are summed at a time
_ROWS = 32  # row counts are padded to multiples of this if oneDNN is used
_TILE_ELEMENTS = 1 << 17  # values per tile: a few fp32 temporaries of this size fit in the L2 cache of two cores


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def store_grad(param: Tensor, grad: Tensor) -> Tensor | None:
    """Add a gradient to `param.main_grad`, or to `param.grad` in a training pass, and return None; else return it for autograd.

    Parallel passes add in order (`base/lanes.py`).
    """
    with turn(id(param)) as turns:
        main = getattr(param, "main_grad", None)
        if main is not None:
            main.add_(grad)
        elif turns is None:
            return grad.to(param.dtype)
        elif param.grad is None:
            param.grad = grad.to(param.dtype)
        else:
            param.grad.add_(grad)
    return None


def store_product(param: Tensor, d_out: Tensor, inputs: Tensor) -> Tensor | None:
    """`store_grad` of ``d_out^T inputs``, fused into one accumulating product if the dtypes allow it."""
    main = getattr(param, "main_grad", None)
    if d_out.dtype != (param if main is None else main).dtype:
        return store_grad(param, mm(d_out.t(), inputs))
    with turn(id(param)) as turns:
        total = param.grad if main is None and turns is not None else main
        if total is not None:
            addmm_(total, d_out.t(), inputs)
            return None
        grad = mm(d_out.t(), inputs)
        if turns is None:
            return grad
        param.grad = grad
    return None


def store_rows(param: Tensor, ids: Tensor, grad: Tensor) -> Tensor | None:
    """`store_grad` of an embedding (V, d) whose gradient is zero except for the rows `ids` (T,), with gradients (T, d).

    In a training pass the rows are added after all passes have ended: a tied head adds to the same gradient earlier in each pass.
    """
    key = (id(param), "rows")
    with turn(key) as turns:
        if turns is not None:
            if key not in turns.collected:
                turns.collected[key] = _Rows(param)
            turns.collected[key].add(ids, grad)
            return None
    main = getattr(param, "main_grad", None)
    total = torch.zeros_like(param) if main is None else main
    total.index_add_(0, ids, grad.to(total.dtype))
    return total if main is None else None


class _Rows:
    """Row gradients of an embedding, collected over passes and regularly summed by row to bound their memory."""

    def __init__(self, param: Tensor) -> None:
        self._param = param
        self._pending: list[tuple[Tensor, Tensor]] = []

    def add(self, ids: Tensor, grad: Tensor) -> None:
        self._pending.append((ids, grad.to(wide(grad.dtype))))
        if len(self._pending) == _ROWS_TOGETHER:
            all_ids, grads = (torch.cat(parts) for parts in zip(*self._pending, strict=True))
            ids, inverse = all_ids.unique(return_inverse=True)
            self._pending = [(ids, grads.new_zeros(len(ids), grads.shape[1]).index_add_(0, inverse, grads))]

    def write(self) -> None:
        total = getattr(self._param, "main_grad", None)
        if total is None:
            if self._param.grad is None:
                self._param.grad = torch.zeros_like(self._param)
            total = self._param.grad
        for ids, grad in self._pending:
            total.index_add_(0, ids, grad.to(total.dtype))


def mm(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a b + bias`` for matrices a and b."""
    if _by_onednn(a):
        out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
        return out
    return torch.mm(a, b) if bias is None else torch.addmm(bias, a, b)


def addmm(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``x + a b``."""
    return mm(a, b).add_(x) if _by_onednn(a) else torch.addmm(x, a, b)


def addmm_(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``total += a b`` in place."""
    return total.add_(mm(a, b)) if _by_onednn(a) else total.addmm_(a, b)


def mm_into(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Write ``a b`` to `out`."""
    return out.copy_(mm(a, b)) if _by_onednn(a) else torch.mm(a, b, out=out)


def more_rows(rows: int, dtype: torch.dtype) -> int:
    """Number of rows to pad a product with, so that oneDNN reuses its kernels: each new row count costs it milliseconds."""
    if dtype == torch.bfloat16:
        return -rows % _ROWS if _has_wide_onednn() else 0
    return -rows % _ROWS if dtype == torch.float32 and _fp32_by_onednn() else 0


def _by_onednn(a: Tensor) -> bool:
    return a.dtype == torch.float32 and kind_of(a.device) == "cpu" and a.numel() > 0 and _fp32_by_onednn()


@lru_cache
def _fp32_by_onednn() -> bool:
    """Whether fp32 products use oneDNN: with AVX-512, except on Intel processors if MKL is available.

    On other vendors' processors MKL only uses AVX2, at half the speed. On Intel's it is faster than oneDNN by a tenth, and by a
    third for accumulating weight gradients.
    """
    return _has_wide_onednn() and not (
        torch.backends.mkl.is_available() and of_processor("vendor_id") == "GenuineIntel"
    )


@lru_cache
def _has_wide_onednn() -> bool:
    """Whether oneDNN uses AVX-512 and this build of torch exposes its linear op."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return False
    a, b, bias = torch.arange(15.0).view(3, 5), torch.arange(20.0).view(4, 5), torch.arange(4.0)
    try:
        out = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return torch.equal(out, torch.addmm(bias, a, b.t()))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x r w`` with ``r = (mean(x^2) + eps)^(-1/2)`` over the last dimension.

    Returns:
        The normalized tensor in x's dtype, and r (..., 1) in fp32 (fp64 for fp64).
    """
    out, rstd = torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], weight, eps)
    return out, rstd


def rms_norm_backward(
    grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of `rms_norm` with respect to x (plus `residual`, the gradient that bypasses the norm) and weight.

    ``dx = r w g - x r^3 mean(g x w) + residual``, ``dw = sum over rows of g x r``.
    """
    d = x.shape[-1]
    shape, dtype = x.shape, wide(x.dtype)
    if x.ndim != 2:
        x, grad, rstd = x.reshape(-1, d), grad.reshape(-1, d), rstd.reshape(-1, 1)
    w = weight.detach().to(dtype)
    dx = torch.empty_like(x)
    dw = torch.zeros(d, dtype=dtype, device=x.device)
    step = max(1, _TILE_ELEMENTS // d)
    for i in range(0, x.shape[0], step):
        rows = slice(i, i + step)
        xt, gt, r = x[rows].to(dtype), grad[rows].to(dtype), rstd[rows]
        gx = gt * xt
        dw.addmv_(gx.t(), r.squeeze(1))
        mean = torch.mv(gx, w).div_(d).unsqueeze(1)
        out = gt.mul(w).mul_(r).addcmul_(xt, mean * r**3, value=-1)
        if residual is not None:
            out.add_(residual[rows])
        dx[rows] = out
    return dx.view(shape), dw


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def kept_bits(like: Tensor, dropout: float, draws: torch.Generator | None) -> Tensor:
    """Dropout mask for `masked`: int8 of `like`'s shape, 0 with probability `dropout` (in steps of 1/65536), else all bits set.

    Faster than `bernoulli_`, which draws one number at a time on processors other than Intel's.
    """
    numbers = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    numbers.random_(-(2**63), None, generator=draws)
    keep = numbers.view(torch.int16)[: like.numel()] >= round(dropout * 65536) - 32768
    return keep.view(torch.int8).neg_().view(like.shape)


def masked(x: Tensor, keep_mask: Tensor) -> Tensor:
    """Apply a mask from `kept_bits`: `x` where its bits are set, else 0."""
    bits = _BITS[x.element_size()]
    return (x.view(bits) & keep_mask.to(bits)).view(x.dtype)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate (T, heads, d) in place: ``x1' = x1 cos - x2 sin``, ``x2' = x2 cos + x1 sin`` for the halves x1, x2."""
    x1, x2 = x.chunk(2, dim=-1)
    rotated = (x1 * cos).addcmul_(x2, sin, value=-1)
    x2.mul_(cos).addcmul_(x1, sin)
    x1.copy_(rotated)


def rotary_backward(grad: Tensor, cos: Tensor, sin: Tensor) -> None:
    """The transposed rotation in place: ``g1' = g1 cos + g2 sin``, ``g2' = g2 cos - g1 sin``."""
    g1, g2 = grad.chunk(2, dim=-1)
    rotated = (g1 * cos).addcmul_(g2, sin)
    g2.mul_(cos).addcmul_(g1, sin, value=-1)
    g1.copy_(rotated)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(g) * u`` for contiguous g and u of shape (T, m)."""
    out = torch.empty_like(gate)
    step = max(1, _TILE_ELEMENTS // gate.shape[1])
    for i in range(0, gate.shape[0], step):
        rows = slice(i, i + step)
        torch.mul(F.silu(gate[rows]), up[rows], out=out[rows])
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `swiglu` with respect to g and u, and its recomputed output. dg reuses the storage of `grad`.

    ``du = da silu(g)``, ``dg = da u silu'(g)``, ``silu'(g) = s (1 + g (1 - s))`` with ``s = sigmoid(g)``.
    """
    d_up, out = torch.empty_like(up), torch.empty_like(up)
    step = max(1, _TILE_ELEMENTS // grad.shape[1])
    for i in range(0, grad.shape[0], step):
        rows = slice(i, i + step)
        g, u, da = gate[rows], up[rows], grad[rows]
        silu = F.silu(g)
        torch.mul(silu, u, out=out[rows])
        torch.mul(da, silu, out=d_up[rows])
        torch.ops.aten.silu_backward.grad_input(torch.mul(da, u, out=silu), g, grad_input=da)
    return grad, d_up, out
