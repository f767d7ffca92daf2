"""The answers to one prompt as pieces of text: tokens, stop texts and reasons to end put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from penchant.talk.stream import Drawn, Sampling, Stream
from penchant.talk.text import Detokeniser, Stops
from penchant.talk.voice import Voice

STOP, LENGTH = "stop", "length"


@dataclass(frozen=True, slots=True)
class Told:
    """A token with its log-prob, and where its text begins, in characters of the answer."""

    drawn: Drawn
    start: int


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step adds to one answer: text, the tokens that it is of, and why the answer ends (None while it goes on)."""

    row: int
    text: str
    tokens: tuple[Told, ...]
    finish: str | None


@dataclass
class _Row:
    """One answer so far: characters decoded, characters shown, tokens whose text is not shown yet."""

    detokeniser: Detokeniser
    stops: Stops
    decoded: int = 0
    shown: int = 0
    count: int = 0
    waiting: list[Told] = field(default_factory=list)
    finish: str | None = None


class Answers:
    """All answers to one prompt.

    Args:
        prompt: token ids; stops: texts at which an answer ends, beside those of the voice's style.
        continued: whether the text goes on from the prompt's (no turn of its own begins).
    """

    def __init__(
        self,
        voice: Voice,
        prompt: Sequence[int],
        sampling: Sampling,
        stops: Sequence[str] = (),
        continued: bool = False,
    ) -> None:
        self.prompt, self.sampling = list(prompt), sampling
        self._stream = Stream(voice, prompt, sampling)
        before = prompt if continued else ()
        self._rows = [_Row(Detokeniser(voice.tokenizer, before), Stops(stops)) for _ in range(sampling.n)]

    @property
    def done(self) -> bool:
        return all(row.finish is not None for row in self._rows)

    @property
    def tokens(self) -> int:
        """Tokens that all answers have so far, end tokens included."""
        return sum(row.count for row in self._rows)

    def step(self) -> list[Piece]:
        """One more token of every answer that goes on, and the text that it makes certain; pieces without news are left out."""
        pieces = [self._piece(drawn) for drawn in self._stream.step()]
        return [p for p in pieces if p.text or p.tokens or p.finish]

    def _piece(self, drawn: Drawn) -> Piece:
        row = self._rows[drawn.row]
        row.count += 1
        if not drawn.ended:
            row.waiting.append(Told(drawn, row.decoded))
        new = "" if drawn.ended else row.detokeniser.add(drawn.token)
        if drawn.last:
            new += row.detokeniser.flush()
        row.decoded += len(new)
        text, met = row.stops.add(new)
        if met:
            row.finish = STOP
            self._stream.stop(drawn.row)
        elif drawn.last:
            text += row.stops.flush()
            row.finish = STOP if drawn.ended else LENGTH
        row.shown += len(text)
        # a token is told with its text; one that lies wholly in a stop text is never told
        told = tuple(t for t in row.waiting if t.start < row.shown or (row.finish is not None and not met))
        row.waiting = [t for t in row.waiting if t not in told]
        return Piece(drawn.row, text, told, row.finish)
