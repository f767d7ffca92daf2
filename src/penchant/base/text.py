"""Text for display: printable in any terminal, without secrets."""

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

# ---- Untrusted text for a terminal ----


def printable(text: str, keep: str = "") -> str:
    """Escape whatever is not printable in `text`, as a name may come from an untrusted file."""
    if text.isprintable():
        return text
    return "".join(c if c in keep or c.isprintable() else _escape(c) for c in text)


def _escape(c: str) -> str:
    if c < "\x7f":
        return c.encode("unicode_escape").decode("ascii")
    return json.dumps(c)[1:-1] if c != "\x7f" else "\\u007f"  # may appear in JSON, so use JSON's escapes


def for_terminal(text: str) -> str:
    """Make lines safe for a terminal: no control characters, no secrets. Spaces of every kind and tabs stay."""
    if text in ("", "\n"):
        return text
    spaces = (
        "" if text.isprintable() else "".join(c for c in set(text) if c in "\n\t" or unicodedata.category(c) == "Zs")
    )
    return redact(printable(text, spaces))


class Shown:
    """A text stream that applies `for_terminal`, and escapes characters that its encoding lacks."""

    def __init__(self, stream: Any) -> None:
        self.unescaped = stream
        self.leaves = False  # True: once the reader is gone, output is discarded

    def write(self, text: str) -> int:
        # another library's progress bar returns to the start of its line, or goes one line up
        match = re.match(r"\r|\n*(?:\x1b\[A)+\Z", text) if self.isatty() else None
        prefix = match[0] if match else ""
        safe_text = prefix + for_terminal(text[len(prefix) :])
        try:
            try:
                self.unescaped.write(safe_text)
            except UnicodeEncodeError as error:
                self.unescaped.write(safe_text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        except BrokenPipeError as error:
            self._handle_broken_pipe(error)
        return len(text)

    def flush(self) -> None:
        try:
            self.unescaped.flush()
        except BrokenPipeError as error:
            self._handle_broken_pipe(error)

    def _handle_broken_pipe(self, error: BrokenPipeError) -> None:
        if not self.leaves:
            raise error
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, self.unescaped.fileno())
        os.close(devnull)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unescaped, name)


def unescaped(stream: Any) -> Any:
    """The underlying stream, for code that draws on a terminal and applies `clean` to untrusted text itself."""
    return getattr(stream, "unescaped", stream)


def shown(text: str) -> str:
    """Untrusted text on one line, with control characters escaped."""
    return printable(" ".join(text.split()))


def clean(text: object, max_chars: int = 4000) -> str:
    """A text as one line that is safe for a terminal: control, format and bidirectional characters are escaped."""
    return "".join(_plain(c) for c in str(text)[:max_chars])


def _plain(c: str) -> str:
    if c == "\n":
        return "↵ "
    return " " if c == "\t" or unicodedata.category(c) == "Zs" else printable(c)


def short(text: str, max_chars: int = 80) -> str:
    """Shorten a text to at most `max_chars` characters."""
    return text if len(text) <= max_chars else f"{text[: max_chars - 3]}..."


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern for any of these texts, longer ones first; it matches nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Format cells as a plain table."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def repeated(names: Iterable[str]) -> list[str]:
    """The names that occur more than once, in order."""
    return [name for name, count in Counter(names).items() if count > 1]


def counted(n: float, singular: str, plural: str = "") -> str:
    """``1 run``, ``1,200 runs``."""
    return f"{n:,.0f} {singular if n == 1 else plural or singular + 's'}"


def closest(word: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """The name most similar to a word; empty if none is.

    Args:
        cutoff: minimum similarity, in [0, 1]; a name with two letters swapped (dop, dpo) takes precedence.
    """
    candidates = list(names)
    anagrams = [n for n in candidates if sorted(n.lower()) == sorted(word.lower())]
    swapped = [n for n in anagrams if sum(a != b for a, b in zip(n.lower(), word.lower(), strict=True)) <= 2]
    return next(iter(swapped or difflib.get_close_matches(word, candidates, 1, cutoff)), "")


def closest_file(path: Path, names: Iterable[str] | None = None) -> str:
    """A likely intended path next to `path` (or among `names` there): another ending, or a similar stem; empty if there is none."""
    if names is None:
        names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    stems: dict[str, str] = {}
    for name in sorted(names, key=lambda n: (Path(n).suffix != path.suffix, n)):
        stems.setdefault(Path(name.removesuffix(".gz")).stem, name)
    match = closest(Path(path.name.removesuffix(".gz")).stem, stems, 0.65)
    return str(path.parent / stems[match]) if match else ""


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """``did you mean "x"?``, or a list of all names."""
    match = closest(word, names)
    return f'did you mean "{match}"?' if match else f"there are {', '.join(names)}"


# ---- Text without secrets: a library's error message may contain a token that it was given ----

SECRET_NAMES = re.compile(r"TOKEN|API_?KEY|PASSWORD|PASSWD|SECRET|CREDENTIAL", re.IGNORECASE)
SHORTEST = 6  # shorter values may well be ordinary words
IN_A_URL = re.compile(r"""(:/{1,2})[^/\s"'<>]+@""")  # one slash: a URL that was treated as a path
ESCAPED = r"(?<=\\[abfnrtv0])|(?<=\\x[0-9a-f]{2})|(?<=\\u[0-9a-f]{4})|(?<=\\U[0-9a-f]{8})"  # after an escape sequence
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
    """Hide every recognizable secret in `text`: values of variables named ..TOKEN or ..KEY, known token formats, logins in URLs."""
    variables = os.environ if environment is None else environment
    secrets = {v for k, v in variables.items() if SECRET_NAMES.search(k) and len(v) >= SHORTEST and not v.isdecimal()}
    for secret in sorted(secrets | _stored_token(variables), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = BEARER.sub(lambda m: f"{m[1] or m[2]} {HIDDEN}", without_passwords(text))
    return KNOWN_SHAPES.sub(HIDDEN, text)


def without_passwords(text: str) -> str:
    """Hide user names, passwords and keys in the URLs of a text."""
    return IN_A_QUERY.sub(rf"\1{HIDDEN}", IN_A_URL.sub(rf"\1{HIDDEN}@", text))


def one_line(text: str, longest: int = 300) -> str:
    """Printable text on one line, such as a server's reply for a terminal."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return short(line, longest)


def told(error: BaseException) -> str:
    """An error's type and message for display: one line, no secrets."""
    return one_line(redact(f"{type(error).__name__}: {error}"))


def _stored_token(environment: Mapping[str, str]) -> set[str]:
    """The hub token that the user has logged in with."""
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
