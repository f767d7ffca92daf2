"""Reward functions: built-in and user-defined, weighted sums, and every kind of failure."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from penchant.errors import ConfigError, RewardError
from penchant.rewards import RewardConfig, builtin, load_reward
from penchant.rewards.builtin import accuracy, sentiment
from penchant.rewards.functions import reads_columns
from penchant.rewards.reward_model import PolicyText, rows_by_source
from penchant.types import Message, PromptTree, TokenTree


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
            "'kindness' is not a reward; there are sentiment, words, accuracy, think_format, words:20-60, matches:REGEX, format:REGEX; "
            "or give path.py:function",
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
        ("def f(texts): return 0\n", "does not take \\(prompts, completions\\)"),
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
        ("return ['good' if not c else 1.0 for c in completions]", "returned 'good' for completion 1: ''"),
        ("return ['0.5' if not c else 1.0 for c in completions]", "returned '0.5' for completion 1: ''"),
        ("return [b'1' if not c else 1.0 for c in completions]", "returned b'1' for completion 1: ''"),
        ("import numpy; return numpy.array(['1', '2'])", "returned .*'1'.* for completion 0: 'fine'"),
        ("import numpy; return numpy.array([1.0, '2'], object)", "returned '2' for completion 1: ''"),
        ("return [1.0, [2.0, 3.0]]", "returned list that holds no numbers"),
        ("return [1e39 if not c else 1.0 for c in completions]", r"returned 1e\+39 for completion 1: ''"),
        ("return None", "returned None; return a list"),
        ("return 1.0", r"returned 1 values \(no list\) for 2"),
        ("return [[1.0], [2.0]]", r"returned 2 values \(an array of shape \[2, 1\]\) for 2"),
        ("return (1.0 for c in completions)", "returned generator that holds no numbers"),
    ],
)
def test_errors_inside_name_the_completion(tmp_path: Path, body: str, what: str) -> None:
    path = write(tmp_path, f"def f(prompts, completions):\n    {body}\n")
    with pytest.raises(RewardError, match=what) as error:
        load_reward(f"{path}:f")(["p", "p"], ["fine", ""])
    assert error.value.exit_code == 2


def test_tensors_serve_with_a_gradient_and_in_bf16_too(tmp_path: Path) -> None:
    tensors = "torch.tensor([1.0, 2.5], requires_grad=True)", "torch.tensor([1.0, 2.5], dtype=torch.bfloat16)"
    for made in (*tensors, *(f"list({t})" for t in tensors)):
        path = write(tmp_path, f"import torch\ndef f(prompts, completions):\n    return {made}\n")
        assert load_reward(f"{path}:f")(["p", "p"], ["x", "y"]).tolist() == [1.0, 2.5]


def test_an_array_of_objects_may_hold_none(tmp_path: Path) -> None:
    code = "import numpy as np\ndef f(prompts, completions):\n    return np.array([None, 2.0], dtype=object)\n"
    found = load_reward(f"{write(tmp_path, code)}:f")(["p", "p"], ["x", "y"])
    assert np.isnan(found[0]) and found[1] == 2.0


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


# ---- rewards that see the row: columns, conversations, None, lists, and functions written to TRL's documented signature ----

TRL = '''
import asyncio
import re

def accuracy_reward(completions, answer, **kwargs):
    """TRL's docs: conversational or plain completions, and a column."""
    texts = [c[0]["content"] if isinstance(c, list) else c for c in completions]
    return [1.0 if t == str(a) else 0.0 for t, a in zip(texts, answer)]

def format_reward_func(completions, **kwargs):
    """The example of TRL's docs."""
    pattern = r"^<think>.*?</think><answer>.*?</answer>$"
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match(pattern, content) else 0.0 for content in contents]

def math_reward_func(prompts, completions, task, **kwargs):
    """TRL's multi-task example: None where the task is another."""
    return [float(len(c)) if t == "math" else None for c, t in zip(completions, task)]

async def async_reward_func(prompts, completions, answer, **kwargs):
    await asyncio.sleep(0)
    return [float(a) for a in answer]

def reward_tokens(completion_ids, completions, trainer_state, log_metric, log_extra, **kwargs):
    log_metric("seen", len(completion_ids))
    log_extra("ids", completion_ids)
    return [float(len(ids) + trainer_state.global_step) for ids in completion_ids]

class Scorer:
    __name__ = "scorer"
    def __call__(self, prompts, completions, completion_ids=None, **columns):
        return [float(len(columns)) for _ in completions]

scorer = Scorer()
'''


def rollouts(*rows: PromptTree, texts: Sequence[str] = ("x",)) -> tuple[list[str], list[str], list[TokenTree], Any]:
    """Prompts and completions as `Writer` passes them, with the same texts for each row."""
    ids = tuple(np.arange(len(t), dtype=np.int32) for t in texts)
    trees = [TokenTree(i, np.array([5], np.int32), ids, (False,) * len(ids), r.source) for i, r in enumerate(rows)]
    prompts = ["rendered" for _ in rows for _ in texts]
    return prompts, [t for _ in rows for t in texts], trees, PolicyText(None, rows=rows_by_source(rows))


def row(prompt: Any, at: int, **columns: Any) -> PromptTree:
    return PromptTree(prompt, (), f"d.jsonl:{at}", columns)


def test_a_column_is_repeated_for_the_samples_of_its_prompt(tmp_path: Path) -> None:
    prompts, texts, trees, policy = rollouts(row("2+2=", 1, answer=4), row("3+3=", 2, answer="6"), texts=("4", "6"))
    reward = load_reward(f"{write(tmp_path, TRL)}:accuracy_reward", policy)
    assert reward(prompts, texts, trees).tolist() == [1.0, 0.0, 0.0, 1.0]


def test_conversations_come_as_messages_and_texts_as_they_are_in_the_data(tmp_path: Path) -> None:
    code = "seen = []\ndef f(prompts, completions, **kwargs):\n    seen.append((prompts, completions))\n    return [0.0] * len(prompts)\n"
    talk = row((Message("system", "be kind"), Message("user", "hi")), 1)
    prompts, texts, trees, policy = rollouts(talk, row("plain", 2))
    reward = load_reward(f"{write(tmp_path, code)}:f", policy)
    reward(prompts, texts, trees)
    ((asked, said),) = reward.terms[0].function.__globals__["seen"]
    assert asked == [[{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}], "plain"]
    assert said == [[{"role": "assistant", "content": "x"}], "x"]
    # built-in rewards read the texts of both
    assert load_reward("words", policy)(prompts, texts, trees).tolist() == [1.0, 1.0]


def test_columns_do_not_take_the_place_of_what_the_policy_wrote(tmp_path: Path) -> None:
    code = "def f(prompts, completions, **columns):\n    return [float((p, c) == ('a', 'x')) for p, c in zip(prompts, completions)]\n"
    prompts, texts, trees, policy = rollouts(row("a", 1, prompts="theirs", completions="theirs"))
    assert load_reward(f"{write(tmp_path, code)}:f", policy)(prompts, texts, trees).tolist() == [1.0]


def test_functions_of_trls_documented_signature_paste_unchanged(tmp_path: Path) -> None:
    path = write(tmp_path, TRL)
    talk = (Message("user", "hi"),)
    good = "<think>a</think><answer>b</answer>"
    prompts, texts, trees, policy = rollouts(row(talk, 1, answer=3), texts=(good, "3"))
    assert load_reward(f"{path}:format_reward_func", policy)(prompts, texts, trees).tolist() == [1.0, 0.0]
    assert load_reward(f"{path}:accuracy_reward", policy)(prompts, texts, trees).tolist() == [0.0, 1.0]
    assert load_reward(f"{path}:async_reward_func", policy)(prompts, texts, trees).tolist() == [3.0, 3.0]
    said = load_reward(f"{path}:reward_tokens", policy).judge(prompts, texts, trees, step=10)
    assert said.total.tolist() == [10.0 + len(good), 11.0] and said.metrics == {"seen": 2.0}
    # **columns gets every column, and the other arguments that TRL passes
    assert (load_reward(f"{path}:scorer", policy)(prompts, texts, trees) >= 1.0).all()


def test_none_says_nothing_and_the_others_decide(tmp_path: Path) -> None:
    path = write(tmp_path, TRL)
    rows = row("a", 1, task="math"), row("b", 2, task="code")
    prompts, texts, trees, policy = rollouts(*rows, texts=("xyz",))
    both = load_reward([{f"{path}:math_reward_func": 2.0}, {"words": 0.5}], policy).judge(prompts, texts, trees)
    assert both.total.tolist() == [6.5, 0.5]
    assert np.isnan(both.terms["math_reward_func"]).tolist() == [False, True]
    alone = load_reward(f"{path}:math_reward_func", policy)(prompts, texts, trees)
    assert alone[0] == 3.0 and np.isnan(alone[1])


def test_a_column_that_is_not_there_is_said_before_anything_is_written(tmp_path: Path) -> None:
    *_, policy = rollouts(row("a", 1, answr="4"))
    with pytest.raises(ConfigError, match=r'takes "answer", and there is no such column.*did you mean "answr"'):
        load_reward(f"{write(tmp_path, TRL)}:accuracy_reward", policy)
    with pytest.raises(RewardError, match="the rows have no further columns"):
        load_reward(f"{tmp_path / 'mine.py'}:accuracy_reward")(["p"], ["x"])


def test_which_rewards_read_columns(tmp_path: Path) -> None:
    path = write(tmp_path, TRL + "\ndef old(prompts, completions): return [0.0]\ndef mine(p, c): return [0.0]\n")
    assert all(reads_columns(s) for s in ("accuracy", f"{path}:accuracy_reward", {f"{path}:async_reward_func": 1.0}))
    assert not any(
        reads_columns(s) for s in (None, "words", {"overlong": {"max": 9}}, "matches:a", f"{path}:old", f"{path}:mine")
    )


HANGS = "import time, re\ndef f(prompts, completions):\n    for c in completions:\n        {}\n    return [0.0] * len(completions)\n"


CATCHES = """try:
            time.sleep(30 if c else 0)
        except Exception:
            pass"""


@pytest.mark.parametrize("how", ["time.sleep(30 if c else 0)", "re.match('(a+)+$', c)", CATCHES])
@pytest.mark.parametrize("where", ["main thread", "another"])
def test_a_reward_that_hangs_ends_in_a_sentence(tmp_path: Path, how: str, where: str) -> None:
    if "re." in how and where == "another":
        pytest.skip("a regular expression holds the interpreter: nobody else can run")
    reward = load_reward({f"{write(tmp_path, HANGS.format(how))}:f": 1.0, "timeout": 0.2})
    texts = ["", "a" * 40 + "b"]

    def judge() -> None:
        with pytest.raises(
            RewardError, match=r"no answer within 0.2 seconds \(completion 1: 'aaaa.*raise reward.timeout"
        ):
            reward(["p", "p"], texts)

    if where == "main thread":
        return judge()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(judge).result()


def test_what_a_reward_prints_is_no_output_of_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "def f(prompts, completions):\n    print('hello')\n    return [0.0]\n"
    load_reward(f"{write(tmp_path, code)}:f")(["p"], ["x"])
    out, err = capsys.readouterr()
    assert (out, err) == ("", "hello\n")


def test_the_row_of_a_completion_is_named(tmp_path: Path) -> None:
    code = "def f(prompts, completions):\n    return [1 / len(c) for c in completions]\n"
    prompts, texts, trees, policy = rollouts(row("a", 7), texts=("fine", ""))
    with pytest.raises(RewardError, match=r"completion 1 of row d.jsonl:7: ''"):
        load_reward(f"{write(tmp_path, code)}:f", policy)(prompts, texts, trees)


# ---- built-in rewards ----


def test_soft_overlong_punishment_is_dapos_formula() -> None:
    lengths = [0, 6, 8, 9, 10, 50]
    trees = [TokenTree(0, np.array([1], np.int32), tuple(np.zeros(n, np.int32) for n in lengths), (False,) * 6)]
    reward = load_reward({"overlong": {"max": 10, "cache": 4}})
    assert reward(["p"] * 6, ["x"] * 6, trees).tolist() == [0.0, 0.0, -0.5, -0.75, -1.0, -1.0]
    with pytest.raises(RewardError, match="token ids"):
        reward(["p"], ["x"])


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("think_format", [1.0, 0.0, 0.0, 0.0]),
        ("format:<think>.*</think>.*", [1.0, 1.0, 0.0, 0.0]),
        ({"format": {"pattern": "a+", "weight": 2.0}}, [0.0, 0.0, 0.0, 2.0]),
        ({"repetition": {"n": 1, "max_penalty": -2}}, [0.0, 0.0, -1.0, 0.0]),
    ],
)
def test_rewards_of_form_and_repetition(spec: Any, expected: list[float]) -> None:
    texts = ["<think>a\nb</think>c", "<think><think>a</think>", "b b c b", "aa"]
    assert load_reward(spec)(["p"] * 4, texts).tolist() == expected


def test_right_answers_are_compared_as_mathematics() -> None:
    pytest.importorskip("math_verify")
    texts = ["The answer is 42", r"so $\boxed{\frac{1}{2}}$", "7", "8", "answer: 18.", "x"]
    answers = ["42", "0.5", 7, "9", "9 + 9 = 18\n#### 18", None]
    prompts, _, _, policy = rollouts(*(row("q", i, answer=a) for i, a in enumerate(answers)))
    trees = [
        TokenTree(i, np.array([5], np.int32), (np.zeros(1, np.int32),), (False,), f"d.jsonl:{i}") for i in range(6)
    ]
    found = load_reward("accuracy", policy)(prompts, texts, trees)
    assert found[:5].tolist() == [1.0, 1.0, 1.0, 0.0, 1.0] and np.isnan(found[5])


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        (r"11\sqrt{2}", r"$11\sqrt{2}$", "11"),
        (r"2\pi", r"\(2\pi\)", "2"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"$(3, \frac{\pi}{2})$", "3"),
        ("2x+1", "it is $2x+1$", "2"),
        ("1,2,3", "$1,2,3$", "1.2"),
        ("18 dollars", "It costs 18", "19"),
        ("9 + 9 = 18", "18", "9"),
        ("The answer is $5$.", "5", "6"),
    ],
)
def test_an_answer_is_read_as_a_whole(answer: str, right: str, wrong: str) -> None:
    """Not just the first number that math-verify finds in a bare formula."""
    pytest.importorskip("math_verify")
    assert accuracy([right, wrong], [answer, answer]) == [1.0, 0.0]


def test_a_missing_extra_and_a_missing_column_are_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match='no column "answer" or "solution"'):
        accuracy(["x"])
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ConfigError, match=r"pip install 'penchant\[math\]'"):
        load_reward("accuracy")


@pytest.mark.parametrize(
    "written",
    [
        "words",
        {"words": -0.01, "sentiment": 1.0, "device": "cpu"},
        {"words": 1.0, "timeout": None},
        {"overlong": {"max": 10, "weight": 0.5}, "words": 1.0},
    ],
)
def test_a_config_keeps_the_form_in_which_it_was_written(written: Any) -> None:
    config = RewardConfig.model_validate(written)
    assert config.model_dump() == written and RewardConfig.model_validate(config.model_dump()) == config


def test_a_list_of_rewards() -> None:
    config = RewardConfig.model_validate(["words", {"matches:a": 2.0}, {"overlong": {"max": 8}}])
    assert config.terms == {"words": 1.0, "matches:a": 2.0, "overlong": 1.0}


@pytest.mark.parametrize(
    ("written", "what"),
    [
        (["words", {"words": 2.0}], "words is listed twice"),
        ([1.0], "1.0 is not a reward"),
        ({1: 2}, "1 is not the name of a reward"),
        ({"words": {"n": 3}}, "words has no options"),
        ({"overlong": {"mx": 3}}, "max"),
        ({"words": "much"}, "give each reward a number"),
    ],
)
def test_a_config_that_cannot_be_read(written: Any, what: str) -> None:
    with pytest.raises(ValidationError, match=what):
        RewardConfig.model_validate(written)


@pytest.mark.parametrize("kind", ["matches", "format"])
def test_a_pattern_without_end_is_a_sentence(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin, "MATCH_SECONDS", 0.2)
    rule = builtin.RULES[kind]("(a|aa)+(a|aa)+(a|aa)+(?=b)c")
    assert list(rule(["p"], ["aab"])) == [0.0]
    with pytest.raises(RewardError, match=r"takes more than 0\.2 s on a completion of 60 characters"):
        rule(["p"], ["a" * 60])
