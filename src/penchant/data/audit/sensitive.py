"""Find, count and mask personal data and secrets in texts by their form. A value that was found is never stored."""

from __future__ import annotations

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple


class Span(NamedTuple):
    """A span of a text that looks like a value of this kind."""

    kind: str
    start: int
    end: int


Found = Iterator[Span]


class Finder(NamedTuple):
    """How values of some kinds are found."""

    group: str  # ``pii`` or ``secrets``
    hint: Callable[[str], bool]  # fast test whether a text can hold one at all
    find: Callable[[str], Found]  # the verified spans


# ---- Checks ----


def luhn(digits: str) -> bool:
    """Whether the check digit of a payment card number is right (ISO/IEC 7812)."""
    total = 0
    for i, c in enumerate(reversed(digits)):
        d = int(c) * (1 + i % 2)
        total += d - 9 if d > 9 else d
    return total % 10 == 0


def iban(value: str) -> bool:
    """Whether an IBAN passes the check of ISO 13616: rearranged and read as a number, it is 1 modulo 97."""
    compact = value.replace(" ", "")
    if not 15 <= len(compact) <= 34:
        return False
    return int("".join(str(int(c, 36)) for c in compact[4:] + compact[:4])) % 97 == 1


def entropy(token: str) -> float:
    """Shannon entropy of a token's characters, in bits per character."""
    n = len(token)
    return -sum(c / n * math.log2(c / n) for c in Counter(token).values())


# ---- Kinds ----

_MAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}(?![\w-])")
_NUMBER = re.compile(r"\d(?:(?:[ .-]|\)[ -]?)?\d){7,18}")  # starts with a bare digit, which makes the search fast
_NATIONAL = re.compile(r"(?:1[ .-])?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}")
_SSN = re.compile(r"(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}")
_IBAN = re.compile(r"[A-Z]{2}\d\d(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?\b")
_IPV4 = re.compile(r"\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)")
_IPV6 = re.compile(r"(?<![\w:])(?:[0-9a-fA-F]{0,4}:){3,7}[0-9a-fA-F]{0,4}(?![\w:])")
_TOKEN = re.compile(r"(?<![A-Za-z0-9+/=_-])[A-Za-z0-9+/_-]{32,}={0,2}(?![A-Za-z0-9+/=_-])")
_PRIVATE = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
_FOUR_DIGITS = re.compile(r"\d\d\d\d|\d\d\d[ .)-]")

# prefixes by which providers make leaked keys easy to find, and the whole pattern
KEYS = {
    "AKIA": r"AKIA[0-9A-Z]{16}",
    "ASIA": r"ASIA[0-9A-Z]{16}",
    "AIza": r"AIza[0-9A-Za-z_-]{35}",
    "ghp_": r"ghp_[0-9A-Za-z]{36}",
    "gho_": r"gho_[0-9A-Za-z]{36}",
    "ghs_": r"ghs_[0-9A-Za-z]{36}",
    "github_pat_": r"github_pat_[0-9A-Za-z_]{40,}",
    "glpat-": r"glpat-[0-9A-Za-z_-]{20}",
    "sk-": r"sk-(?:[a-z]+-)?[0-9A-Za-z_-]{20,}",
    "hf_": r"hf_[0-9A-Za-z]{30,}",
    "xox": r"xox[abprs]-[0-9A-Za-z-]{10,}",
    "sk_live_": r"sk_live_[0-9A-Za-z]{20,}",
    "rk_live_": r"rk_live_[0-9A-Za-z]{20,}",
    "npm_": r"npm_[0-9A-Za-z]{36}",
    "pypi-": r"pypi-[0-9A-Za-z_-]{50,}",
    "SG.": r"SG\.[0-9A-Za-z_-]{20,}\.[0-9A-Za-z_-]{20,}",
    "eyJ": r"eyJ[0-9A-Za-z_-]{10,}\.eyJ[0-9A-Za-z_-]{10,}\.[0-9A-Za-z_-]{10,}",
}
_KEYS = {start: re.compile(r"(?<![0-9A-Za-z_])" + pattern) for start, pattern in KEYS.items()}


def _matches(kind: str, pattern: re.Pattern[str]) -> Callable[[str], Found]:
    return lambda text: (Span(kind, *m.span()) for m in pattern.finditer(text))


def _digits(text: str) -> bool:
    return any(d in text for d in "0123456789") and _FOUR_DIGITS.search(text) is not None


def _word_before(text: str, start: int) -> bool:
    before_last, last = text[max(0, start - 2) : start - 1], text[start - 1 : start] if start else ""
    return last.isalnum() or (last != "" and last in "_.,-" and before_last.isalnum())


def _numbers(text: str) -> Found:
    """Runs of digits that are a card, social security or phone number, but not dates or plain long numbers."""
    for m in _NUMBER.finditer(text):
        start, end = m.span()
        if _word_before(text, start) or text[end : end + 1].isalnum():
            continue
        start -= text[start - 1 : start] == "("
        start -= text[start - 1 : start] == "+"
        value = text[start:end]
        digits = re.sub(r"\D", "", value)
        if 13 <= len(digits) <= 19 and digits[0] in "23456" and set(value) <= set("0123456789 -") and luhn(digits):
            yield Span("card", start, end)
        elif _SSN.fullmatch(value):
            yield Span("ssn", start, end)
        elif (value[0] == "+" and len(digits) <= 15) or _NATIONAL.fullmatch(value):
            yield Span("phone", start, end)


def _ibans(text: str) -> Found:
    for m in _IBAN.finditer(text):
        if _word_before(text, m.start()):
            continue
        words = m.group().split(" ")  # the match may include a word in capitals after it
        for count in range(len(words), 0, -1):
            value = " ".join(words[:count])
            if iban(value):
                yield Span("iban", m.start(), m.start() + len(value))
                break


def _addresses(text: str) -> Found:
    for pattern in (_IPV4, _IPV6):
        for m in pattern.finditer(text):
            try:
                address = ipaddress.ip_address(m.group())
            except ValueError:
                continue
            # 127.0.0.1 and 192.168.x.x identify nobody
            if address.is_global and not _word_before(text, m.start()):
                yield Span("ip", *m.span())


def _keys(text: str) -> Found:
    for start, pattern in _KEYS.items():
        if start in text:
            yield from _matches("api_key", pattern)(text)


def _random_tokens(text: str) -> Found:
    """Long tokens of letters and digits that look random: at least 4 bits per character, with digits and letters of both cases."""
    for m in _TOKEN.finditer(text):
        token = m.group()
        mixed = any(c.isdigit() for c in token) and any(c.islower() for c in token) and any(c.isupper() for c in token)
        if mixed and token.count("/") < 3 and token.count("-") + token.count("_") < 4 and entropy(token) >= 4:
            yield Span("random_token", *m.span())


TITLES = {
    "email": "e-mail addresses",
    "iban": "IBANs (check digits hold)",
    "card": "payment card numbers (check digit holds)",
    "ssn": "numbers written like a US social security number",
    "phone": "phone numbers",
    "ip": "public IP addresses",
    "private_key": "private key blocks",
    "api_key": "keys with a known beginning (sk-, ghp_, AKIA...)",
    "random_token": "long tokens that look random",
}
GROUPS = {
    "pii": ("email", "iban", "card", "ssn", "phone", "ip"),
    "secrets": ("private_key", "api_key", "random_token"),
}
FINDERS = (  # of two overlapping values, the earlier finder's is kept
    Finder("secrets", lambda t: "PRIVATE KEY-----" in t, _matches("private_key", _PRIVATE)),
    Finder("secrets", lambda t: True, _keys),
    Finder("secrets", lambda t: max(map(len, t.split()), default=0) >= 32, _random_tokens),
    Finder("pii", lambda t: "@" in t, _matches("email", _MAIL)),
    Finder("pii", _digits, _ibans),
    # an address has three dots, or "::", or six colons and more: turns of a conversation have two or three
    Finder("pii", lambda t: t.count(".") > 2 or "::" in t or t.count(":") > 5, _addresses),
    Finder("pii", _digits, _numbers),
)


def find(text: str, groups: Collection[str] = ("pii", "secrets")) -> list[Span]:
    """Spans that look like personal data or secrets, in order, without overlaps."""
    spans: list[Span] = []
    for finder in FINDERS:
        if finder.group in groups and finder.hint(text):
            for span in finder.find(text):
                if all(span.end <= s.start or span.start >= s.end for s in spans):
                    spans.append(span)
    return sorted(spans, key=lambda s: s.start)


def redact(text: str, groups: Collection[str] = ("pii", "secrets")) -> tuple[str, Counter[str]]:
    """The text with ``[EMAIL]``, ``[API_KEY]``... in place of each value found, and the number of each kind."""
    spans = find(text, groups)
    for span in reversed(spans):
        text = f"{text[: span.start]}[{span.kind.upper()}]{text[span.end :]}"
    return text, Counter(s.kind for s in spans)
