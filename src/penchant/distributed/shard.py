"""Shard a model's parameters over all processes with torch's FSDP2: each decoder layer by itself, then the rest."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from penchant.distributed.exchange import Exchange, Gather, ReduceScatter, trim_heap
from penchant.distributed.world import World

# methods of a `Scorer` or `RewardScorer` that run the model: inside them, the parameters that no layer owns are whole
RUNS = ("hidden", "predicting", "logps", "valued", "values", "divergence", "row_logits", "rewards")
_ROOT = "_penchant_root"  # attribute of a sharded model


class Root(nn.Module):
    """Root of a sharded model. Embedding, last norm and head are whole while it runs, so everything that uses them runs inside it.

    Args:
        model: a transformers or peft model; reshards: whether its layers free their gathered weights after their forward pass.
        beside: modules that are computed from its hidden states (a value head); trims: whether freed memory goes back to the
            system between a forward pass and its backward pass. A layer's activations take part of the space
            that its gathered weights leave, so the next layer's weights need new space, and the heap is full of gaps.
    """

    def __init__(self, model: nn.Module, reshards: bool, beside: Sequence[nn.Module] = (), trims: bool = False) -> None:
        super().__init__()
        self.model, self.reshards, self.beside, self.trims = model, reshards, nn.ModuleList(beside), trims
        vars(model)[_ROOT] = self  # not registered as a submodule

    def forward(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `run`, e.g. for the log-probs of a packed batch, rewards or hidden states."""
        output = run(*args, **kwargs)
        if self.trims and torch.is_grad_enabled():
            trim_heap()
        return output


@dataclass(frozen=True, slots=True)
class Sharding:
    """How models are sharded.

    Args:
        world: the processes that take part; device: where each computes; dtype: of products (trained parameters are kept in
            fp32 or fp64); replicas: groups that each hold the whole model (HSDP); reshard: whether a layer frees its
            gathered weights after its forward pass; offload: whether shards are kept in host memory.
    """

    world: World
    device: torch.device
    dtype: torch.dtype
    replicas: int = 1
    reshard: bool = True
    offload: bool = False

    def mesh(self) -> Any:
        from torch.distributed.device_mesh import init_device_mesh

        if self.replicas > 1:
            return _replicated(self.world, self.device.type, self.replicas)
        return init_device_mesh(self.device.type, (self.world.size,), mesh_dim_names=("shard",))

    def __call__(self, model: nn.Module, backbone: nn.Module, beside: Sequence[nn.Module] = ()) -> Root:
        """Shard a model in place: each layer of its backbone, then the remaining parameters and the modules in `beside`.

        Gradients are summed over ranks, as the loop divides by counts of the whole step. A divide factor of 1 alone
        would become a product in the reduction, which gloo lacks and NCCL gets wrong in bf16 (pytorch#190747).
        """
        from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

        options: dict[str, Any] = {"mesh": self.mesh()}
        if self.offload:
            options["offload_policy"] = CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
        if self.dtype in (torch.bfloat16, torch.float16):
            options["mp_policy"] = MixedPrecisionPolicy(
                param_dtype=self.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        for layer in layers_of(backbone):
            self._cast(layer)
            fully_shard(layer, reshard_after_forward=self.reshard, **options)
        root = Root(model, self.reshard, beside, trims=self.device.type == "cpu")
        add_rows_alone(model)
        self._cast(root)
        fully_shard(root, reshard_after_forward=False, **options)
        shared = self.device.type == "cpu" and hasattr(root, "set_custom_all_gather")
        exchange = Exchange.of(self.world) if shared else None
        ranks = options["mesh"]["shard"].mesh.tolist()
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
                if exchange is not None:
                    # no prefetching: it would overwrite the vector that is still being read
                    module.set_modules_to_backward_prefetch([module])
                    module.set_custom_all_gather(cast(Any, Gather(exchange, ranks)))
                    module.set_custom_reduce_scatter(cast(Any, ReduceScatter(exchange, ranks)))
        return root

    def _cast(self, module: nn.Module) -> None:
        """Cast what is not sharded yet: trained parameters to fp32 (fp64), as shards are their own masters, and frozen ones to `dtype`."""
        for p in module.parameters():
            if p.is_floating_point() and not is_sharded(p):
                p.data = p.data.to(torch.promote_types(self.dtype, torch.float32) if p.requires_grad else self.dtype)


def add_rows_alone(model: nn.Module) -> None:
    """Add a tied embedding's gradient to the head's row by row; a separate gradient would be as large as the head's.

    As in autograd, the rows of a pass are first summed by token.
    """
    heads = {id(m.weight) for m in model.modules() if type(m) is nn.Linear}

    def hook(embedding: Any, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        weight, ids = embedding.weight, inputs[0].flatten()
        if not (out.requires_grad and weight.requires_grad):
            return out

        def add_rows(grad: Tensor) -> None:
            tokens, inverse = ids.unique(return_inverse=True)
            rows = torch.ops.aten.embedding_dense_backward(grad.flatten(0, -2), inverse, len(tokens), -1, False)
            if embedding.padding_idx is not None:
                rows.masked_fill_((tokens == embedding.padding_idx)[:, None], 0.0)
            if weight.grad is None:  # this pass did not use the head
                weight.grad = torch.zeros_like(weight)
            weight.grad.index_add_(0, tokens, rows)

        leaf = out.detach().requires_grad_()
        leaf.register_hook(add_rows)
        return leaf

    for module in model.modules():
        if type(module) is nn.Embedding and id(module.weight) in heads:
            module.register_forward_hook(hook)


@lru_cache(maxsize=1)
def _replicated(world: World, device: str, replicas: int) -> Any:
    """The HSDP mesh, shared by all models. Its groups have the run's timeout; groups that the mesh creates would have torch's."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    ranks = torch.arange(world.size).view(replicas, -1)
    groups = [dist.new_subgroups_by_enumeration(r.tolist(), timeout=world.timeout)[0] for r in (ranks.T, ranks)]
    return DeviceMesh.from_group(groups, device, ranks, mesh_dim_names=("replicate", "shard"))


def layers_of(backbone: nn.Module) -> list[nn.Module]:
    """The decoder (or encoder) layers: the `ModuleList` with the most parameters."""
    lists = [m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        return []
    largest: nn.ModuleList = max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))
    return list(largest)


class Rooted:
    """Wrapper for the scorer of a sharded model: methods that run the model run in the root's forward, all others unchanged.

    Args:
        scorer: a `Scorer` or a `RewardScorer` without a fast path; root: the root of its model.

    Raises:
        ValueError: the scorer has a fast path, which holds the parameters from before sharding: most would never get a gradient.
    """

    _scorer: Any
    root: Root

    def __init__(self, scorer: Any, root: Root) -> None:
        if scorer.fast:
            raise ValueError("a fast path was made before the model was sharded")
        self.__dict__.update(_scorer=scorer, root=root)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._scorer, name, value)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._scorer, name)
        return partial(self.through, attribute) if name in RUNS else attribute

    def through(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method that runs the model, inside the root's forward."""
        output = self.root(run, *args, **kwargs)
        if run.__name__ != "row_logits" and not torch.is_grad_enabled():
            reshard(self.root)  # no backward pass will do it, and gathered weights are outdated after the next step
        return output


def rooted(scorer: Any) -> Any:
    """Wrap the scorer of a sharded model in `Rooted`; return any other as it is."""
    root = vars(scorer.model).get(_ROOT)
    return scorer if root is None else Rooted(scorer, root)


def _sharded(module: nn.Module) -> Iterator[Any]:
    from torch.distributed.fsdp import FSDPModule

    return (m for m in module.modules() if isinstance(m, FSDPModule))


def reshard(root: nn.Module) -> None:
    """Free all gathered weights and keep only the shards."""
    for module in _sharded(root):
        module.reshard()


@contextmanager
def whole_weights(scorer: Any) -> Iterator[None]:
    """Gather all parameters on every rank, for sampling, where ranks may take different numbers of steps. No-op for a plain model."""
    if not isinstance(scorer, Rooted):
        yield
        return
    modules, root = list(_sharded(scorer.root)), scorer.root
    with torch.no_grad():
        root(tuple)  # a layer that runs before its root would make itself the root
    for module in modules:
        module.unshard()
        module.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(module is not root and root.reshards, recurse=False)
            module.reshard()


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a `DTensor`, of which this rank holds a part."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, in the same memory; a plain tensor is returned as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined,no-any-return]


def dealt_as(like: Tensor, tensor: Tensor) -> Tensor:
    """Shard a tensor, whole or sharded in any way, like `like`; if `like` is whole, return it as it is. Every rank must call this."""
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    if is_sharded(tensor):
        return tensor.redistribute(mesh, placements)  # type: ignore[attr-defined,no-any-return]
    return distribute_tensor(tensor.to(mesh.device_type), mesh, placements)


def full(tensor: Tensor) -> Tensor:
    """The whole tensor. Every rank must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined,no-any-return]


def gathered(
    named: Iterable[tuple[str, Tensor]],
    world: World,
    dtype: torch.dtype | None = None,
    uncast: Collection[str] = (),
) -> dict[str, Tensor]:
    """Gather tensors by name into rank 0's host memory, one at a time; the result is empty on other ranks.

    Args:
        dtype: floating-point tensors are cast to it, before they leave the device, except those named in `uncast`.
    """
    tensors = {}
    for name, tensor in named:
        value = full(tensor.detach())
        if world.leads:
            is_cast = value.is_floating_point() and name not in uncast
            target_dtype = dtype if dtype is not None and is_cast else value.dtype
            tensors[name] = value.to("cpu", target_dtype, copy=True)
    return tensors
