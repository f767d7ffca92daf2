"""`penchant init`: a starting config from three answers (data, model, goal)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penchant.algorithms.method import SMALL_MODEL, auto_lr
from penchant.base.files import packaged_yaml, writing
from penchant.base.machine import machine_memory
from penchant.base.text import counted, did_you_mean
from penchant.config import config_from_mapping, load_config
from penchant.config.yaml import dump_yaml
from penchant.data.layouts import LAYOUTS
from penchant.errors import ConfigError, DiskError
from penchant.init.look import DataFacts, HeldOut, ModelFacts
from penchant.metrics.stats import rows_to_detect
from penchant.rewards.functions import check_reward

__all__ = ["Start", "propose", "write_config"]


# ---- Goals (goals.yaml): what each needs of the data and writes into a config ----

Lines = Mapping[str, Sequence[Any]]  # key: (value, reason)


@dataclass(frozen=True, slots=True)
class Goal:
    """One goal of a run.

    Args:
        name: as in `--goal`; about: one line; kinds: kinds of data it learns from, best fit first.
        batch_size: rows per step; section: the config section that selects the method.
        online: whether the model generates its own answers, scored by a reward.
    """

    name: str
    about: str
    kinds: Sequence[str]
    batch_size: int
    section: Mapping[str, Lines]
    online: bool = False

    @property
    def default_lr(self) -> Sequence[float]:
        """(whole model, adapter): learning rates of ``train.lr: auto`` for the goal's method."""
        values: dict[str, Any] = {s: {k: v[0] for k, v in keys.items()} for s, keys in self.section.items()}
        values |= {"model": {"path": "m"}, "data": {"path": "d"}, "output": "o"} | (
            {"reward": "words"} if self.online else {}
        )
        return config_from_mapping(values).method.default_lr


_TABLE: dict[str, dict[str, Any]] = packaged_yaml(__package__, "goals.yaml")
GOALS = {name: Goal(name, **fields) for name, fields in _TABLE.items()}


def goals_for(kind: str) -> list[Goal]:
    """Return the goals that this kind of data can serve, best fit first."""
    order = list(GOALS.values())
    feasible = [g for g in order if kind in g.kinds]
    return sorted(feasible, key=lambda g: (g.kinds.index(kind) > 0, order.index(g)))


# ---- The starting config: values derived from data, model and machine, each with its reason ----

LENGTH_CHOICES = (128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384, 32768)
# share of this machine's memory for a whole model's weights and optimizer; the rest is for activations and other processes
SHARE_OF_MEMORY = 0.6
BYTES_PER_PARAMETER = 16  # per parameter of a whole model: weights, master, gradient, two moments (bf16: 18, fp32: 16)
MAX_HELD_OUT = 200  # maximum number of rows
MIN_HELD_OUT = rows_to_detect()  # fewer held-out rows give no verdict


@dataclass(frozen=True, slots=True)
class Start:
    """A proposed config.

    Args:
        sections: by name, each key's value and reason; remark: a note for the user, or "".
    """

    goal: Goal
    data: DataFacts
    model: ModelFacts
    sections: Mapping[str, Lines]
    output: str
    remark: str = ""

    def to_yaml(self, file: str = "run.yaml") -> str:
        """Return the file's text, with a comment on each key."""
        lines = [
            f"# {self.goal.name}: {self.goal.about}.",
            f"# Written by penchant init for {_one_line(self.data.path)}: {self.data.to_text()}.",
            f"#   penchant data audit {file}    what is wrong or lopsided in the data",
            f"#   penchant plan {file}          steps, memory, disk and time, without training",
            f"#   penchant train {file}         train; the same command continues after an interruption",
        ]
        for name, keys in self.sections.items():
            lines.append(f"{name}:")
            entries = {key: f"  {key}: {_yaml_scalar(value)}" for key, (value, _) in keys.items()}
            width = min(46, max(map(len, entries.values())))
            lines += [f"{entries[key]:<{width}}  # {reason}" for key, (_, reason) in keys.items()]
        lines.append(f"output: {_yaml_scalar(self.output)}  # the run's folder: checkpoints, metrics, report.html")
        return "\n".join(lines) + "\n"


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def _yaml_scalar(value: Any) -> str:
    """Format a value as one line of YAML that reads back unchanged."""
    if isinstance(value, float) and 0 < abs(value) < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    if isinstance(value, float):
        return f"{value:g}" if value % 1 else f"{value:.1f}"
    # YAML treats a raw U+0085 as a line break
    allow_unicode = value.isprintable() if isinstance(value, str) else not isinstance(value, dict)
    text = dump_yaml(value, default_flow_style=True, allow_unicode=allow_unicode, width=1 << 30).strip()
    return text.removesuffix("...").strip()


def propose(
    data: DataFacts,
    model: ModelFacts,
    goal: str,
    *,
    reward: str | None = None,
    output: str | None = None,
    held_out: HeldOut | None = None,
    lora: bool = False,
) -> Start:
    """Propose a config that can be trained as it is.

    Args:
        goal: a name of `GOALS`; output: the run's folder.
        reward: for an online goal (default: accuracy if the rows have reference answers, else sentiment).
        held_out: held-out rows in a file of their own; without it, part of the data is held out.
        lora: use an adapter even if the whole model would fit.

    Raises:
        ConfigError: no such goal or reward, or the data or the model cannot serve it.
    """
    selected_goal = check_goal(goal, data, model)
    if reward is not None:
        if not selected_goal.online:
            online = ", ".join(g.name for g in GOALS.values() if g.online)
            raise ConfigError("--reward", f"{goal} uses no reward", f"leave it out, or give a --goal of {online}")
        check_reward(reward)
    model_note = "a hub id or a folder; its size is not known yet"
    if model.parameters is not None:
        model_note = f"{model.parameters:,} parameters; a folder or a hub id"
    sections: dict[str, Lines] = {
        "model": {"path": (model.path, model_note)},
        "data": _data_section(data, model, selected_goal, held_out),
    }
    if lora or _needs_adapter(model):
        gigabytes = round((model.parameters or 0) * BYTES_PER_PARAMETER / 2**30)
        note = f", which would need about {gigabytes} GB" if gigabytes else ""
        sections["lora"] = {
            "r": (16, f"an adapter in place of the whole model{note}; rank"),
            "alpha": (32, "its update is scaled by alpha / r"),
        }
    sections |= selected_goal.section
    if selected_goal.online:
        note = "weight of this reward; also words, path.py:function, a reward model's run"
        if reward is None and data.answers is not None:
            note = f"1 for an answer that is the column's ({data.answers}), else 0; pip install 'penchant[math]'"
        sections["reward"] = {reward or ("accuracy" if data.answers is not None else "sentiment"): (1.0, note)}
    sections["train"] = _train_section(data, model, selected_goal)
    sections["evaluation"] = {"every": ("epoch", "or a number of optimizer steps; also before the first step")}
    held_out_rows = (
        held_out.rows - held_out.aside if held_out is not None else sections["data"].get("validation_rows", (0, ""))[0]
    )
    remark = ""
    if held_out_rows < MIN_HELD_OUT:
        remark = (
            f"{held_out_rows or 'no'} rows held out give no verdict: to tell an accuracy of 70% from chance takes {MIN_HELD_OUT} "
            f"({2 * MIN_HELD_OUT} rows in all, half of them held out; or a file of their own: --eval-data)"
        )
    return Start(selected_goal, data, model, sections, output or f"runs/{selected_goal.name}", remark)


def check_goal(goal: str, data: DataFacts, model: ModelFacts) -> Goal:
    """Return the goal if data and model can serve it.

    Raises:
        ConfigError: they cannot; lists the goals they can serve.
    """
    feasible = [g.name for g in goals_for(data.kind) if not model.encoder or g.name == "reward"]
    if goal not in GOALS:
        raise ConfigError("--goal", f"{goal!r} is not known", did_you_mean(goal, GOALS))
    if model.encoder and goal != "reward":
        how = "give --goal reward, or a causal model"
        raise ConfigError("--goal", f"{model.path} is an encoder, which writes nothing", how)
    if goal not in feasible:
        how = f"with these rows: {', '.join(feasible) or 'none'}"
        raise ConfigError("--goal", f"{goal} cannot learn from rows that are {data.kind}", how)
    return GOALS[goal]


def _needs_adapter(model: ModelFacts) -> bool:
    """Return True if training the whole model would leave too little of this machine's memory."""
    if model.parameters is None:
        return True  # unknown size: an adapter is the safe choice
    return model.parameters * BYTES_PER_PARAMETER > SHARE_OF_MEMORY * machine_memory()[0]


def _data_section(data: DataFacts, model: ModelFacts, goal: Goal, held_out: HeldOut | None) -> Lines:
    keys: dict[str, tuple[Any, str]] = {"path": (data.path, f"{counted(data.rows, 'row')}, {data.to_kind()}")}
    if held_out is not None:
        keys["eval_path"] = (held_out.path, f"{counted(held_out.rows, 'row')} outside training")
    if data.columns:
        keys["columns"] = (dict(data.columns), "our field: the file's column")
    bad_rows = data.aside + (held_out.aside if held_out is not None else 0)
    if bad_rows:
        reasons = "; ".join(filter(None, (data.reasons, held_out.reasons if held_out is not None else "")))
        note = f" ({reasons})" if reasons else ""
        keys["on_bad_row"] = (
            "skip",
            f"{counted(bad_rows, 'bad row')} kept aside and counted{note}; error stops at the first",
        )
    turns = LAYOUTS[data.layout].options.get("turns") if data.layout in LAYOUTS else None
    if data.several and goal.name == "sft" and turns is not None and "all" in turns.choices:
        note = f"{counted(data.several, 'row')} with several answers: all of them are learned, not the last alone"
        keys["layout_options"] = ({"turns": "all"}, note)
    keys |= _conversion(data, goal)
    rows = data.rows - data.aside
    held_out_rows = min(MAX_HELD_OUT, max(1, rows // 10))
    if held_out_rows < MIN_HELD_OUT <= rows // 2:
        held_out_rows = MIN_HELD_OUT
    documents = data.kind == "text"  # they have no prompts, so whole documents are held out
    if held_out is None and (data.prompts > 1 or documents) and rows > 3:
        note = "whole documents" if documents else "held out by prompt: no prompt is on both sides"
        keys["validation_rows"] = (held_out_rows, note)
    keys["max_length"] = _max_length(data, model, goal)
    return keys


def _conversion(data: DataFacts, goal: Goal) -> dict[str, tuple[Any, str]]:
    """Return the settings that turn scored answers into pairs or labels."""
    if data.kind != "scored":
        return {}
    if "scored" in goal.kinds and goal.kinds[0] == "pairs":
        return {"pairs_from_scores": ("best_worst", "the best against the worst answer of each prompt")}
    if goal.kinds == LABEL_KINDS and data.median_score is not None:
        return {"score_threshold": (data.median_score, "at or above it an answer is good; this is the median")}
    return {}


LABEL_KINDS = GOALS["kto"].kinds


def _max_length(data: DataFacts, model: ModelFacts, goal: Goal) -> tuple[int, str]:
    lengths = data.prompt if goal.online else data.longest
    rounded = next((n for n in LENGTH_CHOICES if n >= lengths[1]), LENGTH_CHOICES[-1])
    noun = "prompts" if goal.online else "rows"
    available = None if model.context is None else model.context - (64 if goal.online else 0)
    summary = f"95% of {noun} have {lengths[1]:,} or less"
    if available is not None and rounded > available:
        return max(8, available), f"tokens; the model's context is {model.context:,}, and {summary}"
    if data.kind == "text":
        return min(rounded, 512, available or 512), "tokens; longer documents become several rows"
    return rounded, f"tokens; {summary}, longer ones lose the start of their prompt"


def _train_section(data: DataFacts, model: ModelFacts, goal: Goal) -> Lines:
    small = model.parameters is not None and model.parameters < SMALL_MODEL
    trees = 1 if data.kind in ("sft", "text", "unpaired", "prompts") else 2
    step_tokens = _max_length(data, model, goal)[0] * trees
    tokens = 4096 if small else max(512, min(4096, 1 << (step_tokens - 1).bit_length()))  # rounded up to a power of two
    full_lr, adapter_lr = (f"{auto_lr(goal.default_lr, lora, model.parameters):g}" for lora in (False, True))
    default_lr_note = "by the encoder's size" if model.encoder else f"{full_lr} for the whole model"
    return {
        "epochs": (1, "passes over the data; start with one"),
        "batch_size": (_batch_size(data, goal), "rows per optimizer step"),
        "tokens_per_step": (tokens, "tokens of one forward/backward pass: the unit of memory, no effect on the result"),
        "lr": ("auto", f"peak learning rate: {default_lr_note}, {adapter_lr} with an adapter (lora)"),
    }


def _batch_size(data: DataFacts, goal: Goal) -> int:
    """Return the goal's batch size, halved (but not below 4) while an epoch would have fewer than 20 steps."""
    rows = (data.prompts if goal.online and data.kind != "prompts" else data.rows - data.aside) - MAX_HELD_OUT
    size = goal.batch_size
    while size > 4 and rows // size < 20:
        size //= 2
    return size


def write_config(start: Start, path: str | Path) -> Path:
    """Write the file and check that it loads as a config.

    Raises:
        ConfigError: the file already exists or cannot be written; DiskError: the disk is full or fails.
    """
    path = Path(path)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError as error:
        raise ConfigError(str(path), "already exists", "give another --output; init never overwrites") from error
    except OSError as error:
        raise ConfigError(str(path), f"cannot be written ({error.strerror})", "give another --output") from error
    try:
        with writing(path), os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(start.to_yaml(str(path)))
    except DiskError:
        path.unlink(missing_ok=True)
        raise
    load_config(path)
    return path
