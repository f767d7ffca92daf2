"""Built-in rewards (sentiment, words, formats, correct answers, length, repetition) and the `reward` section of a config."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from pydantic import Field, ValidationError, model_serializer, model_validator

from penchant.base.functions import is_own
from penchant.base.section import Place, Section, refuse_idle
from penchant.errors import ConfigError, RewardError, setting

# (prompts, completions, **columns) -> one number per completion, or None if it does not apply; may be async
RewardFunction = Callable[..., Any]

# ---- Rewards by name: VADER's compound score, number of words, correct answer, think format ----


@lru_cache(maxsize=1)
def _analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def sentiment(texts: Iterable[str]) -> np.ndarray:
    """VADER's compound sentiment of each text, in [-1, 1] (Hutto & Gilbert, ICWSM 2014)."""
    analyzer = _analyzer()
    return np.array([analyzer.polarity_scores(text)["compound"] for text in texts], dtype=np.float64)


def accuracy(
    completions: Sequence[str], answer: Sequence[Any] | None = None, solution: Sequence[Any] | None = None
) -> list[float | None]:
    """1 if a completion's answer matches the row's `answer` (or `solution`) column by math-verify, else 0.

    None for a row whose answer cannot be parsed. Of GSM8K's answers only the part after ``####`` counts.

    Raises:
        ConfigError: the rows have no such column, or the extra is not installed.
    """
    if answer is None and solution is None:
        how = f"name the right answers so with {setting('data.columns', {'answer': 'YOURS'})}"
        raise ConfigError("reward accuracy", 'the rows have no column "answer" or "solution"', how)
    no_values: list[Any] = [None] * len(completions)
    gold_answers = [a if a is not None else s for a, s in zip(answer or no_values, solution or no_values, strict=True)]
    return [_is_right(text, gold) for text, gold in zip(completions, gold_answers, strict=True)]


# a sentence, an equation or a delimited formula is parsed as is; from anything else, such as "2x+1", math-verify would take one number
_SENTENCE = re.compile(r"\$|\\[(\[]|\\boxed|=|(?<![\\{a-zA-Z])[a-zA-Z]{3,}")


def _is_right(text: str, gold: Any) -> float | None:
    parse, verify = _math_verify()
    # its timeout only works in the main thread; model output such as 9**9**9 may keep it busy forever
    seconds = 5 if threading.current_thread() is threading.main_thread() else None
    gold_text = "" if gold is None else str(gold).rpartition("####")[2].strip()
    candidates = [f"${gold_text}$", gold_text] if gold_text else []
    if _SENTENCE.search(gold_text):
        candidates.reverse()
    gold_answer = next((w for candidate in candidates if (w := parse(candidate, parsing_timeout=seconds))), None)
    if gold_answer is None:
        return None
    answer = parse(text, parsing_timeout=seconds)
    return float(bool(answer) and bool(verify(gold_answer, answer, timeout_seconds=seconds)))


def lacks_math_verify(name: str) -> ConfigError:
    """The error for a missing math extra."""
    return ConfigError("reward accuracy", f"needs an extra ({name} is not installed)", "pip install 'penchant[math]'")


@lru_cache(maxsize=1)
def _math_verify() -> tuple[Any, Any]:
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise lacks_math_verify(error.name or str(error)) from error
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it logs every text that it cannot parse
    return parse, verify


_THINKS = re.compile(r"<think>(?!.*<think>)(.*?)</think>.*", re.DOTALL)


def think_format(completions: Sequence[str]) -> list[float]:
    """1 if a completion is ``<think>...</think>`` followed by anything, with a single ``<think>``, else 0."""
    return [float(_THINKS.fullmatch(c) is not None) for c in completions]


LARGEST = float(np.finfo(np.float32).max)  # largest reward, as the update computes in fp32

BUILT_IN: dict[str, RewardFunction] = {
    "sentiment": lambda prompts, completions: [float(v) for v in sentiment(completions)],
    "words": lambda prompts, completions: [float(len(c.split())) for c in completions],  # a penalty with weight < 0
    "accuracy": accuracy,
    "think_format": think_format,
}


# ---- Rules of length and format as rewards: ``words:20-60``, ``matches:REGEX`` ----


def words_between(bounds: str) -> RewardFunction:
    """0 for a word count in a range (``20-60``, ``20-``, ``-60``), minus 1 for each word too few or too many."""
    match = re.fullmatch(r"(\d*)-(\d*)", bounds)
    low, high = (int(n) if n else None for n in match.groups()) if match else (None, None)
    if match is None or (low is None and high is None) or (low is not None and high is not None and low > high):
        how = "write words:20-60, words:20- or words:-60"
        raise ConfigError("reward", f"words:{bounds} is not a range of words", how)

    def rule(prompts: Sequence[str], completions: Sequence[str]) -> Sequence[float]:
        counts = [len(c.split()) for c in completions]
        return [float(min(0, n - (low or 0)) + (min(0, high - n) if high is not None else 0)) for n in counts]

    return rule


MATCH_SECONDS = 5.0  # per completion


def _pattern(kind: str, expression: str, whole: bool) -> RewardFunction:
    """1 if a regular expression matches anywhere in the completion (`whole`: all of it), else 0."""
    import regex  # like re, but with a timeout; transformers depends on it too

    try:
        re.compile(expression)
        pattern = regex.compile(expression, regex.DOTALL)
    except (re.error, regex.error) as error:
        raise ConfigError("reward", f"{kind}:{expression} is not a regular expression ({error})", "fix it") from error
    search = pattern.fullmatch if whole else pattern.search

    def is_match(completion: str) -> bool:
        try:
            return search(completion, timeout=MATCH_SECONDS) is not None
        except TimeoutError as error:
            what = f"takes more than {MATCH_SECONDS:g} s on a completion of {len(completion):,} characters"
            how = "write it without repetitions inside repetitions, such as (a+)+"
            raise RewardError(f"{kind}:{expression}", what, how) from error

    return lambda prompts, completions: [float(is_match(c)) for c in completions]


def matches(expression: str) -> RewardFunction:
    """1 if the regular expression is found in the completion (``^``, ``$``: its start and end; ``.``: any character), else 0."""
    return _pattern("matches", expression, whole=False)


def format_of(expression: str) -> RewardFunction:
    """1 if the regular expression matches the whole completion (``.``: any character), else 0."""
    return _pattern("format", expression, whole=True)


RULES: dict[str, Callable[[str], RewardFunction]] = {"words": words_between, "matches": matches, "format": format_of}


# ---- Rewards with options: ``overlong: {max: 1024, cache: 256}`` ----


class FormatReward(Section):
    """1 if a regular expression matches the whole completion, else 0."""

    pattern: str = Field(description="regular expression of the whole completion; . is any character")

    def function(self) -> RewardFunction:
        return format_of(self.pattern)


class OverlongReward(Section):
    """DAPO's soft overlong punishment (arXiv 2503.14476, equation 13), in tokens.

    0 up to ``max - cache`` tokens, then falling as ``((max - cache) - length) / cache`` to -1 at `max`, and -1 beyond.
    """

    max: int = Field(ge=1, description="completion length in tokens from which the penalty is -1")
    cache: int | None = Field(None, ge=1, description="tokens before max over which it grows; null: a fifth of max")

    @model_validator(mode="after")
    def _check_cache(self) -> OverlongReward:
        if self.cache is not None and self.cache > self.max:
            raise ValueError(f"cache is {self.cache}, beyond max ({self.max}); give at most that")
        return self

    def function(self) -> RewardFunction:
        cache = self.cache or max(1, self.max // 5)
        free_tokens = self.max - cache

        def overlong(completions: Sequence[str], completion_ids: Sequence[Sequence[int]]) -> list[float]:
            return [min(0.0, max(-1.0, (free_tokens - len(ids)) / cache)) for ids in completion_ids]

        return overlong


class RepetitionReward(Section):
    """A penalty for repeated n-grams of words: ``max_penalty (1 - distinct / all)``; 0 for texts of fewer than n words."""

    n: int = Field(3, ge=1, description="words per n-gram")
    max_penalty: float = Field(-1.0, le=0, description="penalty if every n-gram is the same")

    def function(self) -> RewardFunction:
        def repetition(completions: Sequence[str]) -> list[float]:
            return [self.max_penalty * self._repeated(c.lower().split()) for c in completions]

        return repetition

    def _repeated(self, words: Sequence[str]) -> float:
        grams = [tuple(words[i : i + self.n]) for i in range(len(words) - self.n + 1)]
        return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


class EndpointReward(Section):
    """Base class of judge and HTTP rewards."""

    url: str = Field(description="http(s)://HOST...")
    key_env: str | None = Field(None, description="environment variable with the key, sent as a bearer token")
    concurrency: int = Field(8, ge=1, le=1024, description="requests at a time")
    attempts: int = Field(6, ge=1, le=100, description="attempts per request, with pauses that double")
    timeout: float = Field(120.0, gt=0, description="seconds without a byte before an attempt is given up")


class JudgeReward(EndpointReward):
    """A model behind an OpenAI-compatible endpoint: a grade from 0 to 1, or the share of the group that a completion beats."""

    model: str = Field(description="as the endpoint calls it")
    rubric: str | None = Field(None, description="what makes an answer good, in words")
    against: Literal["none", "group"] = Field(
        "none", description="none: each completion gets a grade; group: each is compared with the prompt's others"
    )
    parameters: dict[str, Any] | None = Field(
        None, description="sampling parameters; null: temperature 0, max_tokens 512"
    )

    def function(self) -> RewardFunction:
        from penchant.rewards.remote import Judge

        return Judge.of(self)


class HttpReward(EndpointReward):
    """A server that replies to a POST of ``{"prompts", "completions", "columns"}`` with ``{"rewards": [...]}``, numbers or null."""

    batch: int = Field(64, ge=1, description="completions per request")

    def function(self) -> RewardFunction:
        from penchant.rewards.remote import Http

        return Http.of(self)


WITH_OPTIONS: dict[str, type[Section]] = {
    "format": FormatReward,
    "overlong": OverlongReward,
    "repetition": RepetitionReward,
    "judge": JudgeReward,
    "http": HttpReward,
}


def kind_of(name: str) -> str | None:
    """The built-in reward that a name refers to (``words:20-60`` is of the kind ``words``); None for any other reward."""
    kind, colon, _ = name.partition(":")
    if name in BUILT_IN or name in WITH_OPTIONS or (colon and (kind in RULES or kind in ("judge", "http"))):
        return kind
    return None


def built_in(name: str, options: Section | None) -> RewardFunction:
    """The function of a built-in reward.

    Raises:
        ConfigError: an option is missing, or its argument cannot be parsed.
    """
    if options is not None:
        function: RewardFunction = options.function()  # type: ignore[attr-defined]
        return function
    if name in BUILT_IN:
        return BUILT_IN[name]
    kind, colon, argument = name.partition(":")
    if colon and kind in RULES:
        return RULES[kind](argument)
    try:
        return WITH_OPTIONS[kind]().function()  # type: ignore[attr-defined,no-any-return]
    except ValidationError as error:
        missing = error.errors()[0]["loc"][0]
        how = f"write reward: {{{name}: {{{missing}: ...}}}}"
        raise ConfigError("reward", f"{name} needs {missing}", how) from error


# ---- The `reward` section of a config ----


class RewardConfig(Section):
    """How completions are scored: a weighted sum of built-in rewards, Python functions, reward models, judges and endpoints.

    Shorthands: ``reward: words``, ``reward: {words: -0.01, runs/reward: 1.0}``, ``reward: [accuracy, think_format]``,
    ``reward: {accuracy: 1.0, overlong: {max: 1024, weight: 0.5}, timeout: 60}``. It is serialized in this short form.
    """

    terms: dict[str, float] = Field(description="name, path.py:function or a reward model's folder: its weight")
    options: dict[str, Section] = Field({}, description="of those rewards that have some")
    device: Place = Field(
        "auto", description="device of reward models, e.g. cpu, or cuda:1 for the second GPU; auto: the policy's"
    )
    timeout: float | None = Field(
        600.0, gt=0, description="seconds that each reward may take for a step's completions; null: no limit"
    )
    single: bool = Field(False, description="written as one name")

    @model_validator(mode="before")
    @classmethod
    def _from_shorthand(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"terms": {value: 1.0}, "single": True}
        if isinstance(value, (list, tuple)):
            value = _merge_list(value)
        if not isinstance(value, dict) or "terms" in value:
            return value
        terms: dict[str, float] = {}
        options: dict[str, Section] = {}
        settings = {k: v for k, v in value.items() if k in ("device", "timeout")}
        for name, entry in value.items():
            if name in settings:
                continue
            if not isinstance(name, str):
                raise ValueError(f"{name!r} is not the name of a reward; write NAME: WEIGHT")
            weight = entry
            if isinstance(entry, Mapping):
                weight = entry.get("weight", 1.0)
                options[name] = _options(name, {k: v for k, v in entry.items() if k != "weight"})
            if isinstance(weight, bool) or not isinstance(weight, (int, float)):
                raise ValueError(f"{name} is {weight!r}; give each reward a number as its weight")
            if not isinstance(entry, Mapping) and kind_of(name) in WITH_OPTIONS and ":" not in name:
                _options(name, {})  # raises if it requires options
            terms[name] = float(weight)
        if isinstance(settings.get("timeout"), int) and not isinstance(settings["timeout"], bool):
            settings["timeout"] = float(settings["timeout"])
        return {"terms": terms, **({"options": options} if options else {}), **settings}

    @model_validator(mode="after")
    def _check_idle(self) -> RewardConfig:
        is_model = [kind_of(name) is None and not is_own(name) for name in self.terms]
        if is_model and all(is_model):
            refuse_idle(self, {"timeout": "on reward models, which take the time that they need; leave it out"})
        if is_model and not any(is_model) and self.device != "cpu":  # other rewards are computed on the CPU
            refuse_idle(self, {"device": "without a reward model; leave it out"})
        return self

    @model_serializer
    def _to_shorthand(self) -> Any:
        settings: dict[str, Any] = {"device": self.device} if self.device != "auto" else {}
        if self.timeout != type(self).model_fields["timeout"].default:
            settings["timeout"] = self.timeout
        if self.single and not settings:
            return next(iter(self.terms))
        terms: dict[str, Any] = dict(self.terms)
        for name, options in self.options.items():
            terms[name] = {**options.model_dump(mode="json", exclude_defaults=True), "weight": terms[name]}
        return terms | settings


def _merge_list(value: Sequence[Any]) -> dict[str, Any]:
    """Merge ``[accuracy, {words: -0.01}]`` into one mapping."""
    merged: dict[str, Any] = {}
    for item in value:
        entry = {item: 1.0} if isinstance(item, str) else item
        if not isinstance(entry, dict):
            raise ValueError(f"{item!r} is not a reward; write a name, or {{name: weight}}")
        if duplicate := next((n for n in entry if n in merged), None):
            raise ValueError(f"{duplicate} is listed twice; give it one weight")
        merged |= entry
    return merged


def _options(name: str, option_values: Mapping[str, Any]) -> Section:
    section = WITH_OPTIONS.get(name if name in WITH_OPTIONS else name.partition(":")[0])
    if section is None:
        raise ValueError(f"{name} has no options; give it a number as its weight")
    values = {
        k: float(v) if k in ("max_penalty", "timeout") and type(v) is int else v for k, v in option_values.items()
    }
    if unknown := next((k for k in values if k not in section.model_fields), None):
        raise ValueError(f"{name} has no option {unknown!r}; there are {', '.join(section.model_fields)}, weight")
    if missing := next((k for k, f in section.model_fields.items() if f.is_required() and k not in values), None):
        raise ValueError(f"{name} needs {missing}; write {{{name}: {{{missing}: ...}}}}")
    try:
        return section.model_validate(values)
    except ValidationError as error:
        errors = [{**e, "loc": (name, *e["loc"])} for e in error.errors(include_url=False)]
        raise ValidationError.from_exception_data(error.title, errors) from None  # type: ignore[arg-type]
