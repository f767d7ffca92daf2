"""Conversations with an environment: the policy and a user's class take turns until the class is done or a limit is reached.

An environment is a class without arguments, one object for each completion:

    class Env:
        def reset(self, row): ...             # row: "prompt" and all extra columns; returns messages to add to the prompt, or None
        def step(self, messages): ...         # the conversation so far; returns messages to continue with, or None: done

The environment's messages are part of the completion but not of the loss.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from penchant.base.functions import TookTooLong, guarded, is_own, own_file, python_object
from penchant.base.lazy import lazy
from penchant.base.text import any_of, did_you_mean
from penchant.data.load import message_json, template_variables
from penchant.data.templates import ChatTemplate, turns_of_prompt
from penchant.errors import ConfigError, RewardError
from penchant.types import Message, PromptTree, TokenTree

if TYPE_CHECKING:
    from penchant.rollout import generate
    from penchant.rollout.generate import Sample
else:
    generate = lazy("penchant.rollout.generate")  # needs torch, which checking a name does not

WHERE = "rollout.environment"
ROLES = ("user", "tool", "system")  # allowed in an environment's messages
ANSWER = "\u241eanswer\u241e"  # stands for the answer in a rendered conversation; what follows is the environment's

SPLIT = "\u241fsplit\u241f"  # marks where to split a text before tokenization

Draw = Callable[[Sequence[Sequence[int]], Sequence[int], Sequence[int]], "Sequence[Sample]"]


class Calculator:
    """A toy: replies to ``<calc>12*(3+4)</calc>`` with ``<result>84</result>``; an answer without a call ends the conversation."""

    CALL = re.compile(r"<calc>(.*?)</calc>", re.S)

    def reset(self, row: Mapping[str, Any]) -> None:
        """Ignore the row."""

    def step(self, messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]] | None:
        calls = self.CALL.findall(messages[-1]["content"])
        return [{"role": "user", "content": f"<result>{calculated(calls[-1])}</result>"}] if calls else None


OPERATORS: Mapping[type, Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
}


def calculated(text: str) -> str:
    """Evaluate arithmetic with numbers, ``+ - * / // %`` and parentheses; return ``error`` for anything else."""

    def value(node: ast.expr) -> float:
        number: Any = node.value if isinstance(node, ast.Constant) else None
        if type(number) in (int, float) and abs(number) < 1e12:
            return number  # type: ignore[no-any-return]
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            result = OPERATORS[type(node.op)](value(node.left), value(node.right))
            return float(result) if abs(result) > 1e15 else result  # type: ignore[no-any-return]
        if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
            return OPERATORS[type(node.op)](value(node.operand))  # type: ignore[no-any-return]
        raise ValueError(text)

    try:
        result = value(ast.parse(text.strip()[:200], mode="eval").body)
        return str(int(result)) if result == int(result) else f"{result:.6g}"
    except (ValueError, SyntaxError, ArithmeticError, RecursionError, MemoryError):  # int: infinite or NaN
        return "error"


ENVIRONMENTS: Mapping[str, Callable[[], Any]] = {"calculator": Calculator}


def find_environment(name: str) -> Callable[[], Any]:
    """An environment's class, from `ENVIRONMENTS` or a user's file.

    Raises:
        ConfigError: there is no such class, or it has no `reset` or `step`.
    """
    if not is_own(name):
        if name not in ENVIRONMENTS:
            how = f"{did_you_mean(name, ENVIRONMENTS)} (or write path.py:Class)"
            raise ConfigError(WHERE, f"{name!r} is not an environment", how)
        return ENVIRONMENTS[name]
    environment: Callable[[], Any] = python_object(name, WHERE, "class")
    if missing := [m for m in ("reset", "step") if not callable(getattr(environment, m, None))]:
        raise ConfigError(WHERE, f"{name} has no method {' and '.join(missing)}", "see docs/environments.md")
    return environment


def check_environment_name(name: str) -> None:
    """Refuse an unknown environment by its name or missing file, without loading anything."""
    if not is_own(name) or not own_file(name).is_file():
        find_environment(name)


@dataclass(slots=True)
class Episode:
    """A completion in progress."""

    tree: TokenTree
    place: str  # where its row is, for messages
    environment: Any
    turns: list[Message]
    seed: int
    sample: Sample = field(default_factory=lambda: generate.Sample())
    going: bool = True


@dataclass(frozen=True, slots=True)
class Stage:
    """Runs conversations between the policy and an environment.

    Args:
        name: of the environment; make: creates one; tokenizer, template_options: the policy's; chat: whether prompts use
            its chat template.
        prompts_by_source: prompts with their extra columns, by their rows' source; turns: limit on the policy's answers per completion;
            ends: ids that end an answer; timeout: seconds for each call; context: the model's context in tokens.
    """

    name: str
    make: Callable[[], Any]
    tokenizer: Any
    chat: bool
    template_options: Mapping[str, Any]
    prompts_by_source: Mapping[str, PromptTree | None]
    turns: int
    ends: frozenset[int]
    timeout: float | None = None
    context: int | None = None
    special: re.Pattern[str] = field(init=False)  # matches the texts of special tokens

    def __post_init__(self) -> None:
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        ends = self.tokenizer.convert_ids_to_tokens(sorted(self.ends))
        special = {t.content for t in added if t.special} | {*self.tokenizer.all_special_tokens, *ends, ANSWER}
        object.__setattr__(self, "special", any_of(t for t in special if t and len(t) > 1))

    def play(self, prompts: Sequence[TokenTree], samples: int, max_tokens: int, draw: Draw) -> list[list[Sample]]:
        """Run `samples` conversations per prompt, each a completion of at most `max_tokens` tokens; `own` marks the policy's.

        Args:
            draw: (prompts as ids, a seed and a token limit for each) -> one sample for each.

        Raises:
            RewardError: the environment failed, or returned something that is not a message; the error names the row.
        """
        episodes = [self._start_episode(tree, i, max_tokens) for tree in prompts for i in range(samples)]
        for a, b in pairwise(episodes):
            if a.tree is b.tree and a.sample.prompt != b.sample.prompt:
                what = f"{a.place}: reset of {self.name} gives different messages to completions of one row"
                raise RewardError(WHERE, what, "make it depend on the row alone: the completions share their prompt")
        for turn in range(self.turns):
            active = [e for e in episodes if e.going]
            if not active:
                break
            limits = [max_tokens - len(e.sample.ids) for e in active]
            rows = [[*(e.sample.prompt or e.tree.prompt_ids.tolist()), *e.sample.ids] for e in active]
            for e, answer in zip(active, draw(rows, [e.seed + turn for e in active], limits), strict=True):
                self._add_turn(e, answer, last=turn == self.turns - 1, max_tokens=max_tokens)
        flat = [e.sample for e in episodes]
        return [flat[i : i + samples] for i in range(0, len(flat), samples)]

    def _start_episode(self, tree: TokenTree, sample_index: int, max_tokens: int) -> Episode:
        row = self.prompts_by_source.get(tree.source)
        if row is None:
            what = f"{tree.source}: its row cannot be told apart from another"
            raise RewardError(WHERE, what, "give files other names")
        turns = list(turns_of_prompt(row.prompt)) if not isinstance(row.prompt, str) else [Message("user", row.prompt)]
        prompt = row.prompt if isinstance(row.prompt, str) else [message_json(m) for m in row.prompt]
        place = tree.source or f"row {tree.row}"
        environment = self._call(place, "making it", self.make)
        opening = self._call(place, "reset", lambda: environment.reset({"prompt": prompt, **row.columns}))
        # distinct seeds for 256 turns of 65,536 samples per row
        episode = Episode(tree, place, environment, turns, ((tree.row << 16) | sample_index) << 8)
        if (added := self._messages(place, "reset", opening)) is not None:
            turns += added
            episode.sample.prompt = self._prompt(tree, row, turns, added)
            total = len(episode.sample.prompt) + max_tokens
            if self.context is not None and total > self.context:
                what = f"{place}: with what reset of {self.name} says, prompt and completion make {total} tokens, beyond the model's {self.context}"
                raise RewardError(WHERE, what, "make it say less, or lower algorithm.max_new_tokens")
        return episode

    def _prompt(self, tree: TokenTree, row: PromptTree, turns: Sequence[Message], more: Sequence[Message]) -> list[int]:
        """The prompt's ids, including the messages that `reset` added."""
        prompt_ids = tree.prompt_ids.tolist()
        if not self.chat:
            return prompt_ids + self._ids("".join(m.content for m in self._split_special_tokens(more)))
        template = ChatTemplate(self.tokenizer, self.template_options, template_variables(row))
        ids = self._ids(template.write([*turns[: -len(more)], *self._split_special_tokens(more)], generate=True))
        bos = [i for i in prompt_ids[:1] if i == self.tokenizer.bos_token_id and ids[:1] != [i]]
        return bos + ids

    def _add_turn(self, episode: Episode, answer: Sample, *, last: bool, max_tokens: int) -> None:
        """Add the policy's answer to the conversation, then the environment's reply."""
        ids, sample = answer.ids, episode.sample
        sample.ids += ids
        sample.logps += answer.logps
        sample.own += [True] * len(ids)
        sample.finished, episode.going = answer.finished, False
        ended = bool(ids) and ids[-1] in self.ends
        text = self.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
        episode.turns.append(Message("assistant", text))
        if not answer.finished:
            return
        messages = [message_json(m) for m in episode.turns]
        reply = self._messages(
            episode.place, "step", self._call(episode.place, "step", lambda: episode.environment.step(messages))
        )
        if reply is None:
            return
        episode.turns += reply
        reply_ids = self._reply_ids(episode, reply, ids[-1] if ended else None)
        sample.finished = False  # the environment expects another answer
        if last or len(sample.ids) + len(reply_ids) >= max_tokens:
            return
        sample.ids += reply_ids
        sample.logps += [0.0] * len(reply_ids)
        sample.own += [False] * len(reply_ids)
        episode.going = True

    def _reply_ids(self, episode: Episode, answer: Sequence[Message], end: int | None) -> list[int]:
        """Token ids of the environment's messages after the policy's, up to the start of the next answer."""
        answer = self._split_special_tokens(answer)
        if self.chat:
            earlier = episode.turns[: -len(answer) - 1]
            template = ChatTemplate(self.tokenizer, self.template_options)
            _, separator, text = template.write(
                [*earlier, Message("assistant", ANSWER), *answer], generate=True
            ).rpartition(ANSWER)
            if not separator:
                what = "the chat template leaves earlier answers out"
                raise ConfigError(WHERE, what, "take another model, or data.template=plain")
            if end is not None:
                text = text.removeprefix(self.tokenizer.decode([end]))
        else:
            text = "".join(m.content for m in answer)
        return self._ids(text)

    def _split_special_tokens(self, message_list: Sequence[Message]) -> list[Message]:
        """Split the texts of special tokens, such as the end of a turn, so that they are tokenized as plain text."""

        def cut(token_match: re.Match[str]) -> str:
            return token_match[0][0] + SPLIT + token_match[0][1:]

        return [replace(m, content=self.special.sub(cut, m.content)) for m in message_list]

    def _ids(self, text: str) -> list[int]:
        return [i for part in text.split(SPLIT) for i in self.tokenizer(part, add_special_tokens=False)["input_ids"]]

    def _messages(self, place: str, method: str, reply: Any) -> list[Message] | None:
        if reply is None or reply is True or (isinstance(reply, Sequence) and not reply):
            return None
        parsed, excerpt = self._call(
            place, f"reading what {method} gives", lambda: (_parse_messages(reply), str(reply)[:60])
        )
        if parsed is None:
            what = f"{place}: {method} of {self.name} gives {excerpt!r}"
            how = 'give a list of {"role": "user" (or tool, system), "content": TEXT}, or None for nothing more'
            raise RewardError(WHERE, what, how)
        return list(parsed)

    def _call(self, place: str, what: str, call: Callable[[], Any]) -> Any:
        try:
            return guarded(call, self.timeout)
        except TookTooLong as error:
            problem = f"{place}: {self.name}: {what} took longer than {self.timeout:g} seconds"
            raise RewardError(WHERE, problem, "fix the environment, or raise rollout.environment_timeout") from error
        except (Exception, SystemExit) as error:
            problem = f"{place}: {self.name}: {what} failed ({type(error).__name__}: {error})"
            raise RewardError(WHERE, problem, "fix the environment") from error


def _parse_messages(reply: Any) -> list[Message] | None:
    """Parse an environment's messages; None if they are something else."""
    if not isinstance(reply, Sequence) or not all(isinstance(m, Mapping) for m in reply):
        return None
    pairs = [(m.get("role"), m.get("content")) for m in reply]
    if not all(
        role in ROLES and isinstance(text, str) and not re.search("[\ud800-\udfff]", text) for role, text in pairs
    ):
        return None
    return [Message(*pair) for pair in pairs]


def masked(tree: TokenTree, samples: Sequence[Sample]) -> TokenTree:
    """The tree with masks, if environments contributed tokens."""
    import numpy as np

    if not any(s.own for s in samples):
        return tree
    return replace(tree, masks=tuple(np.array(s.own or [True] * len(s.ids), dtype=bool) for s in samples))
