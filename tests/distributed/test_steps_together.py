"""One process and two take the same steps in fp64: gradients, metrics, checkpoints and resumed runs."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import evaluate_heldout, make_tree, mixture_of_experts, some_pairs, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from steps import small_loop
from worlds import in_world

from penchant.algorithms.offline import Component, Offline
from penchant.algorithms.ppo import PPO, PPOConfig
from penchant.algorithms.rollouts import Group
from penchant.data.packing import plan_for_ranks
from penchant.distributed.shard import Root, Rooted, Sharding, full, rooted, whole_weights
from penchant.distributed.world import World, current
from penchant.errors import CheckpointError, DiskError, TrainingStopped
from penchant.logprobs import Scorer
from penchant.logprobs.reference import LiveReference, MovingReference, adapter_as_it_is
from penchant.losses import LOSSES
from penchant.models.load import backbone_of, cast_parameters
from penchant.models.lora import add_lora, effective_weights
from penchant.models.options import LoraConfig
from penchant.models.reward import ValueModel
from penchant.models.router import router_loss
from penchant.training import checkpoint as checkpoints
from penchant.training.callbacks import Callback, Callbacks
from penchant.training.checkpoint import load_checkpoint
from penchant.training.loop import Loop, Paused
from penchant.training.optim import MasterAdamW
from penchant.training.options import CheckpointConfig, EvalConfig
from penchant.types import TokenTree

# on pairs, on tokens; z0 of the whole step; coupled; labeled answers
LOSS_NAMES = ("dpo", "sft", "kto", "aot", "pmpo")

# whole runs of a few steps
RUNS: dict[str, dict[str, Any]] = {
    "dpo": {},
    "kto": {"name": "kto"},
    "sgd": {"optimizer_kind": "sgd", "max_steps": 3},
    "offload": {"offload": True},
    "muon": {"optimizer_kind": "muon"},
    "moving": {"name": "pmpo", "reference": "moving"},  # with the divergence over the whole vocabulary
    "adapter": {"lora": LoraConfig(r=2, dropout=0.0, dora=True), "reference": "as it was"},
    "moving-adapter": {"lora": LoraConfig(r=2, dropout=0.0, dora=True), "reference": "moving"},
    "ppo": {"ppo": "head", "max_steps": 4},
    "ppo-separate": {"ppo": "separate", "max_steps": 4},
}
RESUMED = ("dpo", "sgd", "muon", "moving", "ppo", "ppo-separate")
ROUNDED = {"muon": 1e-2}  # its matmuls are in bf16

UNCLIPPED: dict[str, Any] = {"max_grad_norm": None}  # clipping would hide a wrong factor


def scorer_of(model: Any, dtype: torch.dtype, replicas: int = 1, beside: Any = (), offload: bool = False) -> Any:
    scorer = Scorer(model, "shared")
    if not current().many:
        return scorer
    Sharding(current(), torch.device("cpu"), dtype, replicas, offload=offload)(model, backbone_of(model), beside)
    return rooted(scorer)


class Fixed:
    """A writer that always returns the same completions, with rewards."""

    seed = 0

    def write(self, prompts: Any, iteration: int, samples: Any = None) -> list[Group]:
        trees = [make_tree(i, 1 + i, (3 + i % 3, 5, 1), seed=iteration) for i in range(5)]
        return [Group(t, torch.tensor([1.0, -0.5, 0.1 * t.row], dtype=torch.float64)) for t in trees]


def ppo_of(model: Any, frozen: Any, value: str, dtype: torch.dtype) -> tuple[PPO, ValueModel]:
    config = PPOConfig(name="ppo", value=value, max_new_tokens=6, epochs=1, minibatches=2, temperature=1.0, beta=0.3)  # type: ignore[arg-type]
    torch.manual_seed(3)
    made = ValueModel(32, tiny_model("llama", dtype=dtype, seed=2) if value == "separate" else None).to(dtype)
    torch.nn.init.normal_(made.head.weight, std=0.3)
    own = made.backbone
    scorer = scorer_of(model, dtype, beside=[made] if own is None else ())
    of_value = None if own is None else scorer_of(own, dtype, beside=[made.head])
    return PPO(scorer, LiveReference(scorer_of(frozen, dtype)), Fixed(), config, 40, made.head, of_value), made  # type: ignore[arg-type]


def make_loop(
    folder: Path,
    name: str = "dpo",
    *,
    dtype: torch.dtype = torch.float64,
    lora: LoraConfig | None = None,
    replicas: int = 1,
    reference: str = "frozen",
    ppo: str | None = None,
    experts: bool = False,
    optimizer_kind: str = "adamw",
    offload: bool = False,
    background: bool = False,
    **train: Any,
) -> Loop:
    folder.mkdir(parents=True, exist_ok=True)
    model, frozen = (tiny_model("smollm-tied", dtype=dtype, seed=seed) for seed in (0, 1))
    model = mixture_of_experts().to(dtype) if experts else model
    if lora is not None:
        model = add_lora(model, lora, 0)
        cast_parameters(model, dtype)
        for n, p in model.named_parameters():
            if "lora_B" in n:  # as if trained before
                torch.nn.init.normal_(p, std=0.1)
    frozen.requires_grad_(False)
    router = router_loss(model, "auto") if experts else None
    pairs = [replace(t, labels=(True, False)) for t in some_pairs(14)]
    algorithm: Any
    beside: list[tuple[str, Any]] = []
    if ppo is not None:
        algorithm, value = ppo_of(model, frozen, ppo, dtype)
        beside = [(f"value.{n}", p) for n, p in value.named_parameters()]
    scorer = scorer_of(model, dtype, replicas, offload=offload) if ppo is None else algorithm.scorer
    if router is not None:
        plain = getattr(scorer, "_scorer", scorer)
        plain.router, router.run = router, scorer.hidden
    optimizer = MasterAdamW([*model.named_parameters(), *beside], dtype=dtype, kind=optimizer_kind)
    if ppo is None:
        held = (
            adapter_as_it_is(scorer)
            if reference == "as it was"
            else LiveReference(scorer_of(frozen, dtype, replicas, offload=offload))
        )
        if reference == "moving":
            policy = lambda: effective_weights(model, optimizer.masters)  # noqa: E731
            held = MovingReference(held.scorer, policy=policy, every=2, mixup=0.5)
        other = {
            t.row: TokenTree(100 + t.row, t.prompt_ids, (pairs[t.row - 1].completion_ids[0],), (False,)) for t in pairs
        }
        algorithm = Offline(
            scorer,
            [Component(LOSSES[name], LOSSES[name].params())],
            held if "reference" in LOSSES[name].needs else None,
            mismatched=other,
            tokens_per_step=40,
        )
    settings = dict(epochs=2.0, batch_size=5, tokens_per_step=40, lr=1e-2, max_grad_norm=0.5) | train
    return small_loop(
        algorithm,
        optimizer,
        pairs[:10],
        settings,
        folder,
        model=model,
        evaluation=EvalConfig(every=2),
        checkpoint=CheckpointConfig(every=2, keep_last=9),
        write_model=lambda: lambda f: f.mkdir() if current().leads else None,
        evaluate=None if ppo is not None else lambda _step: evaluate_heldout(algorithm, pairs[10:], 40),
        router=router,
        updates=1 if ppo is None else 2,
        background=background,
    )


def first_gradient(loop: Loop) -> dict[str, torch.Tensor]:
    """Unsharded gradient of the first step, by plain parameter names."""
    found: dict[str, torch.Tensor] = {}

    def keep(lr: float) -> None:
        found.update({n: full(p.grad).clone() for n, p in loop.optimizer.params.items() if p.grad is not None})
        loop.optimizer.zero_grad()

    loop.optimizer.step = keep  # type: ignore[method-assign]
    loop.take_step(0, loop.schedule)
    return found


def end_state(loop: Loop) -> dict[str, torch.Tensor]:
    """Unsharded tensors of everything that a resumed run needs."""
    return {n: full(t).clone() for n, t in (loop.optimizer.state_tensors() | loop.algorithm.state_tensors()).items()}


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def both(root: Path, tag: str) -> dict[str, Any]:
    """Everything that is compared, computed by any number of processes, as seen by one rank."""
    found: dict[str, Any] = {}
    for name in LOSS_NAMES:
        found[f"gradient of {name}"] = first_gradient(make_loop(root / f"{tag}-gradient-{name}", name, **UNCLIPPED))
    lora = LoraConfig(r=2, dropout=0.0)
    found["gradient of lora"] = first_gradient(make_loop(root / f"{tag}-gradient-lora", lora=lora, **UNCLIPPED))
    found["gradient of experts"] = first_gradient(
        make_loop(root / f"{tag}-experts", experts=True, dtype=torch.float32, **UNCLIPPED)
    )
    found["gradient of one row"] = first_gradient(make_loop(root / f"{tag}-one", batch_size=1, **UNCLIPPED))
    found["gradient of replicas"] = first_gradient(make_loop(root / f"{tag}-replicas", replicas=2, **UNCLIPPED))
    for name, how in RUNS.items():
        loop = make_loop(root / f"{tag}-{name}", **how)
        loop.run()
        found[f"end of {name}"] = end_state(loop)
    return found


def keep_until_step_2(run: Path, copy: Path) -> None:
    """Copy a run without its later checkpoints, as if it had been killed. The copy's log goes on beyond step 2."""
    shutil.copytree(run, copy)
    for checkpoint in (copy / "checkpoints").iterdir():
        if checkpoint.name != "step-2":
            shutil.rmtree(checkpoint)


class StopAtCheckpoint(Callback):
    def on_checkpoint(self, step: int, folder: Path) -> str:
        return "stop"


class Told(Callback):
    """``{checkpoint's step: step that training had reached}``."""

    def __init__(self, loop: Loop) -> None:
        self.loop, self.steps = loop, dict[int, int]()

    def on_checkpoint(self, step: int, folder: Path) -> None:
        assert (folder / "manifest.json").exists()
        self.steps[step] = self.loop.state.step


def in_the_background(root: Path) -> dict[str, Any]:
    """A run that keeps training during slow writes, and one whose rank 1 runs out of disk space meanwhile."""
    numbered, found = checkpoints._assign_files, dict[str, Any]()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "_assign_files", lambda *of: (time.sleep(0.5), numbered(*of))[1])
        loop = make_loop(root / "two-background", background=True)
        told = Told(loop)
        loop.callbacks = Callbacks([told] if current().leads else [])
        loop.run()
        found["told"] = told.steps

        def full_disk(path: Path) -> None:
            if not current().leads:
                raise OSError(28, "No space left on device")

        patch.setattr(checkpoints, "fsync", full_disk)
        loop = make_loop(root / "two-full", background=True)
        with pytest.raises(DiskError, match="No space left"):
            loop.run()
        found["failed after"] = loop.state.step
    return found


def loaded(checkpoint: Path, loop: Loop | None = None) -> dict[str, torch.Tensor]:
    """A checkpoint's unsharded tensors, read by one process or by several."""
    tensors, _ = load_checkpoint(checkpoint, None if loop is None else loop.optimizer.masters)
    return {name: full(tensor).clone() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[dict[str, Any]]]:
    """(folder of all runs, results of one process, results of each of two)."""
    root = tmp_path_factory.mktemp("together")

    def two(world: World) -> dict[str, Any]:
        checkpoints.FILE_BYTES = 1 << 16  # so that a rank writes several files; this process is not reused
        found = both(root, "two")
        for name in reversed(RESUMED):
            if world.leads:
                keep_until_step_2(root / f"two-{name}", root / f"two-resumed-{name}")
            world.agree()
            resumed = make_loop(root / f"two-resumed-{name}", **RUNS[name])
            resumed.run()
            found[f"resumed {name}"] = end_state(resumed)
        found |= in_the_background(root)
        stopped = make_loop(root / "two-stopped")
        stopped.callbacks = Callbacks([StopAtCheckpoint()] if world.leads else [])
        with pytest.raises(Paused) as pause:
            stopped.run()
        found["stopped at"] = pause.value.step
        odd = make_loop(root / "two-odd")
        odd.algorithm.begin_step = lambda step, progress, trees: trees[world.rank :]
        with pytest.raises(TrainingStopped, match="the processes have different rows for this step"):
            odd.take_step(0, odd.schedule)
        resumed._seed(3, 2)
        found["drawn"] = torch.rand(4)
        root_of = resumed.algorithm.scorer.root
        found["through"] = [type(g._all_gather_comm).__name__ for g in root_of._get_fsdp_state()._fsdp_param_groups]
        mesh = Sharding(world, torch.device("cpu"), torch.float64, replicas=2).mesh()
        waits = (mesh.get_group(name)._get_backend(torch.device("cpu")).options for name in ("replicate", "shard"))
        found["replicas wait"] = [options._timeout for options in waits]
        found["all wait"] = world.timeout
        found["fast"] = [Scorer(resumed.model, "shared", "auto").fast]
        with whole_weights(resumed.algorithm.scorer):
            found["fast"].append(Scorer(resumed.model, "shared", "auto").fast)
            found["whole"] = {n: p.detach().clone() for n, p in root_of.model.named_parameters()}
        found["two's, loaded"] = loaded(root / "two-dpo/checkpoints/step-2", resumed)
        found["one's, loaded"] = loaded(root / "one-dpo/checkpoints/step-2", resumed)
        return found

    one = both(root, "one")
    return root, one, in_world(two, root / "ranks")


def close(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> float:
    """Largest difference, relative to the largest value."""
    assert a.keys() == b.keys() and a
    size = max(float(t.abs().max()) for t in a.values() if t.is_floating_point())
    return max(float((a[n].double() - b[n].double()).abs().max()) for n in a) / size


@pytest.mark.parametrize("what", [*LOSS_NAMES, "lora", "experts", "one row", "replicas"])
def test_two_processes_have_the_gradient_of_one(results: Any, what: str) -> None:
    _, one, (first, second) = results
    mine, theirs = one[f"gradient of {what}"], first[f"gradient of {what}"]
    assert all(torch.equal(theirs[n], second[f"gradient of {what}"][n]) for n in theirs)
    assert max(float(g.abs().max()) for g in mine.values()) > 1e-4
    assert close(mine, theirs) < (1e-5 if what == "experts" else 1e-12)  # experts' matmuls are in fp32


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_take_the_steps_of_one(results: Any, name: str) -> None:
    root, one, (first, _) = results
    rounded = ROUNDED.get(name, 1e-10)
    assert close(one[f"end of {name}"], first[f"end of {name}"]) < rounded
    mine, theirs = lines(root / f"one-{name}"), lines(root / f"two-{name}")
    assert len(mine) == len(theirs) and {row["kind"] for row in mine} == {"train", *([] if "ppo" in name else ["eval"])}
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            tolerance = {"rel": rounded, "abs": rounded if name in ROUNDED else 1e-12}
            number = isinstance(value, float | list)
            assert b[key] == (pytest.approx(value, **tolerance) if number else value)


@pytest.mark.parametrize("name", RESUMED)
def test_what_two_processes_resume_ends_bit_for_bit_where_an_uninterrupted_run_does(results: Any, name: str) -> None:
    root, _, (first, second) = results
    whole, resumed = first[f"end of {name}"], first[f"resumed {name}"]
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[n], resumed[n]) for n in whole)
    assert all(torch.equal(resumed[n], second[f"resumed {name}"][n]) for n in resumed)
    logs = [(root / f"two-{way}{name}/metrics.jsonl").read_bytes() for way in ("", "resumed-")]
    assert logs[0] == logs[1]


def test_references_and_values_move(results: Any) -> None:
    """The states compared above do change during training."""
    _, one, _ = results
    for name, which in (("moving", "reference/"), ("moving-adapter", "reference/"), ("ppo", "master/value.")):
        root_state = one[f"end of {name}"]
        assert [n for n in root_state if n.startswith(which)], name
    assert float(one["end of ppo"]["exp_avg/value.head.weight"].abs().max()) > 0
    assert float(one["end of ppo-separate"]["exp_avg/value.backbone.model.norm.weight"].abs().max()) > 0


def test_a_checkpoint_is_read_by_another_number_of_processes(results: Any, tmp_path: Path) -> None:
    root, _, (first, second) = results
    for name, checkpoint in (("two's, loaded", "two-dpo"), ("one's, loaded", "one-dpo")):
        mine = loaded(root / checkpoint / "checkpoints/step-2")
        for theirs in (first[name], second[name]):
            assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
    # one process resumes from a checkpoint of two
    keep_until_step_2(root / "two-dpo", tmp_path / "run")
    loop = make_loop(tmp_path / "run")
    loop.run()
    assert close(end_state(loop), first["end of dpo"]) < 1e-10


def test_each_rank_writes_its_own_shard_and_every_file_has_a_sum(results: Any) -> None:
    root, *_ = results
    checkpoint = root / "two-dpo/checkpoints/step-4"
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    shards = sorted(p.name for p in (checkpoint / "state").iterdir())
    assert {name[:11] for name in shards} == {"shard-00001", "shard-00002"}
    assert manifest["sha256"].keys() == {"state.json", *(f"state/{name}" for name in shards)}
    assert not list(checkpoint.rglob("*metadata*"))  # DCP's own is a pickle
    damaged = checkpoint / "state" / shards[-1]
    before = damaged.read_bytes()
    damaged.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="shard-00002"):
        load_checkpoint(checkpoint)
    damaged.write_bytes(before)


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 80), st.integers(1, 8))
def test_every_rank_has_as_many_passes_and_every_tree_is_in_one(sizes: list[int], budget: int, ranks: int) -> None:
    plan = plan_for_ranks(sizes, budget, ranks)
    assert len(plan) % ranks == 0
    assert sorted(i for members in plan for i in members) == list(range(len(sizes)))
    loads = [sum(sizes[i] for i in members) for members in plan]
    assert all(load <= max(budget, max(sizes, default=0)) for load in loads)
    assert loads == sorted(loads, reverse=True)  # ranks wait for the slowest, so passes are ordered by size


def test_a_checkpoint_that_is_written_while_training_goes_on_is_the_same(results: Any) -> None:
    root, _, found = results
    assert found[0]["told"][2] > 2 and found[0]["told"][4] == 4
    for step in (2, 4):
        mine, theirs = (loaded(root / run / f"checkpoints/step-{step}") for run in ("two-background", "two-dpo"))
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
    state = [(root / run / "checkpoints/step-2/state.json").read_text() for run in ("two-background", "two-dpo")]
    assert state[0] == state[1]


def test_what_one_rank_cannot_write_meanwhile_ends_all(results: Any) -> None:
    root, _, found = results
    assert all(rank["failed after"] > 2 for rank in found) and not list((root / "two-full/checkpoints").iterdir())


def test_a_large_shard_is_written_in_several_files(results: Any) -> None:
    """Held in memory together, they would set a run's peak."""
    root, *_ = results
    names = sorted(p.name for p in (root / "two-resumed-moving/checkpoints/step-4/state").iterdir())
    assert len(names) > 4 and {name[:11] for name in names} == {"shard-00001", "shard-00002"}


def test_dropout_differs_from_rank_to_rank(results: Any) -> None:
    _, _, (first, second) = results
    assert not torch.equal(first["drawn"], second["drawn"])


def test_a_callback_of_rank_0_stops_all_at_the_checkpoint_that_it_was_told_of(results: Any) -> None:
    _, _, found = results
    assert [rank["stopped at"] for rank in found] == [2, 2]


def test_weights_are_whole_where_completions_are_sampled(results: Any) -> None:
    _, _, found = results
    for rank in found:
        ends = {n.removeprefix("master/"): t for n, t in rank["resumed dpo"].items() if n.startswith("master/")}
        assert ends.keys() == rank["whole"].keys() and all(torch.equal(ends[n], rank["whole"][n]) for n in ends)


def test_shards_go_through_memory_on_one_machine(results: Any) -> None:
    assert all(rank["through"] == ["Gather"] for rank in results[2])


def test_replicas_wait_for_each_other_as_long_as_all_do(results: Any) -> None:
    _, _, found = results
    assert all(rank["replicas wait"] == [rank["all wait"]] * 2 for rank in found)


def test_a_fast_path_and_shards_do_not_meet(results: Any) -> None:
    """Created before sharding, it would hold the old parameters, most of which would silently never get a gradient."""
    assert [rank["fast"] for rank in results[2]] == [[False, False]] * 2
    fast = Scorer(tiny_model("llama", dtype=torch.float32), "shared", "auto")
    assert fast.fast
    with pytest.raises(ValueError, match="fast path"):
        Rooted(fast, Root(fast.model, True))
