"""Elementwise pieces of the CPU fast path, each with its backward, in row tiles that stay in the processor's cache.

Half-precision inputs are worked on in fp32 inside a tile; fp32 and fp64 as they are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_TILE_ELEMENTS = 1 << 17  # numbers per tile: a few fp32 temporaries of this size fit the L2 cache of two cores


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def store_grad(param: Tensor, grad: Tensor) -> Tensor | None:
    """Add a gradient to `param.main_grad` and return None, or return it for autograd where there is no such buffer."""
    main = getattr(param, "main_grad", None)
    if main is None:
        return grad.to(param.dtype)
    main.add_(grad)
    return None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``x r w`` with ``r = (mean(x^2) + eps)^(-1/2)`` over the last dimension.

    Returns:
        The normed tensor in x's type, and r (..., 1) in fp32 (fp64 for fp64).
    """
    out, rstd = torch.ops.aten._fused_rms_norm(x, [x.shape[-1]], weight, eps)
    return out, rstd


def rms_norm_backward(
    grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of `rms_norm` with respect to x (plus `residual`, the gradient that went around the norm) and to weight.

    ``dx = r w g - x r^3 mean(g x w) + residual``, ``dw = sum over rows of g x r``.
    """
    d = x.shape[-1]
    shape, wide = x.shape, _wide(x.dtype)
    if x.ndim != 2:
        x, grad, rstd = x.reshape(-1, d), grad.reshape(-1, d), rstd.reshape(-1, 1)
    w = weight.detach().to(wide)
    dx = torch.empty_like(x)
    dw = torch.zeros(d, dtype=wide, device=x.device)
    step = max(1, _TILE_ELEMENTS // d)
    for i in range(0, x.shape[0], step):
        rows = slice(i, i + step)
        xt, gt, r = x[rows].to(wide), grad[rows].to(wide), rstd[rows]
        gx = gt * xt
        dw.addmv_(gx.t(), r.squeeze(1))
        mean = torch.mv(gx, w).div_(d).unsqueeze(1)
        out = gt.mul(w).mul_(r).addcmul_(xt, mean * r**3, value=-1)
        if residual is not None:
            out.add_(residual[rows])
        dx[rows] = out
    return dx.view(shape), dw


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
    """``silu(g) * u`` for two contiguous tensors of one shape (T, m)."""
    out = torch.empty_like(gate)
    step = max(1, _TILE_ELEMENTS // gate.shape[1])
    for i in range(0, gate.shape[0], step):
        rows = slice(i, i + step)
        torch.mul(F.silu(gate[rows]), up[rows], out=out[rows])
    return out


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `swiglu` with respect to g and u, and its output computed again; `grad`'s storage is reused for dg.

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
