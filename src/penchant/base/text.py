"""Text for people: printable in any terminal, without secrets."""

from __future__ import annotations

import difflib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

# ---- Text of others as it may reach a terminal ----


def printable(text: str, keep: str = "") -> str:
    """`text` with whatever is not printable written out as an escape: a name may come from a stranger's file."""
    if text.isprintable():
        return text
    return "".join(c if c in keep or c.isprintable() else _escape(c) for c in text)


def _escape(c: str) -> str:
    if c < "\x7f":
        return c.encode("unicode_escape").decode("ascii")
    return json.dumps(c)[1:-1] if c != "\x7f" else "\\u007f"  # these may appear in JSON, whose escape it is then


def for_terminal(text: str) -> str:
    """Lines for people: nothing that a terminal acts on, no secrets. Spaces of every kind and tabs stay."""
    if text in ("", "\n"):
        return text
    spaces = (
        "" if text.isprintable() else "".join(c for c in set(text) if c in "\n\t" or unicodedata.category(c) == "Zs")
    )
    return redact(printable(text, spaces))


class Shown:
    """A text stream as people see it: `for_terminal`, and with escapes where its encoding lacks a letter."""

    def __init__(self, stream: Any) -> None:
        self.unescaped = stream
        self.leaves = False  # True: its reader may go away, and what is written after that goes nowhere

    def write(self, text: str) -> int:
        # a progress bar of another library goes to its line's start, or one line up
        moved = re.match(r"\r|\n*(?:\x1b\[A)+\Z", text) if self.isatty() else None
        start = moved[0] if moved else ""
        fit = start + for_terminal(text[len(start) :])
        try:
            try:
                self.unescaped.write(fit)
            except UnicodeEncodeError as error:
                self.unescaped.write(fit.encode(error.encoding, "backslashreplace").decode(error.encoding))
        except BrokenPipeError as error:
            self._left(error)
        return len(text)

    def flush(self) -> None:
        try:
            self.unescaped.flush()
        except BrokenPipeError as error:
            self._left(error)

    def _left(self, error: BrokenPipeError) -> None:
        if not self.leaves:
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.unescaped.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unescaped, name)


def unescaped(stream: Any) -> Any:
    """The stream itself, for what draws on a terminal and has made every text of others `clean`."""
    return getattr(stream, "unescaped", stream)


def shown(text: str) -> str:
    """Text of others on one line, control characters escaped."""
    return printable(" ".join(text.split()))


def clean(text: object, most: int = 4000) -> str:
    """A text as one line that no terminal acts on: control, format and bidirectional characters are written out as escapes."""
    return "".join(_plain(c) for c in str(text)[:most])


def _plain(c: str) -> str:
    if c == "\n":
        return "↵ "
    return " " if c == "\t" or unicodedata.category(c) == "Zs" else printable(c)


def short(text: str, most: int = 80) -> str:
    """The start of a text that is longer than a message can hold."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Any of these texts, a longer one first; nothing where there is none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Cells as a plain table."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def repeated(names: Iterable[str]) -> list[str]:
    """The names that occur more than once, in their order."""
    return [name for name, count in Counter(names).items() if count > 1]


def counted(n: float, one: str, many: str = "") -> str:
    """``1 run``, ``1,200 runs``."""
    return f"{n:,.0f} {one if n == 1 else many or one + 's'}"


def closest(word: str, names: Iterable[str], least: float = 0.6) -> str:
    """The name that is most like a word; empty where none is.

    Args:
        least: likeness that a name must have, in [0, 1]; one with two letters swapped (dop, dpo) comes first.
    """
    there = list(names)
    same = [n for n in there if sorted(n.lower()) == sorted(word.lower())]
    swapped = [n for n in same if sum(a != b for a, b in zip(n.lower(), word.lower(), strict=True)) <= 2]
    return next(iter(swapped or difflib.get_close_matches(word, there, 1, least)), "")


def closest_file(path: Path, names: Iterable[str] | None = None) -> str:
    """The path beside `path`, or among `names` there, that may be meant: one with another ending, or with a stem that is much like it."""
    if names is None:
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    stems: dict[str, str] = {}
    for name in sorted(names, key=lambda n: (Path(n).suffix != path.suffix, n)):
        stems.setdefault(Path(name.removesuffix(".gz")).stem, name)
    near = closest(Path(path.name.removesuffix(".gz")).stem, stems, 0.65)
    return str(path.parent / stems[near]) if near else ""


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """``did you mean "x"?``, or all there are."""
    near = closest(word, names)
    return f'did you mean "{near}"?' if near else f"there are {', '.join(names)}"


# ---- Text without secrets: what a library says in an error may repeat a token that it was given ----

SECRET_NAMES = re.compile(r"TOKEN|API_?KEY|PASSWORD|PASSWD|SECRET|CREDENTIAL", re.IGNORECASE)
SHORTEST = 6  # shorter values are words of the text as often as not
IN_A_URL = re.compile(r"""(:/{1,2})[^/\s"'<>]+@""")  # one slash: of a URL that was taken for a path
ESCAPED = r"(?<=\\[abfnrtv0])|(?<=\\x[0-9a-f]{2})|(?<=\\u[0-9a-f]{4})|(?<=\\U[0-9a-f]{8})"  # behind an escape's letters
START = rf"(?:\b|{ESCAPED})"
IN_A_QUERY = re.compile(rf"""{START}((?i:api_?key|access_token|token|password|signature)=)[^&\s"'<>\\]+""")
BEARER = re.compile(
    rf"{START}((?i:bearer))\s+[A-Za-z0-9._~+/=-]{{10,}}"
    rf"|{START}((?i:basic))\s+(?=\w*(?:[0-9=]|[a-z][A-Z]))[A-Za-z0-9+/=]{{8,}}"
)
KNOWN_SHAPES = re.compile(
    rf"(?:(?<![/\w])|{ESCAPED})"
    r"hf_[A-Za-z0-9]{8,}\b(?![./-]\w)|"
    rf"{START}"
    r"(?:hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|xox[a-z]-[\w-]{10,}|AKIA[A-Z0-9]{16})\b"
)
HIDDEN = "[hidden]"


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """`text` with every secret that can be recognized replaced: values of variables called ..TOKEN, ..KEY, user names in URLs."""
    found = os.environ if environment is None else environment
    secrets = {v for k, v in found.items() if SECRET_NAMES.search(k) and len(v) >= SHORTEST and not v.isdecimal()}
    for secret in sorted(secrets | _stored_token(found), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = BEARER.sub(lambda m: f"{m[1] or m[2]} {HIDDEN}", without_passwords(text))
    return KNOWN_SHAPES.sub(HIDDEN, text)


def without_passwords(text: str) -> str:
    """`text` without what URLs in it hold of user names, passwords and keys."""
    return IN_A_QUERY.sub(rf"\1{HIDDEN}", IN_A_URL.sub(rf"\1{HIDDEN}@", text))


def one_line(text: str, longest: int = 300) -> str:
    """Printable text on one line: a server's words reach a terminal."""
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return short(flat, longest)


def told(error: BaseException) -> str:
    """What an error says, fit to be shown: its type, one line, no secrets."""
    return one_line(redact(f"{type(error).__name__}: {error}"))


def _stored_token(environment: Mapping[str, str]) -> set[str]:
    """The hub token that a person has logged in with."""
    home = environment.get("HF_HOME") or str(Path(environment.get("HOME", "~")).expanduser() / ".cache" / "huggingface")
    file = Path(environment.get("HF_TOKEN_PATH") or Path(home) / "token")
    try:
        token = _text_of(file, file.stat().st_mtime_ns)
    except (OSError, ValueError):
        return set()
    return {token} if len(token) >= SHORTEST else set()


@lru_cache
def _text_of(file: Path, _: int) -> str:
    return file.read_text().strip()


def gigabytes(size: float) -> str:
    """``1.49 GB``, ``12.3 MB``, ``4 kB``, ``120 B``."""
    if size < 1000:
        return f"{size:.0f} B"
    if size >= 1e9:
        return f"{size / 1e9:.2f} GB"
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} kB"
