"""A user's own judge function: one pair or all of them, words or numbers, and messages for its errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from penchant.errors import ConfigError, PenchantError, RewardError
from penchant.judges import JudgeOptions, Question, load_judge

PAIRS = [Question("p", "long one", "no"), Question("p", "no", "long one"), Question("p", "yes", "nay")]
SOURCE = """
import numpy as np, torch
def words(prompt, a, b):
    assert prompt == "p"
    return "a" if len(a) > len(b) else "B " if len(b) > len(a) else "tie"
def number(prompt, a, b):
    return len(a) / (len(a) + len(b))
def listed(prompts, a, b):
    return [words(p, x, y) for p, x, y in zip(prompts, a, b, strict=True)]
def array(prompts, first, second):
    return np.array([len(x) > len(y) for x, y in zip(first, second)])
def tensor(prompts, a, b):
    return torch.tensor([0.25] * len(a), dtype=torch.bfloat16, requires_grad=True)
def broken(prompt, a, b):
    return {}[b] if b == "nay" else "a"
def odd(prompt, a, b):
    return "first"
def beyond(prompt, a, b):
    return 1.5
def nothing(prompt, a, b):
    pass
def nan(prompt, a, b):
    return float("nan")
def short(prompts, a, b):
    return ["a"]
def single(prompts, a, b):
    return "a"
def raises(prompts, a, b):
    raise ValueError("no\\x1b[2J")
def leaves(prompt, a, b):
    print("judging")
    raise SystemExit(0)
def two(prompt, answers):
    return "a"
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "judge.py").write_text(SOURCE)
    return str(tmp_path / "judge.py")


@pytest.mark.parametrize(
    ("name", "values", "graded"),
    [
        ("words", [1, 0, 0.5], False),
        ("number", [0.8, 0.2, 0.5], True),
        ("listed", [1, 0, 0.5], False),
        ("array", [1, 0, 0], True),
        ("tensor", [0.25] * 3, True),
    ],
)
def test_what_it_may_return(file: str, name: str, values: list[float], graded: bool) -> None:
    judge = load_judge(JudgeOptions(f"{file}:{name}"))
    judge.check()
    found = judge.ask(PAIRS)
    assert found.values.tolist() == pytest.approx(values) and found.graded.tolist() == [graded] * 3
    assert (found.asked, found.cached) == (3, 0) and judge.ask([]).values.size == 0
    assert judge.describe()["function"] == f"{file}:{name}" and len(judge.describe()["sha256"]) == 64


@pytest.mark.parametrize(
    ("name", "kind", "match"),
    [
        ("broken", RewardError, r"KeyError: 'nay' \(pair 2: 'yes' and 'nay'\)"),
        ("odd", RewardError, r"returned 'first' for pair 0 .*return \"a\", \"b\" or \"tie\""),
        ("beyond", RewardError, "returned '1.5' for pair 0"),
        ("nothing", RewardError, "returned 'None' for pair 0"),
        ("nan", RewardError, "returned 'nan' for pair 0"),
        ("short", RewardError, "returned 1 verdicts for 3 pairs"),
        ("single", RewardError, "returned str; return a list of verdicts"),
        ("raises", RewardError, r"ValueError: no\\x1b\[2J; fix the function; it gets lists"),
        ("leaves", RewardError, "SystemExit: 0"),
        ("two", ConfigError, r"judge: .* does not take \(prompt, a, b\)"),
        ("missing", ConfigError, "has no function 'missing'"),
    ],
)
def test_what_it_does_wrong(file: str, name: str, kind: type[PenchantError], match: str) -> None:
    with pytest.raises(kind, match=match):
        load_judge(JudgeOptions(f"{file}:{name}")).ask(PAIRS)


def test_what_is_no_judge(tmp_path: Path) -> None:
    for spec, match in (("sentiment", "'sentiment' is not a judge"), (f"{tmp_path}/no.py:f", "judge: .*no such file")):
        with pytest.raises(ConfigError, match=match):
            load_judge(JudgeOptions(spec))
    with pytest.raises(ConfigError, match="--judge-model: is for endpoints"):
        load_judge(JudgeOptions("x.py:f", model="m"))
