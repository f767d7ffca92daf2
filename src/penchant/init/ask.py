"""Asks three questions in a terminal, with defaults; an invalid answer is explained and asked again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO, TypeVar

from penchant.base.text import counted, printable
from penchant.errors import ConfigError, PenchantError
from penchant.init import GOALS, check_goal, goals_for
from penchant.init.look import (
    DataFacts,
    HeldOut,
    ModelFacts,
    look_at_data,
    look_at_held_out,
    look_at_model,
    validation_beside,
)

T = TypeVar("T")
READABLE = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz")
DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
MAX_ATTEMPTS = 3  # attempts per question


@dataclass(frozen=True, slots=True)
class Answers:
    data: DataFacts
    model: ModelFacts
    goal: str
    held_out: HeldOut | None = None


@dataclass(slots=True)
class Asker:
    """Asks questions on a terminal.

    Args:
        answers: stream to read lines from; screen: stream for questions; terminal: whether both are a terminal.
    """

    answers: TextIO
    screen: TextIO
    terminal: bool

    def ask(self, question: str, default: str | None, check: Callable[[str], T]) -> T:
        """Ask one question until `check` accepts the answer.

        Raises:
            PenchantError: raised by `check` on the last attempt. ConfigError: the input ended.
        """
        for attempt in range(MAX_ATTEMPTS):
            hint = f" [{printable(default)}]" if default else ""
            print(f"{question}{hint}: ", end="", file=self.screen, flush=True)
            line = self.answers.readline()
            if not line:
                raise ConfigError("init", "the input ended before the questions", "answer them, or give flags")
            answer = line.strip() or default or ""
            try:
                if not answer:
                    raise ConfigError("init", "nothing was given", "type an answer")
                return check(answer)
            except PenchantError as error:
                if attempt == MAX_ATTEMPTS - 1:
                    raise
                print(f"  {printable(str(error))}", file=self.screen)
        raise AssertionError("unreachable")

    def say(self, text: str) -> None:
        print(printable(text), file=self.screen, flush=True)


def terminal_asker() -> Asker:
    """Return an asker on this process's terminal."""
    return Asker(sys.stdin, sys.stderr, sys.stdin.isatty() and sys.stderr.isatty())


def collect_answers(
    asker: Asker,
    data: str | None,
    model: str | None,
    goal: str | None,
    *,
    eval_data: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Answers:
    """Collect the answers from flags, and ask for the missing ones.

    Args:
        eval_data: a file of held-out rows, or ``none``; by default the validation.jsonl beside a train.jsonl of `penchant data get`
            is used, with a note. columns: ``{our field: the file's column}``.

    Raises:
        ConfigError: a flag is missing and there is no terminal to ask on. DataError, ModelError: data or model cannot be used.
    """
    missing = [flag for flag, value in (("--data", data), ("--model", model), ("--goal", goal)) if value is None]
    if missing and not asker.terminal:
        raise ConfigError(
            "init", f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not given, and there is no terminal to ask on",
            "penchant init --data FILE --model PATH --goal " + "|".join(GOALS),
        )  # fmt: skip

    def read_data(path: str) -> DataFacts:
        return look_at_data(path, model, columns)

    given_model = look_at_model(model) if model is not None else None  # before a long file is read
    facts = (
        read_data(data) if data is not None else asker.ask("Data (a file, or a hub id)", only_data_file(), read_data)
    )
    asker.say(f"  {facts.to_text()}")
    held_out = _held_out(asker, facts, eval_data)
    if given_model is not None:
        chosen_model = given_model
    else:
        chosen_model = asker.ask("Model (a folder or hub id)", DEFAULT_MODEL, look_at_model)
        facts = look_at_data(facts.path, chosen_model.path, columns)  # count in the model's own tokens
    known_size = chosen_model.parameters is not None
    asker.say(
        f"  {chosen_model.parameters:,} parameters"
        if known_size
        else f"  {chosen_model.path}: not in the cache, and the hub cannot be reached: check the name"
    )
    if goal is not None:
        return Answers(facts, chosen_model, check_goal(goal, facts, chosen_model).name, held_out)
    feasible = [g for g in goals_for(facts.kind) if not chosen_model.encoder or g.name == "reward"]
    if not feasible:
        what = f"no goal fits rows that are {facts.kind} and this model"
        raise ConfigError("init", what, "give other data or another model")
    asker.say("Goals that these rows can serve:")
    for g in feasible:
        asker.say(f"  {g.name:<7} {g.about}")
    goal_name = asker.ask("Goal", feasible[0].name, lambda name: check_goal(name, facts, chosen_model).name)
    return Answers(facts, chosen_model, goal_name, held_out)


def _held_out(asker: Asker, facts: DataFacts, eval_data: str | None) -> HeldOut | None:
    path = validation_beside(facts.path) if eval_data is None else None if eval_data == "none" else eval_data
    if path is None:
        return None
    held_out = look_at_held_out(path, facts)
    note = " (of the same `penchant data get`; --eval-data none: part of the data itself)" if eval_data is None else ""
    asker.say(f"  held out: {path}, {counted(held_out.rows, 'row')}{note}")
    return held_out


def only_data_file() -> str | None:
    """Return the only data file of the current folder, or None if there is not exactly one."""
    files = [p for p in Path().iterdir() if p.is_file() and p.suffix in READABLE]
    names = sorted(p.name for p in files if not p.name.startswith("."))
    return names[0] if len(names) == 1 else None
