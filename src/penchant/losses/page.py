"""Text of `penchant losses` and docs/losses.md, generated from the registry."""

from __future__ import annotations

import inspect
import re
from typing import Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from penchant.base.section import as_yaml, bounds
from penchant.losses import LOSSES, LossSpec
from penchant.losses.own import find_loss
from penchant.losses.registry import NEEDS
from penchant.losses.section import LossModifiers, loss_name

NOTATION = (
    "x prompt, y_w chosen and y_l rejected completion, pi policy, ref reference; log-probs are summed over a completion (nats), "
    "d = log pi(y|x) - log ref(y|x), h = d_w - d_l, a = log pi(y|x) / |y|, s = score"
)
MARKUP = re.compile(r"(?::\w+:)?`+([^`]*)`+")  # of docstrings: ``code``, :math:`...`
GROUPS = {
    "pairs, against a reference": lambda s: s.signal == "pairs" and "reference" in s.needs,
    "pairs, without a reference": lambda s: s.signal == "pairs" and "reference" not in s.needs,
    "single answers with a label (pairs are taken apart)": lambda s: s.signal == "unpaired",
    "lists of scored answers": lambda s: s.signal == "lists",
    "targets": lambda s: s.signal == "tokens",
}


def parameters(spec: LossSpec) -> list[tuple[str, str, str]]:
    """(name in a config, default, meaning with choices or range) of each hyperparameter."""
    return [
        (info.alias or name, as_yaml(info.default), (info.description or "") + _allowed(info))
        for name, info in spec.params.model_fields.items()
    ]


def _allowed(info: FieldInfo) -> str:
    """`` [one or two]`` or `` [> 0, < 0.5]``, from the field's type and bounds."""
    choices = get_args(info.annotation) if get_origin(info.annotation) is Literal else ()
    allowed = " or ".join(map(str, choices)) or bounds(info)
    return f" [{allowed}]" if allowed else ""


def _more(spec: LossSpec) -> list[str]:
    """What a loss needs beyond what its group already states: reference, labels, scores of lists."""
    stated = {"reference", "labels", *({"scores"} if spec.signal == "lists" else ())}
    return sorted(spec.needs - stated)


def text() -> str:
    """Every loss in a few lines."""
    lines = [NOTATION, ""]
    for title, in_group in GROUPS.items():
        lines += [title.upper(), ""]
        for spec in filter(in_group, LOSSES.values()):
            lines.append(spec.name + (f"  arXiv {spec.paper}" if spec.paper else ""))
            lines.append(f"    {spec.formula}")
            lines += [f"    needs {NEEDS[n]}" for n in _more(spec)]
            lines += [f"    {name} = {default}: {meaning}" for name, default, meaning in parameters(spec)]
        lines.append("")
    lines += ["ANY LOSS", ""]
    lines += [f"    {name} = {as_yaml(i.default)}: {i.description}" for name, i in LossModifiers.model_fields.items()]
    lines.append("    mix: [{name: dpo, weight: 0.8}, {name: sft, weight: 0.2}]: several losses by weight")
    lines.append("    a number may follow a schedule: beta: {from: 0.1, to: 0.5, shape: linear} (or cosine)")
    return "\n".join(lines)


def describe(name: str) -> str:
    """Describe one loss: how to name it, its docstring, what it needs, and its hyperparameters with ranges."""
    spec = find_loss(config_name := loss_name(name, ("losses",)))
    docstring = re.sub(r"(?:Args|Returns|Raises):\n(?: +.*\n)+\n*", "", inspect.cleandoc(spec.fn.__doc__ or "") + "\n")
    lines = [f"loss.name={config_name}", ""]
    lines += [MARKUP.sub(r"\1", docstring.strip()), ""] if docstring.strip() else []
    lines += [f"needs {NEEDS[n]}" for n in sorted(spec.needs)]
    lines += [f"loss.{key} = {default}" + f": {meaning}" * bool(meaning) for key, default, meaning in parameters(spec)]
    return "\n".join(lines)


def markdown() -> str:
    """The text of docs/losses.md."""
    lines = [
        "# Losses",
        "",
        "Written by `penchant losses --markdown` from the registry; a test compares the two. `penchant losses NAME` describes one in full.",
        "",
        f"Notation: {NOTATION}.",
        "",
    ]
    for title, in_group in GROUPS.items():
        lines += [
            f"## {title[0].upper()}{title[1:]}",
            "",
            "| `loss.name` | loss | hyperparameters | paper |",
            "|---|---|---|---|",
        ]
        for spec in filter(in_group, LOSSES.values()):
            hyperparameters = "<br>".join(f"`{n}` {d}: {m}" for n, d, m in parameters(spec))
            needs = "".join(f"<br>Needs {NEEDS[n]}." for n in _more(spec))
            paper = f"[{spec.paper}](https://arxiv.org/abs/{spec.paper})" if spec.paper else ""
            formula = spec.formula.replace("|", "\\|")
            lines.append(
                f"| `{spec.name}` | `{formula}`{needs} | {hyperparameters.replace('|', chr(92) + '|')} | {paper} |"
            )
        lines.append("")
    lines += [
        "## Any loss",
        "",
        "| key | meaning |",
        "|---|---|",
        *(f"| `loss.{n}` ({as_yaml(i.default)}) | {i.description} |" for n, i in LossModifiers.model_fields.items()),
        "| `loss.mix` | several losses by weight: `mix: [{name: dpo, weight: 0.8, beta: 0.1}, {name: sft, weight: 0.2}]` |",
        "| `reference.ema`, `reference.sync_every`, `reference.sync_mixup` | a reference that follows the policy "
        "([2404.09656](https://arxiv.org/abs/2404.09656)) |",
        "",
        "**Schedules.** Any numeric hyperparameter of any loss (not the modifiers above, nor the weights of a mix) may change over the run: `beta: {from: 0.1, to: 0.5, shape: linear}`. "
        "`from` holds at the first optimizer step and `to` at the last one, exactly; `shape` is linear or cosine. The current "
        "value is in every training line of `metrics.jsonl`; held-out figures are with the last step's value.",
        "",
        "**Where there is no bound.** PMPO pushes rejected answers down without end where the divergence does not outweigh them: "
        "with `direction=ref_policy`, a token's optimum is `p* = (alpha A - (1 - alpha) R + beta q) / (2 alpha - 1 + beta)` (A, R the "
        "shares of accepted and rejected answers, q the reference), which exists only where no token's value is negative. "
        "`train.logp_floor` (mean log-prob per token of a step, -50) and `train.divergence_ceiling` stop such a run with a sentence.",
    ]
    return "\n".join(lines) + "\n"
