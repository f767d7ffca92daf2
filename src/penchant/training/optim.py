"""Optimizers on fp32 master weights, clipping, and the learning-rate schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from penchant.base.lanes import side_by_side
from penchant.distributed.shard import full, is_sharded, local
from penchant.models.quantize import bitsandbytes

_NORM_ELEMENTS = 1 << 22  # gradient elements per thread at a time
_HIDDEN = re.compile(r"\.\d+\.")  # parameters of a numbered layer, so not of the embedding or a head
_EIGHT_BIT = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit"}
# a parameter's optimizer state in a checkpoint, under the names that its library uses
_STATE = (
    "exp_avg",
    "exp_avg_sq",
    "step",
    "momentum_buffer",
    "row_var",
    "col_var",
    "variance",
    "state1",
    "state2",
    "absmax1",
    "absmax2",
)


def learning_rate(step: int, total: int, peak: float, schedule: str, warmup_fraction: float, floor: float) -> float:
    """The learning rate of optimizer step `step` (0-based) of `total`.

    Warm-up: ``peak * (step + 1) / (w + 1)`` over the first ``w = round(warmup_fraction * total)`` steps; then, with
    ``t = (step - w) / max(1, total - w)``: constant ``peak``; linear ``peak (floor + (1 - floor) (1 - t))``;
    cosine ``peak (floor + (1 - floor) (1 + cos(pi t)) / 2)``.

    Args:
        peak: the highest rate; floor: the final rate as a fraction of it.
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
    """AdamW (fused) or another optimizer on fp32 master copies of the trainable parameters.

    fp32 and fp64 parameters are their own master. A bf16 parameter is a shadow: its gradient is added to an fp32 buffer,
    `param.main_grad`, as soon as it is computed (so that micro-batches are summed in fp32 and no bf16 gradient stays alive);
    after each step the shadow is copied from its master. Weight decay applies to matrices, not to vectors (norms, biases).

    Args:
        kind: ``adamw``; ``adamw_8bit``, ``paged_adamw_8bit``: bitsandbytes, moments in 8 bits in blocks; ``adafactor``: torch's, with
            factored second moments; ``muon``: torch's, for the matrices within layers, with updates of AdamW's size (0.2 RMS), and
            AdamW for everything else; ``sgd``.
        betas, eps: of AdamW; momentum: of ``sgd`` (None: 0.9) and ``muon`` (None: 0.95).
        lr_scale: maps a parameter's name to its learning rate as a multiple of the step's.
        stays_wide: maps a parameter's name to whether it stays in fp32 (as its own master) whatever `dtype` is.

    Raises:
        ConfigError: bitsandbytes is not installed.

    Papers: AdamW arXiv 1711.05101; 8-bit 2110.02861; Adafactor 1804.04235; Muon 2502.16982.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        dtype: torch.dtype,
        kind: str = "adamw",
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float | None = None,
        weight_decay: float = 0.0,
        lr_scale: Callable[[str], float] = lambda _: 1.0,
        stays_wide: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self.params = {name: p for name, p in named_parameters if p.requires_grad}
        self.masters: dict[str, Tensor] = {}
        self._hooks = []
        for name, p in self.params.items():
            is_shadow = dtype in (torch.bfloat16, torch.float16) and not stays_wide(name)
            master = p.detach().float().clone() if is_shadow else p
            if is_shadow:
                p.data = p.data.to(dtype)  # the master keeps the exact values of the file
                p.main_grad = torch.zeros_like(master)  # type: ignore[attr-defined]
                master.grad = p.main_grad  # type: ignore[attr-defined]
                self._hooks.append(p.register_post_accumulate_grad_hook(_add_to_main_grad))
            self.masters[name] = master
        by_settings: dict[tuple[bool, bool, float], list[Tensor]] = {}
        for name, master in self.masters.items():
            by_settings.setdefault((_uses_muon(kind, name, master), master.ndim < 2, lr_scale(name)), []).append(master)
        groups: dict[bool, list[dict[str, Any]]] = {}
        for (hidden, no_decay, rate), masters in sorted(by_settings.items(), key=lambda g: g[0]):
            group = {"params": masters, "weight_decay": 0.0 if no_decay else weight_decay, "rate": rate}
            groups.setdefault(hidden, []).append(group)

        def make_optimizer(hidden: bool) -> torch.optim.Optimizer:
            param_groups = groups[hidden]
            if hidden:
                muon_momentum = 0.95 if momentum is None else momentum
                return torch.optim.Muon(param_groups, lr=0.0, momentum=muon_momentum, adjust_lr_fn="match_rms_adamw")
            if kind == "sgd":
                return torch.optim.SGD(param_groups, lr=0.0, momentum=0.9 if momentum is None else momentum)
            if kind == "adafactor":
                return torch.optim.Adafactor(param_groups, lr=0.0)
            adam: Any = torch.optim.AdamW
            if kind in _EIGHT_BIT:
                adam = getattr(bitsandbytes("train.optimizer", kind).optim, _EIGHT_BIT[kind])
            extra = {"fused": True} if adam is torch.optim.AdamW else {}
            optimizer: torch.optim.Optimizer = adam(param_groups, lr=0.0, betas=betas, eps=eps, **extra)
            return optimizer

        self.optimizers = [make_optimizer(hidden) for hidden in groups]

    def clip(self, max_norm: float | None) -> Tensor:
        """Scale gradients to at most `max_norm` in L2 norm; return the norm before clipping, without a GPU synchronization."""
        grads = [m.grad for m in self.masters.values() if m.grad is not None]
        norm = _norm(grads)
        # on a CPU, comparing first may save a pass; on a GPU it would synchronize
        if max_norm is not None and (norm.device.type != "cpu" or bool(norm > max_norm)):
            torch._foreach_mul_([local(g) for g in grads], (max_norm / norm).clamp(max=1.0))
        return norm

    def step(self, lr: float) -> None:
        """Take one step at learning rate `lr`, then update the shadows and zero the gradients."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group["rate"]
            optimizer.step()
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
        """(parameter, master) pairs of the parameters that are not their own master."""
        return [(p, m) for p, m in zip(self.params.values(), self.masters.values(), strict=True) if p is not m]

    def state_tensors(self) -> dict[str, Tensor]:
        """All tensors that a resumed run needs, by name: the master weights and their optimizer state."""
        tensors: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            tensors[f"master/{name}"] = master.detach()
            state: Mapping[str, Any] = next(
                (optimizer.state[master] for optimizer in self.optimizers if master in optimizer.state), {}
            )
            for key in _STATE:
                if state.get(key) is not None:
                    tensors[f"{key}/{name}"] = torch.as_tensor(state[key])  # bitsandbytes' step count is an int
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what `state_tensors` returned."""
        for name, p in self.params.items():
            master = self.masters[name]
            master.data.copy_(tensors[f"master/{name}"])
            if master is not p:
                p.data.copy_(master)
        names = {id(master): name for name, master in self.masters.items()}
        for optimizer in self.optimizers:
            for i, group in enumerate(optimizer.param_groups):
                for j, master in enumerate(group["params"]):
                    name = names[id(master)]
                    stored = {key: tensors[f"{key}/{name}"] for key in _STATE if f"{key}/{name}" in tensors}
                    if stored:
                        _restore(optimizer, (i, j), master, stored)


def state_bytes(kind: str, named: Iterable[tuple[str, Tensor]], momentum: float | None = None) -> int:
    """Bytes of optimizer state for the trained parameters, besides their masters and gradients.

    Args:
        kind, momentum: of `MasterAdamW`; named: the parameters, of which only the shapes are used.
    """
    total = 0
    for name, p in named:
        n = p.numel()
        if kind == "sgd":
            total += 4 * n * (momentum != 0.0)
        elif kind == "adafactor":
            total += 4 * (n // p.shape[-1] + n // p.shape[-2] if p.ndim > 1 else n)
        elif kind in _EIGHT_BIT and n >= 4096:
            total += 2 * n + 2 * 4 * -(-n // 256)
        else:
            total += 4 * n if _uses_muon(kind, name, p) else 8 * n
    return total


def _uses_muon(kind: str, name: str, p: Tensor) -> bool:
    return kind == "muon" and p.ndim == 2 and _HIDDEN.search(name) is not None


def _restore(part: Any, index: tuple[int, int], master: Tensor, stored: Mapping[str, Tensor]) -> None:
    """Restore the optimizer state of the parameter at `index` (group, position in the group)."""
    if hasattr(part, "init_state"):  # bitsandbytes: creates quantization tables and possibly paged memory
        part.init_state(part.param_groups[index[0]], master, *index)
        for key, value in stored.items():
            if key == "step":
                part.state[master][key] = int(value)
            else:
                part.state[master][key].copy_(value)
        return
    part.state[master] = {
        # fused AdamW reads `step` on the device, Adafactor on the host
        key: value.clone()
        if key == "step" and isinstance(part, torch.optim.Adafactor)
        else value.to(master.device, copy=True)
        for key, value in stored.items()
    }


def _norm(grads: Sequence[Tensor]) -> Tensor:
    """L2 norm of all gradients; on a CPU in fixed chunks, so that its bits do not depend on the number of threads."""
    if not grads or grads[0].device.type != "cpu" or is_sharded(grads[0]):
        return full(torch.nn.utils.get_total_norm(grads))
    parts = [part for g in grads for part in g.reshape(-1).split(_NORM_ELEMENTS)]
    return torch.linalg.vector_norm(torch.stack(list(side_by_side(torch.linalg.vector_norm, parts, most=len(parts)))))


def _add_to_main_grad(p: Tensor) -> None:
    if p.grad is not None:
        p.main_grad.add_(p.grad)  # type: ignore[attr-defined]
        p.grad = None
