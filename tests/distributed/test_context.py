"""Context parallelism in fp64: one row over two processes gives the attention, gradients and runs of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_tree, tiny_model
from test_steps_together import UNCLIPPED, close, end_state, first_gradient, lines, make_loop
from worlds import in_world

from penchant.config import config_from_mapping
from penchant.config.launching import check_launch
from penchant.data.packing import pack
from penchant.distributed.context import all_tokens, my_tokens, part_of_heads, part_of_tokens
from penchant.distributed.world import World
from penchant.errors import ConfigError, ModelError
from penchant.logprobs import Scorer
from penchant.models.options import LoraConfig

LOSSES = ("dpo", "kto", "aot")  # z0 of the whole step; coupled


def gradients(root: Path, tag: str) -> dict[str, Any]:
    found = {n: first_gradient(make_loop(root / f"{tag}-{n}", n, **UNCLIPPED)) for n in LOSSES}
    lora = LoraConfig(r=2, dropout=0.0)
    found["lora"] = first_gradient(make_loop(root / f"{tag}-lora", lora=lora, gradient_checkpointing=True, **UNCLIPPED))
    return found


def run(root: Path, tag: str) -> dict[str, torch.Tensor]:
    loop = make_loop(root / f"{tag}-run", "pmpo", reference="moving")
    loop.run()
    return end_state(loop)


def pieces(world: World) -> dict[str, Any]:
    """Results that need several processes."""
    generator = torch.Generator().manual_seed(0)
    # 7 tokens of 4 heads: the last process has an empty one
    row = torch.randn(7, 4, 3, generator=generator, dtype=torch.float64)
    mine = my_tokens(torch.arange(7))
    filled = torch.cat([row, row.new_zeros(1, 4, 3)])[world.rank * 4 : world.rank * 4 + 4]
    heads = part_of_heads(filled, 7)
    back = part_of_tokens(heads)
    asked = torch.ones(4, 2, dtype=torch.float64, requires_grad=True)
    (all_tokens(asked, 7) * torch.arange(7)[:, None]).sum().backward()
    with pytest.raises(ModelError, match="is 2, and the model has 3 heads"):
        part_of_heads(torch.zeros(4, 3, 2), 7)
    seen: list[int] = []
    model = tiny_model("llama")
    model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: seen.append(out.shape[1]))
    batch = pack([make_tree(0, 11, (3, 4, 2))], shared=True)
    sums = Scorer(model, "shared").logps(batch).sums.detach()
    return {
        "ids": mine,
        "heads": heads,
        "back": back,
        "grad": asked.grad,
        "seen": seen,
        "of": batch.tokens,
        "sums": sums,
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    root = tmp_path_factory.mktemp("context")

    def two(world: World) -> dict[str, Any]:
        return {"gradients": gradients(root, "two"), "run": run(root, "two"), "pieces": pieces(world)}

    return (
        root,
        {"gradients": gradients(root, "one"), "run": run(root, "one")},
        in_world(two, root / "w", context=2),
    )


def test_tokens_and_heads_change_places_and_come_back(found: Any) -> None:
    _, _, (first, second) = found
    first, second = first["pieces"], second["pieces"]
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(7, 4, 3, generator=generator, dtype=torch.float64)
    assert torch.equal(torch.cat([first["ids"], second["ids"]]), torch.tensor([0, 1, 2, 3, 4, 5, 6, 0]))
    assert torch.equal(torch.cat([first["heads"], second["heads"]], dim=1), row)
    assert torch.equal(torch.cat([first["back"], second["back"]])[:7], row)
    # each process uses all of it, so a part's gradient is the sum of both
    assert first["grad"][:, 0].tolist() == [0, 2, 4, 6] and second["grad"][:, 0].tolist() == [8, 10, 12, 0]


def test_each_process_has_a_part_of_the_tokens_and_the_same_numbers(found: Any) -> None:
    _, _, ranks = found
    batch = pack([make_tree(0, 11, (3, 4, 2))], shared=True)
    alone = Scorer(tiny_model("llama"), "shared").logps(batch).sums
    for pieces in (r["pieces"] for r in ranks):
        assert pieces["seen"] == [-(-pieces["of"] // 2)]
        torch.testing.assert_close(pieces["sums"], alone.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_depend_on_the_row_are_refused(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    model, batch = tiny_model("llama"), pack([make_tree(0, 11, (3, 4, 2))], shared=True)
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_type": kind}
    monkeypatch.setattr("penchant.logprobs.splits", lambda: True)
    with pytest.raises(ModelError, match=f"rotary positions .{kind}. depend on how long a row is"):
        Scorer(model, "shared").hidden(batch)


def test_gradients_are_those_of_one_process(found: Any) -> None:
    _, one, ranks = found
    for rank in ranks:
        for name, gradient in one["gradients"].items():
            assert close(gradient, rank["gradients"][name]) < 1e-12, name


def test_a_run_ends_where_one_process_ends(found: Any) -> None:
    root, one, ranks = found
    for rank in ranks:
        assert close(one["run"], rank["run"]) < 1e-10
    for a, b in zip(lines(root / "one-run"), lines(root / "two-run"), strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            number = isinstance(value, (float, list))
            assert b[name] == (pytest.approx(value, rel=1e-9, abs=1e-12) if number else value), name


@pytest.mark.slow
def test_two_rows_at_a_time_of_two_processes_each(tmp_path: Path) -> None:
    four = in_world(
        lambda _w: {"g": gradients(tmp_path, "four"), "r": run(tmp_path, "four")}, tmp_path / "w", 4, context=2
    )
    one = {"g": gradients(tmp_path, "one"), "r": run(tmp_path, "one")}
    for rank in four:
        assert all(close(one["g"][n], rank["g"][n]) < 1e-12 for n in one["g"])
        assert close(one["r"], rank["r"]) < 1e-10


@pytest.mark.parametrize(
    "settings,processes,expected",
    [
        (["launch.context=3"], 4, "4 processes are not equal groups of 3"),
        (["launch.context=2"], 1, "is 2, and this is one process"),
        (["launch.context=2", "train.packing=padded"], 2, "padded rows have no part of it"),
        (["launch.context=2", "algorithm=rloo", "reward=words"], 2, "rloo samples completions"),
    ],
)
def test_what_is_refused(settings: list[str], processes: int, expected: str) -> None:
    base = {"output": "o", "model": {"path": "m"}, "data": {"path": "d", "validation_rows": 2}}
    with pytest.raises(ConfigError, match=expected):
        check_launch(config_from_mapping(base, settings), processes)
