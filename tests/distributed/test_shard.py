"""What a process holds beside its shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import some_trees, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import in_world

from penchant.data.packing import pack
from penchant.distributed import shard
from penchant.distributed.shard import Root, Sharding, add_rows_alone, full, rooted
from penchant.distributed.world import World
from penchant.logprobs import Scorer
from penchant.models.load import backbone_of


class Made(TorchDispatchMode):
    """How many tensors of a shape operations made, views and what they write in place left out."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.storages = shape, set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (
            isinstance(out, torch.Tensor)
            and out.shape == self.shape
            and not func.is_view
            and func._schema.name[-1] != "_"
        ):
            self.storages.add(out.untyped_storage().data_ptr())
        return out


def gradients_of(model: Any, padding: bool, world: World | None) -> tuple[dict[str, torch.Tensor], int]:
    """All gradients of two passes, of which the first one is without the head; how many as large as the embedding the second one made."""
    embedding = model.get_input_embeddings()
    shape, scorer = embedding.weight.shape, Scorer(model)
    trees = some_trees()
    batch = pack(trees, shared=True)
    if padding:
        embedding.padding_idx = int(batch.input_ids[0])
    if world is not None:
        Sharding(world, torch.device("cpu"), embedding.weight.dtype)(model, backbone_of(model))
        scorer = rooted(scorer)
    scorer.predicting(batch).square().sum().backward()
    loss = scorer.logps(batch).sums.sum()
    with Made(shape) as made:
        loss.backward()
    return {n: full(p.grad) for n, p in model.named_parameters()}, len(made.storages)


def of_two(world: World) -> Any:
    return [gradients_of(tiny_model("smollm-tied", dtype=torch.float64), padding, world) for padding in (False, True)]


def test_of_a_tied_embedding_one_whole_gradient_is_made_in_a_pass_and_it_is_right(tmp_path: Path) -> None:
    for padding, found in zip((False, True), zip(*in_world(of_two, tmp_path), strict=True), strict=True):
        alone, _ = gradients_of(tiny_model("smollm-tied", dtype=torch.float64), padding, None)
        for gradients, made in found:
            assert made == 1
            for name, gradient in gradients.items():
                torch.testing.assert_close(gradient, 2 * alone[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_rows_that_are_added_alone_have_the_bits_of_autograd(dtype: torch.dtype) -> None:
    batch, found = pack(some_trees(), shared=True), []
    for alone in (False, True):
        model = tiny_model("smollm-tied", dtype=dtype)
        if alone:
            add_rows_alone(model)
        Scorer(model).logps(batch).sums.sum().backward()
        found.append(model.get_input_embeddings().weight.grad)
    assert batch.input_ids.unique().numel() < batch.tokens and torch.equal(*found)


def test_freed_memory_is_returned_between_a_forward_and_its_backward_pass_and_only_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []
    monkeypatch.setattr(shard, "trim_heap", lambda: order.append("trim"))
    root = Root(torch.nn.Linear(2, 2), True, trims=True)
    root(order.append, "pass")
    assert order == ["pass", "trim"]
    order.clear()
    with torch.no_grad():  # evaluations and sampling make many small passes and keep no activations
        root(order.append, "pass")
    Root(torch.nn.Linear(2, 2), True)(order.append, "pass")  # on a GPU
    assert order == ["pass", "pass"]
