"""The registry of losses. A loss is a pure function whose keyword-only arguments are its hyperparameters; `@loss` registers it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, Field, create_model, model_validator

from penchant.base.section import Section, refuse_idle
from penchant.losses.schedules import Schedule
from penchant.types import LossOutput

Signal = Literal["tokens", "pairs", "unpaired", "lists"]
INPUTS = {"pairs": "PairLogps", "lists": "ListLogps"}  # a loss's input by signal; else UnpairedLogps
Function = TypeVar("Function", bound=Callable[..., LossOutput])
Idle = Callable[..., Mapping[str, str]]  # keys without effect under these hyperparameters, each with a reason

# what a loss may need beyond policy log-probs and lengths, and its description
NEEDS: Mapping[str, str] = {
    "reference": "log-probs of a reference model",
    "scores": "a score of each completion",
    "score_gap": "a chosen score above the rejected one",
    "labels": "a label (good or bad) of each completion",
    "shared_logps": "log-probs summed over the tokens that both completions of a pair have",
    "token_probs": "log-probs weighed by each token's own probability",
    "alignment": "how likely each token is under the policy compared with a token that the policy samples",
    "divergence": "the exact divergence from the reference over the whole vocabulary (a reference that runs in each step)",
    "z0": "log-ratios of mismatched completions (a prompt with another prompt's completion)",
    "delta": "the running mean of rewards",
    "batch": "the log-probs of the whole optimizer step at once",
}


class LossParams(Section):
    """Base of every loss's hyperparameters; each field carries its range and a one-line description."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", populate_by_name=True)

    argument_names: ClassVar[tuple[str, ...]] = ()  # the keyword-only arguments of the loss function
    idle: ClassVar[Idle] = staticmethod(lambda **_: {})  # of those arguments, see `loss`

    @model_validator(mode="after")
    def _check_idle(self) -> LossParams:
        refuse_idle(self, type(self).idle(**self.arguments()))
        return self

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of the loss function."""
        return {name: getattr(self, name) for name in self.argument_names}

    def to_mapping(self) -> dict[str, Any]:
        """The config mapping that gives these values again."""
        return self.model_dump(mode="json", by_alias=True)

    def schedules(self) -> dict[str, Schedule]:
        """Arguments that the loss itself schedules over the run (DPO-Shift's lambda)."""
        return {}


@dataclass(frozen=True, slots=True)
class LossSpec:
    """A registered loss.

    Args:
        name: its `loss.name` in a config.
        signal: ``tokens`` (every completion is a target), ``pairs`` (chosen against rejected), ``unpaired`` (labeled completions) or
            ``lists`` (scored completions of a prompt).
        needs: what it needs beyond policy log-probs and lengths; keys of `NEEDS`.
        fn: the loss; called as ``fn(logps, **arguments)`` with `PairLogps`, `UnpairedLogps` or `ListLogps`, returns `LossOutput`.
        params: the typed hyperparameters.
        formula: one line, as `penchant losses` prints it.
        paper: arXiv id, or an empty string.
        equal_policy_loss: the loss's value per example when policy and reference are equal, as a function of the
            arguments; None if there is no such value.
        uses_lengths: whether it averages or weights by length itself, so that it must get summed log-probs.
        lr: peak learning rates for ``train.lr: auto``: of the whole model, of an adapter.
        terms: the further terms of its `LossOutput`.
    """

    name: str
    signal: Signal
    needs: frozenset[str]
    fn: Callable[..., LossOutput]
    params: type[LossParams]
    formula: str
    paper: str = ""
    equal_policy_loss: Callable[..., float] | None = None
    uses_lengths: bool = False
    lr: tuple[float, float] = (5e-6, 5e-5)
    terms: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = self.needs - NEEDS.keys()
        if unknown:
            raise ValueError(f"{self.name} needs {sorted(unknown)}, which no engine provides")


LOSSES: dict[str, LossSpec] = {}


@dataclass(frozen=True)
class Range:
    """The range of a hyperparameter, for `Annotated`: ``Range(ge=0, lt=0.5)``."""

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None


@dataclass(frozen=True)
class Key:
    """A hyperparameter's name in a config, if the argument cannot have it: ``Key("lambda")``."""

    name: str


# hyperparameters that many losses share
Beta = Annotated[float, Range(gt=0), "strength of the pull towards the reference"]
LabelSmoothing = Annotated[float, Range(ge=0, lt=0.5), "assumed share of flipped labels"]


def loss(
    name: str,
    formula: str,
    *,
    paper: str = "",
    signal: Signal = "pairs",
    needs: Iterable[str] = ("reference",),
    equal: float | Callable[..., float] | None = None,
    uses_lengths: bool = False,
    lr: tuple[float, float] = (5e-6, 5e-5),
    terms: tuple[str, ...] = (),
    params: type[LossParams] = LossParams,
    idle: Idle | None = None,
) -> Callable[[Function], Function]:
    """Register a pure function as a loss.

    Its keyword-only arguments are the hyperparameters, with default, range and meaning in the signature, as in
    ``beta: Annotated[float, Range(gt=0), "strength of the pull towards the reference"] = 0.1``. The formula and the paper are added
    to its docstring.

    Args:
        name, formula, paper, signal, needs, uses_lengths, lr, terms: see `LossSpec`.
        equal: the loss when policy and reference are equal: a number, or a function of the hyperparameters.
        params: a base class with settings that are not arguments of the function (DPO-Shift's schedule).
        idle: which hyperparameters have no effect beside the others, and why, as in `refuse_idle`.

    Raises:
        ValueError: another loss has the name, or a hyperparameter has no default or a type that a config cannot express.
    """

    def register(fn: Function) -> Function:
        existing = LOSSES.get(name)
        if existing is not None and existing.fn.__module__ != fn.__module__:
            raise ValueError(f"there is a loss called {name} already; choose another name")
        equal_policy_loss = equal if callable(equal) or equal is None else lambda **_: equal
        fn_params = params_of(fn, params)
        if idle is not None:
            fn_params.idle = staticmethod(idle)
        spec = LossSpec(
            name, signal, frozenset(needs), fn, fn_params, formula, paper, equal_policy_loss, uses_lengths, lr, terms
        )
        fn.__doc__ = _full_docstring(spec)
        LOSSES[name] = spec
        return fn

    return register


def params_of(fn: Callable[..., Any], base: type[LossParams] = LossParams) -> type[LossParams]:
    """Derive the typed hyperparameters of a loss from its keyword-only arguments.

    Raises:
        ValueError: one of them has no default, or a type that a config cannot express.
    """
    arguments = {n: p for n, p in inspect.signature(fn).parameters.items() if p.kind is p.KEYWORD_ONLY}
    # resolve keyword-only arguments only: the types of the others (Tensor, LossOutput) may not be importable
    annotated = {n: p.annotation for n, p in arguments.items() if p.annotation is not p.empty}
    hints = get_type_hints(
        SimpleNamespace(__annotations__=annotated), getattr(fn, "__globals__", {}), include_extras=True
    )
    fields: dict[str, Any] = {}
    for name, p in arguments.items():
        if p.default is p.empty:
            raise ValueError(f"{name} has no default")
        hint = hints.get(name, type(p.default))
        kind, *extras = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if kind not in (float, int, bool, str) and get_origin(kind) is not Literal:
            raise ValueError(f"{name} is neither a number, a text, a bool nor a Literal")
        bounds = next((e for e in extras if isinstance(e, Range)), Range())
        fields[name] = (
            kind,
            Field(
                p.default,
                alias=next((e.name for e in extras if isinstance(e, Key)), None),
                description=next((e for e in extras if isinstance(e, str)), ""),
                **vars(bounds),
            ),
        )
    title = f"{getattr(fn, '__name__', 'Loss')}Params"
    params_type = _create_params(title, LossParams, fields)
    if base is not LossParams:  # the function's arguments first, then the base's settings
        params_type = _create_params(title, (base, params_type), {})
    params_type.argument_names = tuple(fields)
    return params_type


def _create_params(title: str, base: Any, fields: dict[str, Any]) -> type[LossParams]:
    return create_model(title, __base__=base, **fields)  # type: ignore[no-any-return]


def _full_docstring(spec: LossSpec) -> str:
    """The function's docstring, completed from the decorator's arguments."""
    kind = INPUTS.get(spec.signal, "UnpairedLogps")
    shape = "(lists, k)" if spec.signal == "lists" else "(batch,)"
    parts = [
        inspect.cleandoc(spec.fn.__doc__ or spec.name),
        f"``loss = {spec.formula}``",
        f"Args:\n    logps: `{kind}`: log-probs summed over completions in nats, lengths in tokens, each of shape {shape}.",
        "Returns:\n    Losses of shape (batch,), and metrics without gradient.",
        "Raises:\n    ValueError: when a tensor is missing or its shape differs.",
    ]
    return "\n\n".join([*parts, f"Paper: arXiv {spec.paper}."] if spec.paper else parts)
