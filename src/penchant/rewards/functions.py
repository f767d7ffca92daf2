"""Rewards from a config: a weighted sum of built-in rewards, a user's Python functions and endpoints, with checked results."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from penchant.base.functions import TookTooLong, guarded, in_thread, is_own, python_object
from penchant.base.text import closest, counted, short
from penchant.data.load import prompt_json, prompt_text
from penchant.distributed.world import current
from penchant.errors import ConfigError, PenchantError, RewardError, setting
from penchant.requests import check_type
from penchant.rewards.builtin import (
    BUILT_IN,
    LARGEST,
    RULES,
    RewardConfig,
    RewardFunction,
    built_in,
    kind_of,
    lacks_math_verify,
)
from penchant.types import PromptTree, TokenTree

if TYPE_CHECKING:
    import torch

    from penchant.rewards.reward_model import PolicyText

# ---- the arguments of a function ----

# besides the columns of the data, under TRL's names
OFFERED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


@dataclass(frozen=True, slots=True)
class Parameters:
    """The parameters of a reward function.

    Args:
        by_name: whether ``prompts`` and ``completions`` are passed by name, instead of as the first two arguments.
        names: further parameters; required: those of them without a default; rest: whether it takes ``**columns``.
    """

    by_name: bool = False
    names: frozenset[str] = frozenset()
    required: tuple[str, ...] = ()
    rest: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it requires."""
        return tuple(n for n in self.required if n not in OFFERED)

    @property
    def reads_columns(self) -> bool:
        return self.rest or bool(self.names - set(OFFERED))


def parameters_of(function: Any, name: str) -> Parameters:
    """Read a function's parameters from its signature.

    Raises:
        ConfigError: it takes no completions.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # C code
        return Parameters()
    rest = any(p.kind is p.VAR_KEYWORD for p in parameters)
    keyword = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = {p.name for p in keyword}
    by_name = "completions" in names or (rest and not positional)
    if not by_name:
        has_varargs = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        if len(positional) < 2 and not has_varargs:
            what = f"{name} does not take (prompts, completions)"
            raise ConfigError("reward", what, "define it as def f(prompts, completions, **columns)")
        first_two = {p.name for p in positional[:2]}
        keyword = [p for p in keyword if p.name not in first_two]
    required = tuple(p.name for p in keyword if p.default is p.empty)
    return Parameters(by_name, frozenset(p.name for p in keyword), required, rest)


@dataclass(slots=True)
class Batch:
    """The completions to score, one entry for each.

    Args:
        prompts, texts: without special tokens; rows: of the data, if known; sources: where these rows are.
        ids: token ids; columns: of the data, each a list; trees: the rollouts; step: of the run.
    """

    prompts: Sequence[str]
    texts: Sequence[str]
    rows: Sequence[PromptTree | None]
    sources: Sequence[str]
    ids: Sequence[list[int]] | None
    columns: Mapping[str, list[Any]]
    trees: Sequence[TokenTree] | None
    step: int
    metrics: dict[str, float] = field(default_factory=dict)

    def arguments(self, signature: Parameters, plain: bool, indices: Sequence[int]) -> tuple[list[Any], dict[str, Any]]:
        """The (positional, named) arguments of a call on some of the completions."""
        prompts: list[Any] = []
        completions: list[Any] = []
        for i in indices:
            row, text = self.rows[i], self.texts[i]
            prompt = self.prompts[i] if row is None else row.prompt
            as_chat = not isinstance(prompt, str) and not plain
            prompts.append(prompt_json(prompt) if as_chat else prompt_text(prompt))
            completions.append([{"role": "assistant", "content": text}] if as_chat else text)
        main: dict[str, Any] = {"prompts": prompts, "completions": completions}
        extra: dict[str, Any] = {name: [values[i] for i in indices] for name, values in self.columns.items()}
        extra["completion_ids"] = None if self.ids is None else [self.ids[i] for i in indices]
        extra["trainer_state"] = SimpleNamespace(global_step=self.step)
        extra["log_metric"] = lambda name, value: self.metrics.update({str(name): float(value)})
        extra["log_extra"] = lambda column, values: None
        if self.ids is None and "completion_ids" not in signature.required:
            del extra["completion_ids"]
        available = extra | main if signature.by_name else extra  # `main` wins over columns of the same name
        accepted = {n: v for n, v in available.items() if signature.rest or n in signature.names}
        return ([] if signature.by_name else [prompts, completions]), accepted


# ---- a sum of rewards ----


@dataclass(frozen=True, slots=True)
class RewardTerm:
    """One term of the sum: its name in the config, its function and its weight.

    Args:
        takes: the function's parameters; plain: it gets texts even for conversations; label: its name in metrics.
    """

    name: str
    function: RewardFunction
    weight: float = 1.0
    takes: Parameters = Parameters()
    plain: bool = False
    label: str = ""


@dataclass(frozen=True, slots=True)
class Judgement:
    """The rewards of a batch of completions.

    Args:
        total: the weighted sum for each completion, (n,) float64; NaN if no reward gives a value.
        terms: each reward's values by its label, (n,), NaN if it gives none; metrics: logged by the functions themselves.
    """

    total: np.ndarray
    terms: Mapping[str, np.ndarray]
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reward:
    """A weighted sum of reward functions.

    Args:
        policy: has the rows that prompts come from; timeout: seconds for each function and step; None: no limit.
    """

    terms: tuple[RewardTerm, ...]
    policy: PolicyText | None = None
    timeout: float | None = None

    @property
    def compares(self) -> bool:
        """Whether it only compares several completions of a prompt."""
        return all(getattr(term.function, "group", False) for term in self.terms)

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], trees: Sequence[TokenTree] | None = None
    ) -> np.ndarray:
        """The reward of each completion, (n,) float64; NaN if no function gives a value. See `judge`."""
        return self.judge(prompts, completions, trees).total

    def judge(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        trees: Sequence[TokenTree] | None = None,
        step: int = 0,
    ) -> Judgement:
        """Score each completion with every function, and sum by weight.

        A function that returns None for a completion is left out of its sum. All ranks call this; only rank 0 calls the
        functions, while a reward model runs on every rank.

        Args:
            prompts, completions: texts without special tokens; trees: the rollouts of these texts, completions in the same
                order, which identify rows and are passed to functions with a method `score_trees` (reward models) instead.

        Raises:
            RewardError: a function raised, took too long, or gave something other than one finite number (or None) per
                completion; it names the function and the first completion at fault.
        """
        world = current()
        with world.together():
            batch = self._make_batch(prompts, completions, trees, step)
        local_terms = [term for term in self.terms if world.leads and not _is_model(term)]
        values: dict[str, np.ndarray] = {}
        with world.together(patient=True):
            values |= {term.label or term.name: _values(term, batch, self.timeout) for term in local_terms}
        function_values, metrics = world.share((values, batch.metrics))
        with world.together(patient=True):
            models = {t.label or t.name: _values(t, batch, self.timeout) for t in self.terms if _is_model(t)}
        values = {t.label or t.name: (function_values | models)[t.label or t.name] for t in self.terms}
        weights = [term.weight for term in self.terms]
        total = np.zeros(len(completions))
        has_value = np.zeros(len(completions), dtype=bool)
        for weight, scores in zip(weights, values.values(), strict=True):
            total += weight * np.nan_to_num(scores)
            has_value |= ~np.isnan(scores)
        return Judgement(np.where(has_value, total, np.nan), values, metrics)

    def _make_batch(
        self, prompts: Sequence[str], completions: Sequence[str], trees: Sequence[TokenTree] | None, step: int
    ) -> Batch:
        n = len(completions)
        sources = [t.source for t in trees for _ in t.completion_ids] if trees is not None else [""] * n
        rows_by_source = self.policy.rows if self.policy is not None else {}
        rows = [rows_by_source.get(source) for source in sources]
        names = dict.fromkeys(name for row in rows if row is not None for name in row.columns)
        if self.policy is not None:
            names |= dict.fromkeys(self.policy.columns)
        columns = {name: [None if r is None else r.columns.get(name) for r in rows] for name in names}
        ids = [c.tolist() for t in trees for c in t.completion_ids] if trees is not None else None
        ambiguous = next((s for s in sources if s in rows_by_source and rows_by_source[s] is None), None)
        if names and ambiguous is not None:
            what = f"{ambiguous} stands for rows of several files, so the columns of its row are not known"
            raise RewardError("reward", what, "give the data files different names")
        return Batch(prompts, completions, rows, sources, ids, columns, trees, step)


def _is_model(term: RewardTerm) -> bool:
    return hasattr(term.function, "score_trees")


def _values(term: RewardTerm, batch: Batch, timeout: float | None) -> np.ndarray:
    n = len(batch.texts)
    score_trees = getattr(term.function, "score_trees", None) if batch.trees is not None else None
    missing = [c for c in term.takes.columns if c not in batch.columns]
    if missing and score_trees is None:
        raise _no_column(term.name, missing[0], batch.columns, RewardError)
    if score_trees is None and batch.ids is None and "completion_ids" in term.takes.required:
        what = "needs token ids, which are not available here"
        raise RewardError(f"reward {term.name}", what, "use it where a model writes: in training, eval or compare")
    try:
        output = _call(term, batch, range(n), timeout) if score_trees is None else score_trees(batch.trees)
    except (Exception, SystemExit, TookTooLong) as error:  # sys.exit in a function must not end the run silently
        if isinstance(error, PenchantError):  # keep its message; there is no function to fix
            raise RewardError(f"reward {term.name}", error.what, error.how) from error
        retry_singly = score_trees is None and kind_of(term.name) not in ("judge", "http")
        index = _first_failing(term, batch, timeout) if retry_singly else None
        culprit = f" ({_named_completion(batch, index)})" if index is not None else ""
        if isinstance(error, TookTooLong):
            what = f"gave no answer within {timeout:g} seconds{culprit}"
            raise RewardError(f"reward {term.name}", what, "fix the function, or raise reward.timeout") from error
        how = "fix the function; it gets lists of prompts and completions and returns one number each"
        raise RewardError(f"reward {term.name}", f"{type(error).__name__}: {error}{culprit}", how) from error
    values = _numbers(term.name, output, batch)
    if values.shape != (n,):
        shape = (
            "" if values.ndim == 1 else f" (an array of shape {list(values.shape)})" if values.ndim else " (no list)"
        )
        what = f"returned {values.size} values{shape} for {counted(n, 'completion')}"
        raise RewardError(f"reward {term.name}", what, "return one number for each completion, in order")
    items = (
        output
        if isinstance(output, (list, tuple)) or getattr(getattr(output, "dtype", None), "hasobject", False)
        else ()
    )
    is_none = np.array([v is None for v in items]) if len(items) else np.zeros(n, dtype=bool)
    invalid = np.flatnonzero(~(np.abs(values) <= LARGEST) & ~is_none)  # NaN too
    if len(invalid):
        index = int(invalid[0])
        how = "return finite numbers (float32 holds them), or None where it says nothing of a completion"
        raise RewardError(f"reward {term.name}", f"returned {values[index]} for {_named_completion(batch, index)}", how)
    return values


def _named_completion(batch: Batch, index: int) -> str:
    row = f" of row {batch.sources[index]}" if batch.sources[index] else ""
    return f"completion {index}{row}: {batch.texts[index][:60]!r}"


def _no_column(
    name: str, column: str, available: Mapping[str, Any] | Sequence[str], kind: type[PenchantError]
) -> PenchantError:
    suggestion = closest(column, available)
    columns = f"the rows have {', '.join(available)}" if available else "the rows have no further columns"
    how = f'did you mean "{suggestion}"? ' if suggestion else ""
    what = f'{name} takes "{column}", and there is no such column; {columns}'
    return kind(
        "reward",
        what,
        f"{how}map one with {setting('data.columns', {column: 'YOURS'})}, or give the argument a default",
    )


# ---- one call ----


def _call(term: RewardTerm, batch: Batch, indices: Sequence[int], timeout: float | None) -> Any:
    """Call a function on some completions."""
    positional, named = batch.arguments(term.takes, term.plain, indices)

    def call() -> Any:
        output = term.function(*positional, **named)
        return _run_awaitable(output) if inspect.isawaitable(output) else output

    return guarded(call, timeout)


def _run_awaitable(awaitable: Any) -> Any:
    async def wait() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait())
    return in_thread(lambda: asyncio.run(wait()), None)  # a notebook already runs an event loop


def _numbers(name: str, result: Any, batch: Batch) -> np.ndarray:
    if result is None:
        raise RewardError(f"reward {name}", "returned None", "return a list of numbers")
    try:
        if getattr(getattr(result, "dtype", None), "kind", "") in ("O", "S", "U"):  # an array of texts, or of objects
            result = list(result)
        if isinstance(result, (list, tuple)):
            result = [_plain(v) for v in result]
        return np.asarray(_plain(result), dtype=np.float64)
    except Exception as error:  # converting the elements may raise anything
        what = f"returned {type(result).__name__} that holds no numbers"
        index = _first_without_number(result)
        if index is not None and index < len(batch.texts):
            what = f"returned {short(repr(result[index]), 60)} for {_named_completion(batch, index)}"
        raise RewardError(f"reward {name}", what, "return a list of numbers") from error


def _plain(value: Any) -> Any:
    """Convert a tensor to an array; numpy itself refuses gradients, GPUs and bf16.

    Raises:
        TypeError: a text, which numpy would parse as a number.
    """
    if isinstance(value, (str, bytes)):
        raise TypeError(value)
    return value.detach().cpu().double().numpy() if hasattr(value, "detach") else value


def _first_without_number(values: Any) -> int | None:
    """Index of the first element of a list that is neither a number nor None."""
    if not isinstance(values, (list, tuple)):
        return None
    for i, value in enumerate(values):
        try:
            np.asarray(_plain(value), dtype=np.float64)
        except Exception:
            return i
    return None


def _first_failing(term: RewardTerm, batch: Batch, timeout: float | None) -> int | None:
    """Index of the first completion that also fails alone, or None; the search takes no longer than the timeout."""
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    for i in range(len(batch.texts)):
        started = time.monotonic()
        if started >= deadline:
            break
        try:
            _call(term, batch, [i], None if timeout is None else deadline - started)
        except TookTooLong:  # if many are slow, the one in progress is not at fault
            return i if time.monotonic() - started > (timeout or 0.0) / 2 else None
        except (Exception, SystemExit):
            return i
    return None


# ---- from a config ----


def reward_config(spec: Any) -> RewardConfig:
    """The config of a reward as a user gives it.

    Raises:
        ConfigError: it is something other than names and weights.
    """
    check_type("reward", spec, "str | Sequence[Any] | Mapping[Any, Any] | RewardConfig")
    try:
        return spec if isinstance(spec, RewardConfig) else RewardConfig.model_validate(spec)
    except ValidationError as error:
        what, _, how = error.errors()[0]["msg"].removeprefix("Value error, ").partition("; ")
        raise ConfigError("reward", what, how or "write NAME or {NAME: WEIGHT, ...}") from error


def load_reward(spec: Any, policy: PolicyText | None = None, device: Any = "cpu") -> Reward:
    """Load a reward: a name, ``path.py:function``, a reward model's folder, a mapping of those to weights, or a list of them.

    Args:
        policy: whose completions are scored; device: of reward models, unless the config sets it.

    Raises:
        ConfigError: no such built-in, file, folder or function, or one that requires a column missing in the rows.
    """
    config = reward_config(spec)
    if not config.terms:
        raise ConfigError("reward", "is empty", f"name one: {', '.join(BUILT_IN)}, path.py:function or a folder")
    if "accuracy" in config.terms and importlib.util.find_spec("math_verify") is None:
        raise lacks_math_verify("math_verify")
    labels = labels_of(config.terms)
    terms = []
    for name, weight in config.terms.items():
        function = _load_term(name, config, policy, device)
        is_function = not hasattr(function, "score_trees")
        parameters = parameters_of(function, name) if is_function else Parameters()
        if is_function and policy is not None and policy.rows:
            for column in parameters.columns:
                if column not in policy.columns:
                    raise _no_column(name, column, policy.columns, ConfigError)
        plain = kind_of(name) is not None and kind_of(name) != "http"
        terms.append(RewardTerm(name, function, float(weight), parameters, plain, labels[name]))
    return Reward(tuple(terms), policy, config.timeout)


def labels_of(names: Sequence[str] | Mapping[str, Any]) -> dict[str, str]:
    """Map rewards to names in metrics: a function's name, a folder's last part; the full name if that is ambiguous."""
    labels = {n: n.rpartition(":")[2] if is_own(n) else n if kind_of(n) else Path(n).name or n for n in names}
    all_labels = list(labels.values())
    return {n: s if all_labels.count(s) == 1 else n for n, s in labels.items()}


def reads_columns(spec: Any) -> bool:
    """Whether a reward (as for `load_reward`, or None) reads columns of the rows besides prompt and completion.

    Raises:
        ConfigError: a function that cannot be loaded.
    """
    if spec is None:
        return False
    try:
        config = spec if isinstance(spec, RewardConfig) else RewardConfig.model_validate(spec)
    except ValidationError:
        return False  # loading it will report this
    return any(
        parameters_of(_load_term(name, config, None, "cpu"), name).reads_columns
        for name in config.terms
        if is_own(name) or kind_of(name) is not None
    )


def _load_term(name: str, config: RewardConfig, policy: PolicyText | None, device: Any) -> RewardFunction:
    if kind_of(name) is not None:
        return built_in(name, config.options.get(name))
    if is_own(name):
        return _function(name)
    from penchant.rewards.reward_model import find_reward_model, load_reward_function

    folder = find_reward_model(name)
    if folder is None:
        return _function(name)  # raises, as there is none
    return load_reward_function(name, folder, reward_device(config.device, device), policy)


def check_reward_name(name: str) -> None:
    """Refuse an unknown reward by its name or missing file, without loading anything."""
    exists = Path(name.rpartition(":")[0] if is_own(name) else name).expanduser().exists()
    kind, colon, argument = name.partition(":")
    if colon and kind in RULES:
        RULES[kind](argument)
    elif kind_of(name) is None and not exists:
        _function(name)


def check_reward(name: str) -> None:
    """Refuse a missing reward as `load_reward` does, without loading a model."""
    check_reward_name(name)
    if kind_of(name) is not None:
        return
    from penchant.rewards.reward_model import find_reward_model

    if is_own(name) or find_reward_model(name) is None:
        _function(name)


def reward_device(wanted: str, policys: Any = "cpu") -> torch.device:
    """The device of reward models; auto is the policy's."""
    from penchant.models.load import resolve_place

    return resolve_place("reward.device", wanted, policys)


def _function(name: str) -> RewardFunction:
    if not is_own(name):
        if name.startswith("stage:"):
            raise ConfigError("reward", f"{name!r} is a pipeline's stage", "here give that stage's run folder")
        if "/" in name:
            how = "give a reward model's folder or run, or path.py:function"
            raise ConfigError("reward", f"{name}: no such folder", how)
        suggestion = closest(name, BUILT_IN)
        raise ConfigError(
            "reward",
            f"{name!r} is not a reward",
            (f"did you mean {suggestion}? " if suggestion else "")
            + f"there are {', '.join(BUILT_IN)}, words:20-60, matches:REGEX, format:REGEX; or give path.py:function or a reward model's folder",
        )
    function = python_object(name, "reward")
    parameters_of(function, name)
    return function  # type: ignore[no-any-return]
