"""Personal data and secrets by pattern: what is found, what is not, and that masking removes every finding."""

from __future__ import annotations

import itertools
import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penchant.data.audit.sensitive import FINDERS, GROUPS, TITLES, Finder, entropy, find, iban, luhn, redact

TOKEN = "aB3dE5fG7hI9jK1lM3nO5pQ7rS9tU1vW3"
FOUND = {
    "write to a.b+c@mail.example.org, please": "email",
    "card 4111 1111 1111 1111 or": "card",
    "card 5500-0000-0000-0004.": "card",
    "DE89 3704 0044 0532 0130 00 AND MORE": "iban",
    "GB82WEST12345698765432": "iban",
    "my ssn is 123-45-6789": "ssn",
    "call +49 30 123 4567.": "phone",
    "call (555) 123-4567 now": "phone",
    "call 555-123-4567": "phone",
    "from 8.8.8.8": "ip",
    "from 2001:4860:4860::8888": "ip",
    f"-----BEGIN RSA PRIVATE KEY-----\n{TOKEN}\n-----END RSA PRIVATE KEY-----": "private_key",
    "AKIAABCDEFGHIJKLMNOP": "api_key",
    "key=sk-" + "a1B2" * 6: "api_key",
    "ghp_" + "a1B2" * 9: "api_key",
    f"token: {TOKEN}": "random_token",
}
CLEAN = [
    "4111 1111 1111 1112",  # the check digit is wrong
    "DE89 3704 0044 0532 0130 01",
    "000-12-3456 and 123-00-4567",
    "2024-01-02 10:20:30, 1,234,567.89, 3.14159265358979",
    "127.0.0.1, 192.168.0.1, 10.0.0.1, 999.1.1.1, version 1.2.3.4.5",
    "12:34:56",
    "https://example.org/some/very-long-path/that-is-no-secret/at-all-of-any-kind",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "0123456789abcdef0123456789abcdef01234567",  # a hash
    "decorated @property and @user",
    "disk-like, task-oriented, ask-me-anything",
]


@pytest.mark.parametrize(("text", "kind"), FOUND.items())
def test_what_is_found(text: str, kind: str) -> None:
    assert [s.kind for s in find(text)] == [kind]
    shown, counts = redact(text)
    assert f"[{kind.upper()}]" in shown and counts == {kind: 1}


@pytest.mark.parametrize("text", CLEAN)
def test_what_is_not(text: str) -> None:
    assert find(text) == [] and redact(text) == (text, {})


def test_check_digits() -> None:
    assert luhn("4111111111111111") and not luhn("4111111111111112")
    assert iban("GB82 WEST 1234 5698 7654 32") and not iban("GB82 WEST 1234 5698 7654 33")


def test_entropy_in_closed_form() -> None:
    assert entropy("aaaa") == 0 and entropy("abab") == 1 and entropy("abcd") == 2


def test_groups_are_found_apart() -> None:
    text = f"a@b.co {TOKEN}"
    assert [s.kind for s in find(text, ("pii",))] == ["email"]
    assert [s.kind for s in find(text, ("secrets",))] == ["random_token"]
    assert sorted(k for kinds in GROUPS.values() for k in kinds) == sorted(TITLES)


@given(st.lists(st.one_of(st.sampled_from(list(FOUND)), st.text(max_size=20)), max_size=6))
def test_any_text_can_be_masked_and_stays_masked(parts: list[str]) -> None:
    text = " ; ".join(parts)
    spans = find(text)
    assert all(a.end <= b.start for a, b in itertools.pairwise(spans))
    shown, counts = redact(text)
    assert counts.total() == len(spans)
    assert json.dumps(shown)


@pytest.mark.parametrize("part", ["1", "1 ", "a@", "A", "AB12 ", ":", "a."])
def test_long_hostile_texts_take_time_in_proportion(part: str) -> None:
    """With a backtracking pattern, eight times the text would take sixty-four times the work."""

    def seconds(length: int) -> float:
        text, taken = (part * length)[:length], []
        for _ in range(3):
            start = time.process_time()
            find(text)
            taken.append(time.process_time() - start)
        return min(taken)

    assert seconds(40_000) < 24 * seconds(5000) + 0.02


@given(
    st.text("0123459af:. ", max_size=60)
    | st.ip_addresses().map(str)
    | st.ip_addresses(v=6).map(lambda a: f"a: {a.exploded}.")
)
@pytest.mark.parametrize("finder", FINDERS)
def test_a_hint_never_hides_a_value(finder: Finder, text: str) -> None:
    assert finder.hint(text) or not list(finder.find(text))
