"""What the arguments of `penchant.api` may be, and what a request makes of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from tiny import polite_rows, write_jsonl

from penchant import api
from penchant.errors import ConfigError
from penchant.judges import load_judge
from penchant.requests import CompareRequest, EvalRequest, GetRequest, check_type, request_of
from penchant.runs.state import check_reward, reward_terms


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: api.train(None), "config: is None"),
        (lambda: api.train({}, {"train.lr": 1}), r"overrides\[0\]: is of type dict; write .*data=rows"),
        (lambda: api.train({}, dat=[]), 'dat: is not an argument; did you mean "data"'),
        (lambda: api.train({}, quiet="no"), "quiet: is 'no'; give True or False"),
        (lambda: api.train({}, callbacks=print), "callbacks: .*; give a list"),
        (lambda: api.plan({}, gpus=4), "gpus: is 4; give a list"),
        (lambda: api.plan({}, gpus=[1.5]), r"gpus\[0\]: is 1.5; give a whole number"),
        (lambda: api.as_config({}, "train.lr=1"), "overrides: is 'train.lr=1'"),
        (lambda: api.as_config({}, (), [5]), "given: is of type list; give a dict or None"),
        (lambda: api.evaluate(None), "config: is None"),
        (lambda: api.evaluate("nowhere", generate="8"), "generate: is '8'; give a whole number"),
        (lambda: api.evaluate("nowhere", generate=True), "generate: is True; give a whole number"),
        (lambda: api.evaluate("nowhere", max_new_tokens=2**40), "max_new_tokens: is beyond every range"),
        (lambda: api.evaluate("nowhere", step=1.5), "step: is 1.5; give a text"),
        (lambda: api.evaluate("nowhere", data=[None]), r"data\[0\]: is None; give a text"),
        (lambda: api.evaluate("nowhere", also={"words": 1}), "also: is of type dict; give a list"),
        (lambda: api.compare("a", 5), r"runs\[1\]: is 5; give a text or a path"),
        (lambda: api.compare([]), r"runs\[0\]: is a list; .* compare\(\*LIST\)"),
        (lambda: api.flags(b"a"), "path: is b'a'; give a text or a path"),
        (lambda: api.report("a", output=[]), "output: is of type list; give a text, a path or None"),
        (lambda: api.export("a", to=None), "to: is None; give a text"),
        (lambda: api.export("a\0", to="pt"), "run: holds a NUL character"),
        (lambda: api.track("a", 5), r"to\[0\]: is 5; give a text"),
        (lambda: api.track("a", "wandb", say=5), "say: is 5; give a function"),
        (lambda: load_judge(5), "judge: is 5; give a text or a JudgeOptions"),  # type: ignore[arg-type]
        (lambda: check_reward(5), "reward: is 5; give a text, a list, a dict or a RewardConfig"),
        (lambda: check_reward({5: 1.0}), "reward: 5 is not the name of a reward; write NAME: WEIGHT$"),
        (lambda: api.sweep(5), "config: is 5; give a dict, a text or a path"),
        (lambda: api.pipeline({}, redo=5), "redo: is 5; give a text or a list"),
        (lambda: api.fix("a", "b", drop=5), "drop: is 5; give a text or a list"),
        (lambda: api.fix("a", "b", columns={"prompt": 1}), r"columns\['prompt'\]: is 1; give a text"),
        (lambda: api.get_data("a", split=0.9), "split: is 0.9; give a list"),
        (lambda: api.audit(3), "config: is 3"),
        (lambda: api.audit("a", reward=5), "reward: is 5; give a text, a list"),
        (lambda: api.audit("a", check=5), "check: is 5; give a function, a text or None"),
        (lambda: api.audit_files("a", splits={"train": [5]}), r"splits\['train'\]\[0\]: is 5; give a text"),
        (lambda: api.audit_page(None, "a.html"), "audit: is None; give an Audit"),
        (lambda: api.load_preferences(None), "path: is None; give a text, a path or a list"),
        (lambda: api.load_preferences([{"prompt": "a"}]), r"path\[0\]: is of type dict"),
        (lambda: api.load_preferences("a", shape=5), "shape: is 5; give a text"),
        (lambda: api.load_preferences("a", shape=Path("mine.py:Layout")), "shape: is of type .*; give a text"),
        (lambda: api.load_preferences("a", shap="pairs"), 'unknown option .*; did you mean "shape"'),
        (lambda: api.audit("a", check=Path("mine.py:check")), "check: is of type .*; give a function, a text"),
        (lambda: api.load_preferences("a", on_bad_row="drop"), "on_bad_row: is 'drop'; give error or skip"),
        (lambda: api.load_preferences("a", identical=""), "identical: is ''; give bad_row or keep"),
        (lambda: api.load_preferences("a", limit=-1), "limit: is -1; give 1 or more"),
        (lambda: api.load_preferences("a", bounds={"rows": 1}), 'unknown key "rows" in bounds'),
    ],
)
def test_arguments_of_a_wrong_kind_are_named(call: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        call()


def test_a_missing_argument_is_named_with_its_function() -> None:
    with pytest.raises(TypeError, match=r"flags\(\): .*path"):
        api.flags()  # type: ignore[call-arg]


def test_what_a_request_takes_is_kept_as_the_command_line_gives_it() -> None:
    asked: dict[str, Any] = {
        "step": np.int64(4),
        "data": [Path("a"), "b"],
        "also": "words",
        "text": Path("c"),
        "beta": 1,
    }
    request = request_of(EvalRequest, asked | {"seed": None, "overlap": np.bool_(False), "generate": 2}, "eval")
    assert request == EvalRequest(
        step="4", data=("a", "b"), also=("words",), text="c", beta=1, overlap=np.bool_(False), generate=2
    )
    assert request_of(
        GetRequest, {"workers": 2, "moderation": 1, "split": iter((1, 0, 0)), "columns": None}, "get"
    ) == (GetRequest(workers=2, moderation=1, split=(1, 0, 0)))


def test_what_a_request_records_can_be_written_as_json() -> None:
    asked = {"generate": np.int64(3), "temperature": np.float32(0.5), "seed": torch.tensor(2), "reward": ["words"]}
    settings = json.loads(json.dumps(request_of(EvalRequest, asked, "eval").settings()))
    assert settings == {"samples": 1, "max_new_tokens": 64, **asked}
    parameters = {"temperature": 0}
    assert request_of(CompareRequest, {"judge_parameters": parameters}, "compare").judge_parameters == parameters


def test_unions_inside_of_unions() -> None:
    annotation = "Mapping[str, str | Path | Sequence[str | Path]] | None"
    for value in (None, {}, {"a": "b"}, {"a": Path("b")}, {"a": ["b", Path("c")]}):
        check_type("splits", value, annotation)
    for value, where in ((5, "splits"), ({"a": 5}, r"splits\['a'\]"), ({"a": [5]}, r"splits\['a'\]\[0\]")):
        with pytest.raises(ConfigError, match=f"{where}: is 5; give"):
            check_type("splits", value, annotation)


def test_none_stands_for_a_default(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", polite_rows()[:3])
    options = ("on_bad_row", "bounds", "shape", "identical", "keep_columns", "rollouts", "limit")
    assert api.load_preferences(file, **dict.fromkeys(options)) == api.load_preferences(file)
    assert api.load_preferences(file, bounds=MappingProxyType({"row_mb": 1})) == api.load_preferences(file)
    assert api.audit(str(file), quiet=None, languages=None) == api.audit(str(file))  # type: ignore[arg-type]


def test_an_audit_of_files_takes_paths_and_functions(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "rows.jsonl", polite_rows()[:3])

    def length(prompts: list[str], completions: list[str]) -> list[float]:
        return [float(len(c)) for c in completions]

    def empty(texts: list[str]) -> list[bool]:
        return [not text for text in texts]

    audited = api.audit_files(splits={"train": Path(file)}, reward=length, check=empty)
    assert audited == api.audit_files(splits={"train": [file]}, reward=length, check=empty)


def test_rewards_may_be_a_list_or_a_tuple() -> None:
    assert reward_terms(["words", {"sentiment": 0.5}]) == reward_terms(("words", {"sentiment": 0.5}))
