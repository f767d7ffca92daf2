"""`penchant chat`: the terminal screen, the conversation with one or two models, and the slash commands."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from rich.cells import cell_len, chop_cells, set_cell_size

from penchant.base.text import clean
from penchant.data.load import prompt_json
from penchant.serve.model import ChatModel, TemplateRefused
from penchant.serve.stream import Completions, Sampling
from penchant.types import Message

# ---- the screen ----

GAP = " │ "
TWO_COLUMNS_WIDTH = 90  # minimum width in cells for two columns


def safe(text: str) -> str:
    """Return untrusted text made safe for a terminal: line breaks are kept, control characters are escaped."""
    return "\n".join(clean(line, len(line)) for line in text.split("\n"))


def _escaped(message: str) -> str:
    """Return a message that is not read as a command."""
    return f"/{message}" if message.startswith("/") else message


class Wrapper:
    """Word-wraps text as it grows; only the last line may still change.

    Args:
        width: cells per line.
    """

    def __init__(self, width: int) -> None:
        self.width = max(1, width)
        self.lines: list[str] = [""]

    def add(self, text: str) -> None:
        """Append text, which must already be safe."""
        for i, part in enumerate(text.split("\n")):
            if i:
                self.lines.append("")
            if part:
                self.lines[-1:] = _wrap(self.lines[-1] + part, self.width)


def _wrap(line: str, width: int) -> list[str]:
    lines = []
    while cell_len(line.rstrip(" ")) > width:
        head = chop_cells(line, width)[0]
        rest = line[len(head) :]
        if not head:  # one character is wider than the line
            head, rest = line[:1], line[1:]
        space = head.rfind(" ")
        if not rest.startswith(" ") and space > 0 and head[:space].strip(" "):
            head, rest = line[:space], line[space + 1 :]
        lines.append(head.rstrip(" "))
        line = rest.lstrip(" ")
    return [*lines, line]


class OneColumn:
    """Writes an answer as it arrives, without wrapping."""

    def __init__(self, out: TextIO) -> None:
        self._out, self._newline = out, True

    def add(self, side: int, text: str) -> None:
        if text:
            self._out.write(safe(text))
            self._out.flush()
            self._newline = text.endswith("\n")

    def end(self) -> None:
        if not self._newline:
            self._out.write("\n")
        self._out.flush()
        self._newline = True


class TwoColumns:
    """Two answers side by side: a line is final once both are past it; until then the current line is redrawn.

    Args:
        width: cells of the terminal.
    """

    def __init__(self, out: TextIO, width: int, titles: Sequence[str]) -> None:
        self._out = out
        self._width = (width - 1 - len(GAP)) // 2
        self._sides = (Wrapper(self._width), Wrapper(self._width))
        self._final_lines = 0
        line = GAP.join(set_cell_size(clean(t), self._width) for t in titles)
        self._out.write(f"{line.rstrip()}\n{'─' * self._width}─┼─{'─' * self._width}\n")

    def add(self, side: int, text: str) -> None:
        self._sides[side].add(safe(text))
        while self._final_lines < min(len(s.lines) for s in self._sides) - 1:
            self._out.write(f"\r\x1b[K{self._line(self._final_lines)}\n")
            self._final_lines += 1
        self._out.write(f"\r\x1b[K{self._line(self._final_lines)}")
        self._out.flush()

    def end(self) -> None:
        """Write the remaining lines of the longer side."""
        for index in range(self._final_lines, max(len(s.lines) for s in self._sides)):
            self._out.write(f"\r\x1b[K{self._line(index)}\n")
        self._out.flush()

    def _line(self, index: int) -> str:
        left, right = (s.lines[index] if index < len(s.lines) else "" for s in self._sides)
        return f"{set_cell_size(left, self._width)}{GAP}{right}".rstrip(" ")


# ---- the conversation ----


class TooLong(Exception):
    """A message that does not fit into the context even without earlier turns."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One user message and its answer."""

    message: str
    answer: str


@dataclass
class Conversation:
    """The turns so far, after the system prompt ("" for none).

    Args:
        keeps_history: whether earlier turns come before a new one (not in plain text); tools: for the chat template.
    """

    keeps_history: bool
    system: str = ""
    turns: list[Turn] = field(default_factory=list)
    tools: tuple[Any, ...] = ()

    @property
    def template_variables(self) -> dict[str, Any]:
        """Extra variables for the chat template besides the messages."""
        return {"tools": list(self.tools)} if self.tools else {}

    def messages(self, message: str, dropped: int = 0) -> tuple[Message, ...]:
        """Return the messages a model answers: the history without the first `dropped` turns, then `message`."""
        history = [Message("system", self.system)] if self.system and self.keeps_history else []
        for turn in self.turns[dropped:] if self.keeps_history else ():
            history += [Message("user", turn.message), Message("assistant", turn.answer)]
        return (*history, Message("user", message))

    def prompt_row(self, message: str, dropped: int = 0) -> Any:
        """Return the prompt of a data row: messages, or the text to continue."""
        return prompt_json(self.messages(message, dropped)) if self.keeps_history else message

    def rows(self) -> list[dict[str, Any]]:
        """Return rows that penchant can load: the whole conversation as messages, or one prompt and completion per turn."""
        if not self.turns:
            return []
        if not self.keeps_history:
            return [{"prompt": t.message, "completion": t.answer} for t in self.turns]
        last = self.turns[-1]
        history = Conversation(True, self.system, self.turns[:-1]).messages(last.message)
        return [{"messages": prompt_json((*history, Message("assistant", last.answer))), **self.template_variables}]


@dataclass(frozen=True, slots=True)
class FittedPrompt:
    """A prompt that fits into the context.

    Args:
        ids: its token ids; room: token limit of the answer; dropped: number of oldest turns left out.
    """

    ids: list[int]
    room: int
    dropped: int


def fit_prompt(
    chat_model: ChatModel, conversation: Conversation, message: str, max_new_tokens: int, dropped: int = 0
) -> FittedPrompt:
    """Build the next prompt, leaving out as many of the oldest turns as needed for prompt and answer to fit into the context.

    At most half of the context is reserved for the answer, so an answer may get fewer than `max_new_tokens`.

    Args:
        dropped: minimum number of turns to leave out.

    Raises:
        TooLong: the message does not fit by itself. TemplateRefused: the chat template refuses it.
    """
    reserve = min(max_new_tokens, chat_model.context // 2)
    turns = len(conversation.turns) if conversation.keeps_history else 0
    for dropped_turns in range(min(dropped, turns), turns + 1):
        ids = chat_model.encode_messages(conversation.messages(message, dropped_turns), conversation.template_variables)
        if len(ids) + reserve <= chat_model.context:
            break
    room = min(max_new_tokens, chat_model.context - len(ids))
    if room < 1:
        raise TooLong(f"it has {len(ids):,} tokens and the model's context is {chat_model.context:,}; nothing was sent")
    return FittedPrompt(ids, room, dropped_turns)


# ---- the session ----

SIDES = ("left", "right")


@dataclass
class Terminal:
    """Input and output of a chat.

    Args:
        read: returns the next line without its line ending, raises EOFError at the end; notes: stream for all text not from a model.
        live: whether this is a terminal, where answers are shown as they grow.
    """

    read: Callable[[], str]
    out: TextIO
    notes: TextIO
    live: bool
    width: Callable[[], int] = lambda: shutil.get_terminal_size().columns

    def note(self, text: str) -> None:
        print(text, file=self.notes, flush=True)


@dataclass
class ChatOptions:
    """Options from the command line.

    Args:
        prefer: file of preferences; blind: hide the models' names and pick the left one at random for each answer.
    """

    sampling: Sampling
    system: str = ""
    prefer: str | None = None
    blind: bool = False
    tools: tuple[Any, ...] = ()


@dataclass
class Exchange:
    """The last message and its answers, left first.

    Args:
        order: the model that wrote each answer; judged: a preference was given; dropped: number of turns left out of the prompt.
    """

    message: str
    texts: list[str]
    order: list[int]
    dropped: int
    judged: bool = False


@dataclass
class Chat:
    """One session.

    Args:
        models: the model, and optionally a second one to compare it with.
    """

    models: list[ChatModel]
    options: ChatOptions
    terminal: Terminal
    conversation: Conversation = field(init=False)
    last: Exchange | None = None
    attempt: int = 0
    dropped: int = 0
    tally: dict[str, int] = field(default_factory=dict)
    rng: random.Random = field(default_factory=random.SystemRandom)

    def __post_init__(self) -> None:
        self.conversation = Conversation(
            self.models[0].style.keeps_history, self.options.system, tools=self.options.tools
        )

    # ---- the session ----------------------------------------------------------------------------------------------

    def run(self) -> int:
        """Chat until /quit or the end of the input and return the exit code."""
        for line in self._lines():
            if line.startswith("/") and not line.startswith("//"):
                if self._dispatch(line):
                    break
            else:
                self._send_message(line[1:] if line.startswith("//") else line)
        if self.tally:
            self.terminal.note("preferred: " + ", ".join(f"{safe(k)} {v}" for k, v in sorted(self.tally.items())))
        return 0

    def _lines(self) -> Iterator[str]:
        """Yield messages and commands; everything between two lines of three quotes is one message, also if it begins with ``/``."""
        block: list[str] | None = None
        while True:
            try:
                line = self.terminal.read()
            except EOFError:
                break
            except KeyboardInterrupt:
                block = None
                self.terminal.note("\n(Ctrl-D or /quit leaves)")
                continue
            if line.strip() == '"""':
                if block is None:
                    block = []
                    continue
                line, block = _escaped("\n".join(block)), None
            elif block is not None:
                block.append(line)
                continue
            yield line
        if block:
            yield _escaped("\n".join(block))

    def _dispatch(self, line: str) -> bool:
        """Run a command and return True if the session ends."""
        name, _, rest = line[1:].partition(" ")
        if name not in COMMANDS:
            how = "/help lists them (write // for a message that begins with /)"
            self.terminal.note(f"/{safe(name)} is not a command; {how}")
            return False
        _, _, run_command = COMMANDS[name]
        return bool(run_command(self, rest.strip()))

    # ---- answers --------------------------------------------------------------------------------------------------

    def _send_message(self, line: str) -> None:
        """Answer a message; in plain text an empty line continues the text so far."""
        if not line.strip() and (self.conversation.keeps_history or self.last is None):
            return
        self.keep_answer()
        self.attempt = 0
        if not line.strip():
            turn = self.conversation.turns[-1]
            line = turn.message + turn.answer
        self.answer(line)

    def keep_answer(self) -> None:
        """Append the last message and its answer to the conversation as a turn."""
        if self.last is not None:
            self.conversation.turns.append(Turn(self.last.message, self.last.texts[0]))
            self.last = None

    def answer(self, message: str) -> bool:
        """Generate and show every model's answer; return False if the message could not be sent."""
        try:
            fitted = self._fit_prompts(message)
        except (TooLong, TemplateRefused) as error:
            self.terminal.note(f"not sent: {safe(str(error))}")
            return False
        order = list(range(len(self.models)))
        if self.options.blind:
            self.rng.shuffle(order)
        sampling = replace(self.options.sampling, turn=len(self.conversation.turns), attempt=self.attempt)
        completions = []
        for i in order:
            style, prompt = self.models[i].style, fitted[i]
            sampling = replace(sampling, max_new_tokens=prompt.room)
            completions.append(Completions(self.models[i], prompt.ids, sampling, style.stops, not style.keeps_history))
        self.last = Exchange(message, self._show_answers(completions, order), order, self.dropped)
        return True

    def _fit_prompts(self, message: str) -> list[FittedPrompt]:
        """Return the prompt for every model, all with the same turns."""
        tokens = self.options.sampling.max_new_tokens
        fitted = [fit_prompt(v, self.conversation, message, tokens) for v in self.models]
        dropped = max(f.dropped for f in fitted)
        if any(f.dropped != dropped for f in fitted):  # leave the same turns out for both
            fitted = [fit_prompt(v, self.conversation, message, tokens, dropped) for v in self.models]
        if dropped and dropped != self.dropped:
            context = min(v.context for v in self.models)
            turns = "the oldest turn is" if dropped == 1 else f"the {dropped} oldest turns are"
            self.terminal.note(f"(the context of {context:,} tokens is full: {turns} left out from here on)")
        self.dropped = dropped
        return fitted

    def _show_answers(self, completions: list[Completions], order: list[int]) -> list[str]:
        """Show the answers as they are generated and return their texts; Ctrl-C stops them and keeps the text so far."""
        out, width, count = self.terminal.out, self.terminal.width(), len(completions)
        texts, finish_reasons, stopped = [""] * count, [""] * count, False
        started = time.perf_counter()
        side_by_side = count == 2 and self.terminal.live and width >= TWO_COLUMNS_WIDTH
        groups = [[0, 1]] if side_by_side else [[i] for i in range(count)]  # generated at the same time
        titles = [self.title(i, order) for i in range(count)]
        display = TwoColumns(out, width, titles) if side_by_side else OneColumn(out)
        try:
            for group in groups:
                if len(groups) > 1:
                    display.end()
                    self.terminal.note(f"── {titles[group[0]]} ──")
                while not all(completions[i].done for i in group):
                    for i in group:
                        for piece in completions[i].step():
                            texts[i] += piece.text
                            finish_reasons[i] = piece.finish or finish_reasons[i]
                            display.add(i, piece.text)
        except KeyboardInterrupt:
            stopped = True
        display.end()
        self._print_summary(completions, finish_reasons, stopped, time.perf_counter() - started)
        return texts

    def _print_summary(
        self, completions: list[Completions], finish_reasons: list[str], stopped: bool, seconds: float
    ) -> None:
        tokens = sum(w.tokens for w in completions)
        parts = [" + ".join(f"{w.tokens:,}" for w in completions) + " tokens"]
        if tokens > 1 and seconds > 0:
            parts.append(f"{tokens / seconds:,.1f} tokens/s")
        if stopped:
            parts.append("stopped")
        elif "length" in finish_reasons:
            parts.append("cut at the limit of tokens")
        self.terminal.note(f"({', '.join(parts)})")

    def title(self, side: int, order: list[int]) -> str:
        """Return the heading of an answer."""
        return SIDES[side] if self.options.blind else f"{SIDES[side]}: {safe(self.models[order[side]].name)}"

    # ---- preferences ----------------------------------------------------------------------------------------------

    def prefer(self, side: int | None) -> None:
        """Record which answer is better (None: neither) and continue with that one."""
        if len(self.models) < 2:
            self.terminal.note("only one model is loaded: start with --against RUN to compare two")
            return
        last = self.last
        if last is None or last.judged:
            reason = "ask something first" if last is None else "this answer is already judged"
            self.terminal.note(f"there is nothing to judge: {reason}")
            return
        names = [self.models[i].name for i in last.order]
        prompt = self.conversation.prompt_row(last.message, last.dropped)
        if side is not None and last.texts[0] == last.texts[1]:
            self.terminal.note("the two answers are the same: this counts as a tie")
            side = None
        empty = [] if side is None else [i for i in (side, 1 - side) if not last.texts[i].strip()]
        if empty:
            which = "that" if empty[0] == side else "the other"
            self.terminal.note(f"{which} answer is empty and cannot be trained on; nothing was written")
            return
        file = Path(self.options.prefer or "preferences.jsonl").expanduser()
        first, second, i, j = ("left", "right", 0, 1) if side is None else ("chosen", "rejected", side, 1 - side)
        if side is None:
            # a row with two answers and no verdict would train as if the first were better
            file = file.with_name(f"{file.name.removesuffix('.jsonl')}.ties.jsonl")
        row = {"prompt": prompt, first: last.texts[i], second: last.texts[j]}
        row |= {f"{first}_by": names[i], f"{second}_by": names[j], **self.conversation.template_variables}
        if not self.append(file, [row]):
            return
        winner = "neither" if side is None else names[side]
        self.tally[winner] = self.tally.get(winner, 0) + 1
        last.judged = True
        if side:
            last.texts.reverse()
            last.order.reverse()  # continue with the better one

    def append(self, file: Path, rows: list[dict[str, Any]]) -> bool:
        """Append rows to a JSONL file; on failure print a note and return False."""
        try:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
            with file.open("ab+") as stream:
                if stream.tell():
                    stream.seek(-1, os.SEEK_END)
                    text = (
                        text if stream.read() == b"\n" else b"\n" + text
                    )  # some editors end a file without a line break
                stream.write(text)
        except (OSError, UnicodeError) as error:
            self.terminal.note(f"{safe(str(file))} cannot be written ({error})")
            return False
        self.terminal.note(f"(written to {safe(str(file))})")
        return True


# ---- commands ----


def _help(chat: Chat, _: str) -> None:
    for name, (arguments, description, _function) in COMMANDS.items():
        chat.terminal.note(f"  {f'/{name} {arguments}'.strip():<20} {description}")
    chat.terminal.note('  """                  start and end a message of several lines')
    chat.terminal.note("  Ctrl-C               stop the answer; Ctrl-D quits")
    if not chat.conversation.keeps_history:
        chat.terminal.note("  an empty line        continue the text so far")
    if len(chat.models) == 2:
        note = "both models see one conversation"
        chat.terminal.note(
            f"{note}: the conversation continues with the better answer, or with the left one if you do not choose"
        )


def _reset(chat: Chat, _: str) -> None:
    chat.last, chat.attempt, chat.dropped = None, 0, 0
    chat.conversation.turns.clear()
    chat.terminal.note("(a new conversation)")


def _undo(chat: Chat, _: str) -> None:
    if chat.last is not None:
        chat.last = None
    elif chat.conversation.turns:
        chat.conversation.turns.pop()
    else:
        chat.terminal.note("there is nothing to undo")
        return
    chat.attempt, chat.dropped = 0, 0
    chat.terminal.note(f"(the last turn is gone; {len(chat.conversation.turns)} left)")


def _retry(chat: Chat, _: str) -> None:
    last, turns = chat.last, chat.conversation.turns
    if last is None and not turns:
        chat.terminal.note("there is nothing to retry")
        return
    earlier = list(turns)
    message = last.message if last is not None else turns.pop().message
    chat.last = None
    chat.attempt += 1
    if not chat.answer(message):  # the earlier answer stays
        chat.last, chat.conversation.turns = last, earlier


def _system(chat: Chat, text: str) -> None:
    if not chat.conversation.keeps_history:
        chat.terminal.note("plain text has no system prompt")
        return
    chat.conversation.system = text
    message = "(the system prompt is set; /reset forgets the turns before it)"
    chat.terminal.note(message if text else "(no system prompt)")


def _save(chat: Chat, file: str) -> None:
    if not file.endswith(".jsonl"):
        chat.terminal.note("give a file: /save FILE.jsonl")
        return
    turns = list(chat.conversation.turns)
    if chat.last is not None:
        turns.append(Turn(chat.last.message, chat.last.texts[0]))
    conversation = replace(chat.conversation, turns=[t for t in turns if t.answer.strip()])
    if not conversation.turns:
        chat.terminal.note("there is nothing to save")
        return
    if len(conversation.turns) < len(turns):
        chat.terminal.note(f"(turns with an empty answer are left out: {len(turns) - len(conversation.turns)})")
    chat.append(Path(file).expanduser(), conversation.rows())


# name: (arguments, help text, function, which returns True if the session ends)
COMMANDS: dict[str, tuple[str, str, Callable[[Chat, str], bool | None]]] = {
    "help": ("", "list the commands", _help),
    "reset": ("", "forget the conversation", _reset),
    "undo": ("", "forget the last turn", _undo),
    "retry": ("", "answer the last message again, with a different sample", _retry),
    "system": ("TEXT", "set the system prompt; without TEXT, remove it", _system),
    "save": ("FILE.jsonl", "append the conversation to a file that penchant train can read", _save),
    "left": ("", "the left answer is better; the pair is saved for training", lambda chat, _: chat.prefer(0)),
    "right": ("", "the right answer is better; the pair is saved for training", lambda chat, _: chat.prefer(1)),
    "tie": ("", "neither is better; ties go to a file of their own", lambda chat, _: chat.prefer(None)),
    "quit": ("", "quit", lambda chat, _: True),
}
