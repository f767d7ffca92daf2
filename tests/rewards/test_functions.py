"""Reward functions: built-in and a person's own, sums by weight, and every way in which they go wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from penchant.errors import ConfigError, RewardError
from penchant.rewards import load_reward
from penchant.rewards.builtin import sentiment


def write(tmp_path: Path, code: str) -> str:
    path = tmp_path / "mine.py"
    path.write_text(code)
    return str(path)


def test_a_weighted_sum(tmp_path: Path) -> None:
    path = write(tmp_path, "def exclaims(prompts, completions):\n    return [c.count('!') for c in completions]\n")
    reward = load_reward({"sentiment": 2.0, f"{path}:exclaims": 0.5, "words": -0.1})
    texts = ["a wonderful film!!", "bad"]
    expected = 2 * sentiment(texts) + [0.5 * 2 - 0.3, -0.1]
    assert reward(["p", "p"], texts).tolist() == pytest.approx(expected.tolist())


def test_the_prompt_is_given_too(tmp_path: Path) -> None:
    path = write(tmp_path, "def f(prompts, completions):\n    return [len(p) for p in prompts]\n")
    assert load_reward(f"{path}:f")(["abc", "a"], ["x", "y"]).tolist() == [3.0, 1.0]


@pytest.mark.parametrize(
    "spec,what",
    [
        (
            "kindness",
            "'kindness' is no reward; there are sentiment, words, words:20-60, matches:REGEX; or give path.py:function",
        ),
        ("words:60-20", "words:60-20 is not a range of words; write words:20-60"),
        ("words:-", "words:- is not a range of words"),
        ("words:many", "words:many is not a range of words"),
        ("matches:(", r"matches:\( is not a regular expression"),
        ("missing.py:f", "missing.py: no such file"),
        ({}, "is empty"),
    ],
)
def test_what_cannot_be_loaded(spec: object, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        load_reward(spec)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("words:2-3", [-1.0, 0.0, 0.0, -2.0]),
        ("words:2-", [-1.0, 0.0, 0.0, 0.0]),
        ("words:-2", [0.0, 0.0, -1.0, -3.0]),
        ("words:3-3", [-2.0, -1.0, 0.0, -2.0]),
        (r"matches:^b.*!$", [0.0, 0.0, 1.0, 0.0]),
        (r"matches:\n", [0.0, 0.0, 1.0, 0.0]),
        (r"matches:a:", [0.0, 1.0, 0.0, 0.0]),
    ],
)
def test_rules_of_length_and_format(spec: str, expected: list[float]) -> None:
    texts = ["one", "a: two", "b\nand three!", "c d e f g"]
    assert load_reward(spec)(["p"] * 4, texts).tolist() == expected
    assert load_reward({spec: 0.5})(["p"] * 4, texts).tolist() == [0.5 * e for e in expected]


@pytest.mark.parametrize(
    "code,what",
    [
        ("def g(p, c): return 0\n", r"has no function 'f'; there are g"),
        ("def f(completions): return 0\n", "does not take \\(prompts, completions\\)"),
        ("import nowhere_to_be_found\n", "cannot be imported \\(ModuleNotFoundError"),
        ("def f(:\n", "cannot be imported \\(SyntaxError"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, code: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        load_reward(f"{write(tmp_path, code)}:f")


@pytest.mark.parametrize(
    "body,what",
    [
        ("return [1 / len(c) for c in completions]", r"ZeroDivisionError: division by zero \(completion 1: ''\)"),
        ("return [1.0]", "returned 1 values for 2 completions"),
        ("return [float('nan') if not c else 1.0 for c in completions]", "returned nan for completion 1: ''"),
        ("return ['good' for c in completions]", "returned list that holds no numbers"),
        ("return None", "returned None; return a list"),
        ("return 1.0", r"returned 1 values \(no list\) for 2"),
        ("return [[1.0], [2.0]]", r"returned 2 values \(an array of shape \[2, 1\]\) for 2"),
        ("return [1.0, None]", "returned None for completion 1: ''"),
        ("return (1.0 for c in completions)", "returned generator that holds no numbers"),
    ],
)
def test_errors_inside_name_the_completion(tmp_path: Path, body: str, what: str) -> None:
    path = write(tmp_path, f"def f(prompts, completions):\n    {body}\n")
    with pytest.raises(RewardError, match=what) as error:
        load_reward(f"{path}:f")(["p", "p"], ["fine", ""])
    assert error.value.exit_code == 2


def test_tensors_serve_with_a_gradient_and_in_bf16_too(tmp_path: Path) -> None:
    for made in ("torch.tensor([1.0, 2.5], requires_grad=True)", "torch.tensor([1.0, 2.5], dtype=torch.bfloat16)"):
        path = write(tmp_path, f"import torch\ndef f(prompts, completions):\n    return {made}\n")
        assert load_reward(f"{path}:f")(["p", "p"], ["x", "y"]).tolist() == [1.0, 2.5]


def test_a_file_with_a_dataclass_can_be_imported(tmp_path: Path) -> None:
    code = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Score:\n    value: float\n"
        "def f(prompts, completions):\n    return [Score(2.0).value for c in completions]\n"
    )
    assert load_reward(f"{write(tmp_path, code)}:f")(["p"], ["x"]).tolist() == [2.0]


def test_a_script_that_ends_itself_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be imported \\(SystemExit: 0"):
        load_reward(f"{write(tmp_path, 'import sys; sys.exit(0)')}:f")
