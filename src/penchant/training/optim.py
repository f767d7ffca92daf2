"""AdamW on fp32 master weights, clipping, and the learning-rate schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from penchant.base.lanes import side_by_side
from penchant.distributed.shard import full, is_sharded, local

_NORM_ELEMENTS = 1 << 22  # numbers of a gradient that one thread takes at a time


def learning_rate(step: int, total: int, peak: float, schedule: str, warmup_fraction: float, floor: float) -> float:
    """The learning rate of optimizer step `step` (0-based) of `total`.

    Warm-up: ``peak * (step + 1) / (w + 1)`` over the first ``w = round(warmup_fraction * total)`` steps; then, with
    ``t = (step - w) / max(1, total - w)``: constant ``peak``; linear ``peak (floor + (1 - floor) (1 - t))``;
    cosine ``peak (floor + (1 - floor) (1 + cos(pi t)) / 2)``.

    Args:
        peak: the highest rate; floor: the last rate as a fraction of it.
    """
    warmup = round(warmup_fraction * total)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    t = min(1.0, (step - warmup) / max(1, total - warmup))
    shapes = {"constant": 1.0, "linear": 1.0 - t, "cosine": 0.5 * (1.0 + math.cos(math.pi * t))}
    if schedule == "constant":
        return peak
    return peak * (floor + (1.0 - floor) * shapes[schedule])


class MasterAdamW:
    """AdamW (fused) on fp32 copies of the trainable parameters; fp32 and fp64 parameters are their own master.

    A bf16 parameter is a shadow: its gradient is added to an fp32 buffer, `param.main_grad`, as soon as it exists (so that
    micro-batches are summed in fp32 and no bf16 gradient stays alive); after each step the shadow is rewritten from its
    master. Matrices decay, vectors (norms, biases) do not.

    Args:
        rate_of: by a parameter's name, its learning rate as a multiple of the step's.

    Paper: arXiv 1711.05101.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        dtype: torch.dtype,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        rate_of: Callable[[str], float] = lambda _: 1.0,
    ) -> None:
        self.params = {name: p for name, p in named if p.requires_grad}
        self.masters: dict[str, Tensor] = {}
        self._hooks = []
        for name, p in self.params.items():
            shadow = dtype in (torch.bfloat16, torch.float16)
            master = p.detach().float().clone() if shadow else p
            if shadow:
                p.data = p.data.to(dtype)  # the master keeps what the file said, to the last bit
                p.main_grad = torch.zeros_like(master)  # type: ignore[attr-defined]
                master.grad = p.main_grad  # type: ignore[attr-defined]
                self._hooks.append(p.register_post_accumulate_grad_hook(_add_to_main_grad))
            self.masters[name] = master
        alike: dict[tuple[bool, float], list[Tensor]] = {}
        for name, master in self.masters.items():
            alike.setdefault((master.ndim < 2, rate_of(name)), []).append(master)
        groups = [
            {"params": masters, "weight_decay": 0.0 if vectors else weight_decay, "rate": rate}
            for (vectors, rate), masters in sorted(alike.items(), key=lambda g: g[0])
        ]
        self._adam = torch.optim.AdamW(groups, betas=betas, eps=eps, lr=0.0, fused=True)

    def clip(self, max_norm: float | None) -> Tensor:
        """Scale gradients to at most `max_norm` in L2 norm; returns the norm before, which is not read here."""
        grads = [m.grad for m in self.masters.values() if m.grad is not None]
        norm = _norm(grads)
        # the CPU looks first and spares itself a pass; a GPU would be waited for
        if max_norm is not None and (norm.device.type != "cpu" or bool(norm > max_norm)):
            torch._foreach_mul_([local(g) for g in grads], (max_norm / norm).clamp(max=1.0))
        return norm

    def step(self, lr: float) -> None:
        """One AdamW step at rate `lr`, then the shadows are rewritten and the gradients zeroed."""
        for group in self._adam.param_groups:
            group["lr"] = lr * group["rate"]
        self._adam.step()
        shadows = self._shadows()
        if shadows:
            torch._foreach_copy_([p.data for p, _ in shadows], [m for _, m in shadows])
        self.zero_grad()

    def zero_grad(self) -> None:
        for p in self.params.values():
            p.grad = None
        shadows = self._shadows()
        if shadows:
            torch._foreach_zero_([m.grad for _, m in shadows if m.grad is not None])

    def _shadows(self) -> list[tuple[Tensor, Tensor]]:
        """Parameters that are not their own master, with it."""
        return [(p, m) for p, m in zip(self.params.values(), self.masters.values(), strict=True) if p is not m]

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, by name: the weights themselves and both moments."""
        tensors: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            tensors[f"master/{name}"] = master.detach()
            state = self._adam.state.get(master, {})
            for key in ("exp_avg", "exp_avg_sq", "step"):
                if key in state:
                    tensors[f"{key}/{name}"] = state[key]
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of `state_tensors`."""
        for name, p in self.params.items():
            master = self.masters[name]
            master.data.copy_(tensors[f"master/{name}"])
            if master is not p:
                p.data.copy_(master)
            state = {
                key: tensors[f"{key}/{name}"].to(p.device, copy=True)  # `step` too: fused AdamW reads it on the device
                for key in ("exp_avg", "exp_avg_sq", "step")
                if f"{key}/{name}" in tensors
            }
            if state:
                self._adam.state[master] = state


def _norm(grads: Sequence[Tensor]) -> Tensor:
    """L2 norm of all; on a CPU in parts that do not depend on its threads, so that its bits do not either."""
    if not grads or grads[0].device.type != "cpu" or is_sharded(grads[0]):
        return full(torch.nn.utils.get_total_norm(grads))
    parts = [part for g in grads for part in g.reshape(-1).split(_NORM_ELEMENTS)]
    return torch.linalg.vector_norm(torch.stack(list(side_by_side(torch.linalg.vector_norm, parts, most=len(parts)))))


def _add_to_main_grad(p: Tensor) -> None:
    if p.grad is not None:
        p.main_grad.add_(p.grad)  # type: ignore[attr-defined]
        p.grad = None
