"""GKD: the divergence against a dense float64 computation, the share of on-policy answers, unsuitable teachers, and resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_tree, tiny_model
from steps import step_gradient, train_until_killed
from tiny import polite_rows, tiny_model_folder, write_jsonl

from penchant import api
from penchant.algorithms.gkd import GKD, GKDConfig
from penchant.algorithms.rollouts import Writer
from penchant.data.packing import pack
from penchant.errors import ConfigError
from penchant.logprobs import Scorer
from penchant.logprobs.reference import LiveReference
from penchant.types import TokenTree

TREES = [make_tree(i, 3 + i, (2 + 2 * i,)) for i in range(4)]


def gkd(**config: Any) -> GKD:
    settings = GKDConfig.model_validate({"name": "gkd", "lambda": 0.0, **config})
    scorer, teacher = (Scorer(tiny_model("llama", seed=s), "shared", temperature=settings.temperature) for s in (0, 1))
    writer = Writer(scorer.model, None, None, settings, 7)
    return GKD(scorer, LiveReference(teacher), writer, settings)


def dense(student: Any, teacher: Any, tree: TokenTree, config: GKDConfig) -> torch.Tensor:
    """The papers' sums over full distributions, from the models' own logits."""
    ids = torch.tensor([[*tree.prompt_ids.tolist(), *tree.completion_ids[0].tolist()]])
    at = slice(len(tree.prompt_ids) - 1, -1)
    p, q = (
        torch.softmax(m(input_ids=ids, use_cache=False).logits[0, at] / config.temperature, -1)
        for m in (student, teacher)
    )
    kl = lambda a, b: (a * (a / b).log()).sum(-1)  # noqa: E731
    if config.divergence != "jsd":
        return kl(q, p) if config.divergence == "forward_kl" else kl(p, q)
    m = config.beta * q + (1 - config.beta) * p
    return config.beta * kl(q, m) + (1 - config.beta) * kl(p, m)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"beta": 0.1, "temperature": 0.7},
        {"beta": 0.9},
        {"divergence": "forward_kl", "temperature": 1.5},
        {"divergence": "reverse_kl"},
    ],
    ids=str,
)
def test_loss_and_gradient_are_the_dense_ones(config: dict[str, Any]) -> None:
    algorithm = gkd(**config)
    student, teacher = algorithm.scorer.model, algorithm.teacher.scorer.model
    got = [step_gradient(algorithm, TREES, sizes) for sizes in ([4], [1, 3])]
    assert not any(p.grad is not None and p.grad.any() for p in teacher.parameters())
    student.zero_grad()
    with torch.enable_grad():
        tokens = torch.cat([dense(student, teacher, t, algorithm.config) for t in TREES])
    tokens.mean().backward()
    expected = torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])
    assert all((g - expected).norm() <= 1e-8 * expected.norm() for g in got)
    algorithm.begin_step(0, 0.0, TREES)
    out = algorithm.loss(algorithm.score(pack(TREES)))
    assert out.weights is not None
    assert float(out.losses.sum() / out.weights.sum()) == pytest.approx(float(tokens.mean()), rel=1e-9)


def test_a_teacher_equal_to_its_student_teaches_nothing() -> None:
    algorithm = gkd()
    algorithm.teacher = LiveReference(algorithm.scorer)
    out = algorithm.loss(algorithm.score(pack(TREES)))
    assert out.losses.abs().max() < 1e-12


def test_rows_that_only_the_teachers_head_has_are_left_out() -> None:
    algorithm = gkd(divergence="forward_kl")
    whole = algorithm.loss(algorithm.score(pack(TREES))).losses
    head = algorithm.teacher.scorer.model.get_output_embeddings()
    rows = head.weight.shape[0]
    more = torch.nn.Linear(head.in_features, rows + 5, bias=False, dtype=head.weight.dtype)
    with torch.no_grad():
        more.weight[:rows] = head.weight
    algorithm.teacher.scorer.model.set_output_embeddings(more)
    algorithm.rows = rows
    assert torch.allclose(algorithm.loss(algorithm.score(pack(TREES))).losses, whole, rtol=1e-12)


def test_so_many_rows_are_answered_by_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm = gkd(**{"lambda": 0.6})

    def written(_self: Writer, prompts: Any, iteration: int, samples: int) -> Any:
        assert samples == 1
        return [make_tree(t.row, len(t.prompt_ids), (1,)) for t in prompts], [], 0

    monkeypatch.setattr(Writer, "written", written)
    counts = []
    for step in range(60):
        found = algorithm.begin_step(step, 0.0, TREES)
        assert [t.row for t in found] == [t.row for t in TREES]
        counts.append(sum(len(t.completion_ids[0]) == 1 for t in found))
        assert algorithm.step_values()["gkd/on_policy"] == counts[-1] / 4
    assert set(counts) == {2, 3} and 2.2 < sum(counts) / 60 < 2.6


@pytest.fixture
def base(tmp_path: Path) -> dict[str, Any]:
    rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in polite_rows(12)]
    return {
        "model": {"path": tiny_model_folder(tmp_path / "model"), "dtype": "fp32"},
        "teacher": {"path": tiny_model_folder(tmp_path / "teacher", seed=1)},
        "data": {"path": write_jsonl(tmp_path / "rows.jsonl", rows), "validation_rows": 4, "max_length": 96},
        "algorithm": {"name": "gkd", "max_new_tokens": 8},
        "train": {"epochs": 4, "batch_size": 4, "tokens_per_step": 300, "lr": 1e-2, "warmup_fraction": 0.0},
        "evaluation": {"samples": 0, "kl_prompts": 0},
        "checkpoint": {"every": 3},
        "output": str(tmp_path / "run"),
    }


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_run_comes_nearer_to_its_teacher_and_goes_on_exactly(
    base: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    base["algorithm"]["lambda"] = share
    whole = api.train(base, quiet=True)
    assert whole.after["eval/loss"] < 0.9 * whole.before["eval/loss"]
    base["output"] = str(tmp_path / "killed")
    train_until_killed(base, 3, monkeypatch)
    resumed = api.train(base, quiet=True)
    assert (resumed.folder / "metrics.jsonl").read_bytes() == (whole.folder / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    "change,what",
    [
        ({"teacher": None}, "gkd has no teacher"),
        ({"algorithm": None, "loss": "sft"}, "teacher: is only for algorithm gkd"),
        ({"reference": {"path": "elsewhere"}}, "teacher.path: and reference.path are both set"),
        ({"reference": {"ema": 0.9}}, "is the teacher"),
        ({"reference": {"kind": "cached"}}, "a cache does not hold what gkd needs"),
        ({"rollout": {"lag": 1}}, "rollout.lag has no effect with gkd"),
        ({"reward": "words"}, "takes none"),
        ({"weight": "counts"}, "data.weight.*gkd, which does not weight rows"),
    ],
    ids=str,
)
def test_mistakes_are_answered_with_a_sentence(base: dict[str, Any], change: dict[str, Any], what: str) -> None:
    if "weight" in change:
        rows = [{"prompt": f"p{i}", "completion": "c", "counts": 1 + i % 2} for i in range(12)]
        change = {"data": {**base["data"], **change, "path": write_jsonl(Path(base["data"]["path"]), rows)}}
    wanted = {k: v for k, v in {**base, **change}.items() if v is not None}
    with pytest.raises(ConfigError, match=what):
        api.train(wanted, quiet=True)


def test_a_teacher_with_another_tokenizer_is_refused(base: dict[str, Any], tmp_path: Path) -> None:
    base["teacher"] = tiny_model_folder(tmp_path / "other", bos=False)
    with pytest.raises(ConfigError, match="another tokenizer than"):
        api.train(base, quiet=True)
    base["teacher"] = tiny_model_folder(tmp_path / "chat", chat=True)  # the ids are the same
    base["train"]["max_steps"] = 1
    assert api.train(base, quiet=True).steps == 1
