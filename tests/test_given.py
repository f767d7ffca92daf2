"""Python objects in place of config entries, callbacks, and per-answer figures."""

from __future__ import annotations

import functools
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from tiny import polite_rows, tiny_model_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from penchant import api
from penchant.base.functions import GIVEN, python_object
from penchant.errors import CheckpointError, ConfigError, DataError
from penchant.given import function_name, named, rows_of, set_in, write_rows
from penchant.training.callbacks import Callback, Callbacks
from penchant.types import LossOutput


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


def config(model: Any, folder: Path, data: Any, **more: Any) -> dict[str, Any]:
    return {
        "model": {"path": model},
        "data": {"path": data, "validation_rows": 6},
        "loss": {"name": "dpo"},
        "train": {"batch_size": 4, "max_steps": 4, "lr": 1e-3},
        "output": str(folder),
        **more,
    }


def weights(result: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(result.model).state_dict()
    return found


class Frame:
    """The part of a pandas DataFrame's interface that we use."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.rows, self.columns = rows, list(rows[0])

    def itertuples(self, index: bool, name: None) -> Iterator[tuple[Any, ...]]:
        assert not index
        return (tuple(row.get(c, math.nan) for c in self.columns) for row in self.rows)

    def to_dict(self) -> Any:
        raise AssertionError("loses the rows' order")


def test_rows_train_the_same_model_as_their_file(model: str, tmp_path: Path) -> None:
    rows = polite_rows()
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    of_file = api.train(config(model, tmp_path / "file", str(file)), quiet=True)
    of_rows = api.train(config(model, tmp_path / "rows", rows), quiet=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(of_file).values(), weights(of_rows).values(), strict=True))
    given = json.loads((tmp_path / "rows" / "manifest.json").read_text())["given"]
    assert len(given) == 1 and (tmp_path / "rows" / "given" / given[0]).read_text() == file.read_text()
    assert "given" not in json.loads((tmp_path / "file" / "manifest.json").read_text())
    # the run folder has everything that other commands need
    assert api.evaluate(tmp_path / "rows", quiet=True)["eval/rows"] == 6.0
    with pytest.raises(CheckpointError, match="different run"):
        api.train(config(model, tmp_path / "rows", rows[1:]), quiet=True)


def test_an_argument_takes_the_place_of_a_key_of_the_file(model: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"model: {{path: {model}}}\ndata: {{path: gone.jsonl, limit: 20}}\noutput: {tmp_path / 'a'}\n")
    config = api.as_config(
        file, ("output=" + str(tmp_path / "b"),), {"data": polite_rows(), "eval_data": polite_rows(3)}
    )
    assert Path(str(config.data.path)).parent == tmp_path / "b" / "given"
    assert config.data.limit == 20 and str(config.data.path) != str(config.data.eval_path)
    config = api.as_config(
        file, ("output=" + str(tmp_path / "b"),), {"eval_data": {"a": polite_rows(3), "b": "b.jsonl"}}
    )
    assert isinstance(config.data.eval_path, dict) and config.data.eval_path["b"] == "b.jsonl"
    assert len(Path(str(config.data.eval_path["a"])).read_text().splitlines()) == 3
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("as_", [list, Frame, iter])
def test_rows_of_any_kind_of_table(as_: Any) -> None:
    rows = [{"prompt": "a", "n": 1, "list": ["x"]}, {"prompt": "b", "n": 2, "list": []}]
    assert list(rows_of(as_(rows), "data")) == rows


@pytest.mark.parametrize("library", ["pandas", "polars", "datasets", "pyarrow"])
def test_the_rows_of_a_real_table(library: str, tmp_path: Path) -> None:
    module = pytest.importorskip(library)
    call = {"function": {"name": "f", "arguments": {"a": 1}}}
    turns = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    other = {"function": {"name": "f", "arguments": {"b": None}}}
    rows = [
        {"prompt": turns[:1], "completion": turns[1:], "score": 1.5, "of": "x"},
        {"prompt": turns[:1], "completion": [{**turns[1], "tool_calls": [other]}], "score": None, "of": None},
    ]
    made = {
        "pandas": lambda: module.DataFrame(rows),
        "polars": lambda: module.DataFrame(rows),
        "datasets": lambda: module.Dataset.from_list(rows),
        "pyarrow": lambda: module.Table.from_pylist(rows),
    }[library]()
    found = [json.loads(line) for line in write_rows(made, tmp_path, "data.path").read_text().splitlines()]
    assert [(r["score"], r["of"]) for r in found] == [(1.5, "x"), (None, None)]
    assert found[0]["completion"][0]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    kept = {"b": None} if library == "pandas" else {}  # its cells hold the dicts themselves
    assert found[1]["completion"][0]["tool_calls"][0]["function"]["arguments"] == kept


@pytest.mark.parametrize("library", ["pandas", "polars", "datasets"])
def test_a_frame_trains_as_its_rows_do(library: str, model: str, tmp_path: Path) -> None:
    module, rows = pytest.importorskip(library), polite_rows()
    table = module.Dataset.from_list(rows) if library == "datasets" else module.DataFrame(rows)
    result = api.train(config(model, tmp_path / "run", table), quiet=True)
    assert result.steps == 4 and api.audit(table).to_text() == api.audit(rows).to_text()
    if library == "pandas":
        frame = result.metrics
        assert isinstance(frame, module.DataFrame) and len(frame) == len(result.rows)
        losses = [row["loss"] for row in result.rows if "loss" in row]
        assert frame["loss"].dropna().tolist() == losses and len(losses) > 0


def test_rows_with_tools_and_weights_are_read_back(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    rows = [{"prompt": "a", "completion": "b", "tools": tools, "w": w} for w in (1, 2)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = api.load_preferences(str(file), weight="w")
    again = api.load_preferences(str(write_rows(first, tmp_path, "data.path")), weight="weight")
    assert [(t.tools, t.weight) for t in again.trees] == [(t.tools, t.weight) for t in first.trees]
    assert first.trees[0].tools and first.trees[1].weight == 2


def test_a_missing_value_of_a_frame_is_null_and_arrays_are_lists(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "score": 1.5}, {"prompt": "b", "score": math.nan}]
    path = write_rows(Frame(rows), tmp_path, "data.path")
    assert [json.loads(line)["score"] for line in path.read_text().splitlines()] == [1.5, None]
    path = write_rows([{"x": np.arange(2), "y": np.float32(0.5)}], tmp_path, "data.path")
    assert json.loads(path.read_text()) == {"x": [0, 1], "y": 0.5}


def test_what_load_preferences_gives_is_read_back(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in polite_rows(5)))
    first = api.load_preferences(file)
    again = api.load_preferences(str(write_rows(first, tmp_path, "data.path")))
    assert [(t.prompt, [c.text for c in t.completions]) for t in first.trees] == [
        (t.prompt, [c.text for c in t.completions]) for t in again.trees
    ]


@pytest.mark.parametrize(
    ("rows", "names"), [([], "no rows"), ([{"a": object()}], r"\[0\].*object"), ([{"a": 1}, 3], r"\[1\].*int")]
)
def test_rows_that_are_none_are_refused_by_their_number(rows: Any, names: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=names):
        write_rows(iter(rows), tmp_path, "data.path")
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]  # no files are left behind


def test_a_model_and_a_tokenizer_object_train_as_their_folder(model: str, tmp_path: Path) -> None:
    own, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    before = {n: t.clone() for n, t in own.state_dict().items()}
    rows = polite_rows()
    of_folder = api.train(config(model, tmp_path / "folder", rows), quiet=True)
    made = config(model, tmp_path / "objects", rows)
    of_objects = api.train(made, quiet=True, model=own, tokenizer=tokenizer)
    for a, b in zip(weights(of_folder).values(), weights(of_objects).values(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(before[n], t) for n, t in own.state_dict().items())  # the caller's model is not trained
    with torch.no_grad():
        next(own.parameters()).add_(1.0)
    with pytest.raises(CheckpointError):
        api.train(made, quiet=True, model=own, tokenizer=tokenizer)


# ---- functions ----

BONUS = 2.0


def alone(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(math.floor(len(c) / 2)) for c in completions]


def with_a_global(prompts: list[str], completions: list[str]) -> list[float]:
    return [BONUS * len(c) for c in completions]


def test_a_function_that_stands_alone_is_written_as_a_file_that_runs(tmp_path: Path) -> None:
    name = function_name(alone, tmp_path, "reward")
    GIVEN.clear()  # like in another process
    assert python_object(name, "reward")([""], ["abcde"]) == [2.0]


def with_a_choice(logps: Any, *, kind: Literal["a", "b"] = "a") -> Any:
    return logps


def before_its_helper(prompts: list[str], completions: list[str]) -> list[float]:
    return defined_later(completions)  # type: ignore[name-defined,no-any-return]  # noqa: F821


def test_other_functions_are_this_processs_own(tmp_path: Path) -> None:
    own = lambda prompts, completions: [1.0] * len(completions)  # noqa: E731
    for function in (with_a_global, own, with_a_choice, before_its_helper):
        name = function_name(function, tmp_path, "reward")
        assert python_object(name, "reward") is function
        GIVEN.clear()
        with pytest.raises(ConfigError, match="given from Python"):
            python_object(name, "reward")


def test_a_functions_name_changes_with_what_it_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(weight: float) -> Any:
        return lambda prompts, completions: [weight * len(c) for c in completions]

    names = {function_name(made(w), tmp_path, "reward") for w in (1.0, 2.0, 1.0)}
    assert len(names) == 2
    before = function_name(with_a_global, tmp_path, "reward")
    monkeypatch.setattr("test_given.BONUS", 3.0)
    assert function_name(with_a_global, tmp_path, "reward") != before


def weighted(prompts: list[str], completions: list[str], weight: float) -> list[float]:
    return [weight * len(c) for c in completions]


class Judge:
    def __init__(self, weight: Any) -> None:
        self.weight = weight

    def reward(self, prompts: list[str], completions: list[str]) -> list[float]:
        return [float(self.weight) for _ in completions]


@pytest.mark.parametrize("made", [lambda w: functools.partial(weighted, weight=w), lambda w: Judge(w).reward])
def test_what_a_partial_function_or_a_method_holds_is_in_its_name(made: Any, tmp_path: Path) -> None:
    for one, other in ((1.0, 2.0), (torch.zeros(2), torch.ones(2)), ({"a": [1]}, {"a": [2]})):
        assert len(named({"reward": {made(one): 1.0, made(other): 0.5}}, tmp_path)["reward"]) == 2


def test_functions_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    locks = (threading.Lock(), threading.Lock())
    with pytest.raises(ConfigError, match="reward"):
        named({"reward": {functools.partial(weighted, weight=lock): 1.0 for lock in locks}}, tmp_path)


def test_a_functions_name_is_the_same_in_every_process(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from penchant.given import function_name\n"
        "known = {w: 1.0 for w in ('a', 'b')}\n"
        "def reward(prompts, completions): return [known.get(c, 0.0) * (c in {'a', 'b', 'cd', 'e'}) for c in completions]\n"
        "print(function_name(reward, Path(sys.argv[1]), 'reward'))"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert said[0] == said[1]


def test_a_reward_given_as_a_function_is_used_and_belongs_to_the_run(model: str, tmp_path: Path) -> None:
    asked = []

    def reward(prompts: list[str], completions: list[str]) -> list[float]:
        asked.append(len(completions))
        return [float(len(c)) for c in completions]

    settings = config(model, tmp_path / "run", [{"prompt": f"hi {i}"} for i in range(12)])
    del settings["loss"]
    settings["algorithm"] = {"name": "rloo", "samples": 2, "max_new_tokens": 4}
    settings["train"] |= {"max_steps": 1}
    settings["data"]["validation_rows"] = 4
    result = api.train(settings, quiet=True, reward=reward)
    assert sum(asked) >= 8 and result.steps == 1
    with pytest.raises(CheckpointError, match="reward"):
        api.train(settings, quiet=True, reward=lambda prompts, completions: [0.0] * len(completions))


def test_a_loss_given_as_a_function(model: str, tmp_path: Path) -> None:
    def squared(logps: Any, *, target: float = 1.0) -> Any:
        """(margin - target)^2"""
        margins = logps.policy_chosen_logps - logps.policy_rejected_logps
        margins = margins - (logps.ref_chosen_logps - logps.ref_rejected_logps)
        return LossOutput((margins - target) ** 2)

    settings = config(model, tmp_path / "run", polite_rows())
    settings["loss"] = {"name": squared, "target": 0.5}
    first = api.train(settings, quiet=True).rows[1]
    assert first["kind"] == "train" and first["loss"] == pytest.approx(0.25, abs=1e-5)  # equal policies: (0 - 0.5)^2


def test_objects_are_found_wherever_they_stand(tmp_path: Path) -> None:
    found = named({"reward": {alone: 0.5, "words": 1.0}, "data": {"path": ["a.jsonl"], "limit": 3}}, tmp_path)
    assert list(found["reward"].values()) == [0.5, 1.0] and all(isinstance(k, str) for k in found["reward"])
    assert found["data"] == {"path": ["a.jsonl"], "limit": 3}
    set_ = set_in({"model": {"path": "gpt2"}, "data": {"limit": 3}}, {"data": "x", "tokenizer": "t", "reward": "words"})
    assert set_ == {"model": {"path": "gpt2", "tokenizer": "t"}, "data": {"limit": 3, "path": "x"}, "reward": "words"}


# ---- callbacks ----


def test_callbacks_are_told_and_a_stopped_run_goes_on_to_the_same_end(model: str, tmp_path: Path) -> None:
    seen: list[tuple[str, int]] = []

    class Told(Callback):
        def on_step(self, step: int, metrics: Mapping[str, Any]) -> str | None:
            seen.append(("step", step))
            assert metrics["step"] == step and "loss" in metrics
            return "stop" if step == 2 else None

        def on_evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
            seen.append(("evaluation", step))
            assert "eval/loss" in metrics

        def on_checkpoint(self, step: int, folder: Path) -> None:
            seen.append(("checkpoint", step))
            assert (folder / "model" / "config.json").is_file()

        def on_end(self, result: Any) -> None:
            seen.append(("end", result.steps))

    rows = polite_rows()
    stopped = api.train(config(model, tmp_path / "run", rows), quiet=True, callbacks=[Told()])
    assert stopped.stopped and stopped.steps == 2 and stopped.model.is_dir()
    assert seen == [("evaluation", 0), ("step", 1), ("step", 2), ("checkpoint", 2), ("end", 2)]
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "paused"
    rest = api.train(config(model, tmp_path / "run", rows), quiet=True)
    whole = api.train(config(model, tmp_path / "whole", rows), quiet=True)
    assert not rest.stopped and rest.rows == whole.rows
    assert all(torch.equal(a, b) for a, b in zip(weights(rest).values(), weights(whole).values(), strict=True))


def test_a_checkpoint_can_stop_a_run_and_a_plain_function_is_told_of_steps(model: str, tmp_path: Path) -> None:
    class Once:
        def on_checkpoint(self, step: int, folder: Path) -> str:
            return "stop"

    steps: list[int] = []
    settings = config(model, tmp_path, polite_rows(), checkpoint={"every": 3})
    result = api.train(settings, quiet=True, callbacks=[Once(), lambda step, metrics: steps.append(step)])
    assert result.stopped and result.steps == 3 and steps == [1, 2, 3]


def test_callbacks_that_are_none_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"callbacks\[1\]"):
        Callbacks([print, 3])
    with pytest.raises(ConfigError, match="not a list"):
        Callbacks(print)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"callbacks\[0\]: is a class"):
        Callbacks([Callbacks])
    with pytest.raises(ConfigError, match="True"):
        Callbacks([lambda step, metrics: True])("on_step", 1, {})


# ---- figures ----


def test_figures_of_each_answer_add_up_to_those_of_all(model: str, tmp_path: Path) -> None:
    asked = config(model, tmp_path / "run", polite_rows())
    asked["model"]["dtype"] = "fp32"  # "auto" is bf16 on some processors
    result = api.train(asked, quiet=True)
    output = tmp_path / "rows.jsonl"
    found = api.evaluate(result.folder, quiet=True, rows=True, rows_output=str(output))
    rows = found["rows"]
    assert [json.loads(line) for line in output.read_text().splitlines()] == rows
    chosen = [r for r in rows if r["chosen"]]
    assert len(rows) == 12 and len(chosen) == 6
    assert np.mean([r["logps"] for r in chosen]) == pytest.approx(found["eval/logps/chosen"])
    # equal to the model's own forward
    own, tokenizer = AutoModelForCausalLM.from_pretrained(result.model), AutoTokenizer.from_pretrained(result.model)
    row = rows[0]
    prompt = tokenizer(row["prompt"], add_special_tokens=False).input_ids
    answer = tokenizer(row["completion"], add_special_tokens=False).input_ids
    whole = [*prompt, *answer, 1]
    logps = own(torch.tensor([whole])).logits[0].log_softmax(-1)
    sums = sum(float(logps[i - 1, whole[i]]) for i in range(len(prompt), len(whole)))
    assert row["tokens"] == len(whole) - len(prompt) and row["logps"] == pytest.approx(sums, abs=1e-3)
    api.evaluate(result.folder, quiet=True, rows_output=str(output))  # it may overwrite its own file
    with pytest.raises(ConfigError, match="rows-output"):
        api.evaluate(result.folder, quiet=True, text="README.md", rows_output=str(output))


def test_curves_are_a_page_without_scripts_from_elsewhere(model: str, tmp_path: Path) -> None:
    result = api.train(config(model, tmp_path, polite_rows()), quiet=True)
    page = str(result.plot())
    assert "<svg" in page and "http" not in page.split("</style>")[1].replace("http://www.w3.org", "")
    assert result.plot()._repr_html_().startswith("<iframe srcdoc=")
    with pytest.raises(ConfigError, match="pandas"):
        _ = result.metrics


def test_rows_and_functions_in_audit_and_compare(model: str, tmp_path: Path) -> None:
    audit = api.audit(polite_rows(), reward=alone)
    assert f"{len(polite_rows())} accepted" in audit.to_text()
    asked: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("penchant.compare.comparison.compare_runs", lambda runs, request, quiet: asked.append(request))
        api.compare("a", "b", prompts=polite_rows(3))
        with pytest.raises(ConfigError, match="both rows"):
            api.compare("a", prompts=polite_rows(3), data="rows.jsonl")
    assert asked[0].prompts == 3 and [
        json.loads(r) for r in Path(asked[0].data).read_text().splitlines()
    ] == polite_rows(3)


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = json.loads((Path(__file__).parents[1] / "recipes" / "notebook.ipynb").read_text())
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), space)
            if "MODEL" in space:
                space["MODEL"] = tiny_model_folder(tmp_path / "model")
    assert space["result"].steps == 5 and 0 <= space["figures"]["eval/generated/reward"] <= 1
