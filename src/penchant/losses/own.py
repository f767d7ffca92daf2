"""A user's own loss, from a file: ``loss.name: my_losses.py:my_loss``. It is checked like our own losses when it is loaded."""

from __future__ import annotations

import functools
import inspect
import math
from dataclasses import fields, replace
from typing import Any

from penchant.base.files import file_sha256
from penchant.base.functions import is_own, own_file, python_function
from penchant.base.lazy import Tensor, torch
from penchant.errors import ConfigError
from penchant.losses.registry import LOSSES, LossSpec, Signal, params_of
from penchant.types import ListLogps, PairLogps, UnpairedLogps, check_output

Inputs = PairLogps | UnpairedLogps | ListLogps

ROWS = 6  # of the inputs that a loss is checked with
FAR = 1e4  # nats: log-ratios at which a loss must stay finite


def find_loss(name: str, where: str = "loss.name") -> LossSpec:
    """Look up a loss by name, in the registry or in a user's file.

    Args:
        where: the key that names it, for errors.

    Raises:
        ConfigError: no such file or function, or the function is not a valid loss; the message says why.
        KeyError: no such loss in the registry.
    """
    if not is_own(name):
        return LOSSES[name]
    file = own_file(name)
    if not file.is_file():
        raise ConfigError(where, f"{file}: no such file", "give the path of a Python file, then :function")
    return _load(str(file.resolve()), name.rpartition(":")[2], file_sha256(file), where)


@functools.lru_cache(maxsize=64)
def _load(file: str, attribute: str, sha256: str, where: str) -> LossSpec:
    """Load a loss from a file, once for each content of the file."""
    name = f"{file}:{attribute}"
    registered = dict(LOSSES)
    for other in [n for n, s in registered.items() if not s.fn.__module__.startswith("penchant.losses.")]:
        del LOSSES[other]  # a program may have imported this file, or another with a loss of the same name
    try:
        function = python_function(name, where, ("logps",))
        if not inspect.isfunction(function):
            raise ValueError("is not a function")
        spec = next((s for s in LOSSES.values() if s.fn is function), None) or _spec_of_plain_function(function)
        check(spec)
    except ValueError as error:
        raise ConfigError(where, f"{name}: {error}", "fix the function; docs/own_losses.md has an example") from error
    finally:  # own losses are identified by file: two files may use the same name
        LOSSES.clear()
        LOSSES.update(registered)
    return spec


def _spec_of_plain_function(function: Any) -> LossSpec:
    """The spec of a function without `@loss`: against a reference, on pairs or, by annotation, `UnpairedLogps` or `ListLogps`."""
    name = function.__name__
    if name in LOSSES:
        raise ValueError(f"there is a loss called {name} already; choose another name")
    first_parameter = next(iter(inspect.signature(function).parameters.values()))
    annotation = str(first_parameter.annotation)
    signal: Signal = "unpaired" if "UnpairedLogps" in annotation else "lists" if "ListLogps" in annotation else "pairs"
    extra_needs = {"unpaired": {"labels"}, "lists": {"scores"}}.get(signal, set())
    return LossSpec(
        name=name,
        signal=signal,
        needs=frozenset({"reference", *extra_needs}),
        fn=function,
        params=params_of(function),
        formula=(inspect.getdoc(function) or name).splitlines()[0],
    )


# ---- Checks of a loss ----


def check(spec: LossSpec) -> None:
    """Check a loss with its default hyperparameters.

    Raises:
        ValueError: it fails, does not return one loss per row, gives losses or gradients that are not finite (on ordinary rows, with
            policy and reference equal, or at log-ratios of +-1e4 nats), does not depend on the policy, or differs from its declared
            value when policy and reference are equal.
    """
    ordinary: Any = _sample_inputs(spec)
    gradients = _run_and_check(spec, ordinary, "on ordinary log-probs")
    if not any(bool(g.abs().sum() > 0) for g in gradients):
        raise ValueError("no gradient reaches the policy's log-probs")
    equal = replace(
        ordinary, **{k: getattr(ordinary, k.replace("ref_", "policy_")) for k in _tensor_fields(ordinary, "ref_")}
    )
    if isinstance(equal, UnpairedLogps):
        equal = replace(equal, z0=0.0, delta=0.0)
    _run_and_check(spec, equal, "where policy and reference are equal")
    for key in [k for k in _tensor_fields(ordinary, "policy_") if k.endswith("logps") and "shared" not in k]:
        for policy, ref in ((-FAR, -1.0), (-1.0, -FAR)):
            ref_key = key.replace("policy_", "ref_")
            extreme = {k: torch.full_like(getattr(ordinary, key), v) for k, v in ((key, policy), (ref_key, ref))}
            _run_and_check(spec, replace(ordinary, **extreme), f"at a log-ratio of {policy - ref:+.0f} nats")
    if spec.equal_policy_loss is not None:
        _check_value(spec, equal)


def _check_value(spec: LossSpec, equal: Inputs) -> None:
    arguments = spec.params().arguments()
    assert spec.equal_policy_loss is not None
    try:
        declared = float(spec.equal_policy_loss(**arguments))
    except Exception as error:
        raise ValueError(f"its `equal` raises {type(error).__name__}: {error}") from error
    for value in spec.fn(equal, **arguments).losses.tolist():
        if not math.isclose(value, declared, rel_tol=1e-4, abs_tol=1e-5):
            raise ValueError(f"gives {value:g} where policy and reference are equal, and declares {declared:g}")


def _run_and_check(spec: LossSpec, logps: Inputs, when: str) -> list[Tensor]:
    """Run a loss, check its output, and return the gradients of its policy inputs."""
    names = [k for prefix in ("policy_", "div", "weighted_") for k in _tensor_fields(logps, prefix)]
    leaves = {k: getattr(logps, k).clone().requires_grad_() for k in names}
    try:
        out = spec.fn(replace(logps, **leaves), **spec.params().arguments())
    except Exception as error:
        raise ValueError(f"raises {type(error).__name__} {when}: {error}") from error
    check_output(out)
    summands = {**out.summands(), **out.metrics}
    for name, (values, _) in summands.items():
        label = "losses" if name == "main" else name
        shape = list(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        if shape != [ROWS]:
            raise ValueError(f"gives {label} of shape {shape} for {ROWS} rows; give one for each, (batch,)")
        if not torch.isfinite(values).all():
            raise ValueError(f"gives {label} that are not finite {when}")
        if name in out.metrics and values.requires_grad:
            raise ValueError(f"gives {label} with a gradient; detach() metrics")
    total = sum(values.sum() for values, _ in out.summands().values())
    if not isinstance(total, torch.Tensor) or not total.requires_grad:
        raise ValueError("no gradient reaches the policy's log-probs")
    total.backward()
    gradients = [leaf.grad for leaf in leaves.values() if leaf.grad is not None]
    if not all(torch.isfinite(g).all() for g in gradients):
        raise ValueError(f"has a gradient that is not finite {when}")
    return gradients


def _tensor_fields(logps: Inputs, prefix: str) -> list[str]:
    """Names of the fields that start with `prefix` and hold a tensor."""
    return [f.name for f in fields(logps) if f.name.startswith(prefix) and getattr(logps, f.name) is not None]


def _sample_inputs(spec: LossSpec) -> Inputs:
    """Ordinary float32 rows with every input that a loss could need."""
    generator = torch.Generator().manual_seed(0)

    def positive() -> Tensor:
        return torch.randn(ROWS, generator=generator).abs() * 3

    lengths = torch.arange(1.0, ROWS + 1)
    if spec.signal == "lists":
        policy, ref, scores = (torch.stack([positive() for _ in range(3)], 1) for _ in range(3))
        present = torch.arange(3) < 2 + torch.arange(ROWS)[:, None] % 2
        return ListLogps(-policy - 1, present, -ref - 1, scores, lengths[:, None].expand(ROWS, 3))
    if spec.signal != "pairs":
        labels = (torch.arange(ROWS) % 3 != 0).float()
        ordinary = -positive() - 1, lengths, -positive() - 1, labels, positive()
        return UnpairedLogps(*ordinary, z0=0.3, delta=0.2, weighted_logps=-positive() - 1)
    scores = positive()
    return PairLogps(
        **{f.name: -positive() - 1 for f in fields(PairLogps) if "logps" in f.name},
        chosen_lengths=lengths,
        rejected_lengths=lengths.flip(0),
        chosen_scores=scores,
        rejected_scores=scores - positive() - 0.1,
        chosen_alignment=-positive() / 9,
        rejected_alignment=-positive() / 9,
    )
