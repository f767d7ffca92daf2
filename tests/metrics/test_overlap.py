"""BLEU and ROUGE: sacrebleu's corpus score on all rows and on resamples, ROUGE by hand, and messages without the packages."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from penchant.errors import ConfigError
from penchant.metrics.completions import bleu_of_sums, overlap_figures, require_overlap, sentence_statistics

WORDS = [
    "the",
    "cat",
    "dog",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "big",
    "small",
    "old",
    "house",
    ",",
    ".",
    "red",
    "car",
    "went",
    "home",
]


def corpus(n: int = 24) -> tuple[list[str], list[list[str]]]:
    """Completions that share word sequences with one to three references. One is empty, one is a single word."""
    rng = np.random.default_rng(0)
    texts, references = [], []
    for i in range(n):
        words = rng.choice(WORDS, 14).tolist()
        texts.append(" ".join(words[: 6 + i % 8]))
        shared = 2 if i % 4 == 3 else 9
        references.append([" ".join([*words[j : shared + j], *rng.choice(WORDS, 4)]) for j in range(1 + i % 3)])
    return ["", "cat", *texts[2:]], references


def sacrebleus_own(texts: list[str], references: list[list[str]]) -> float:
    sacrebleu = pytest.importorskip("sacrebleu")
    most = max(map(len, references))
    streams = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
    return float(sacrebleu.corpus_bleu(texts, streams).score)


def test_bleu_of_summed_counts_is_sacrebleus_corpus_score_on_the_whole_and_on_resamples() -> None:
    pytest.importorskip("sacrebleu")
    texts, references = corpus()
    rows = sentence_statistics(texts, references)
    whole = bleu_of_sums(rows.sum(0))
    assert whole == pytest.approx(sacrebleus_own(texts, references), abs=1e-9) and 5 < whole < 95
    rng = np.random.default_rng(1)
    for size in [1] * 20 + [8] * 20:  # a single one may have no matching 4-gram, which needs smoothing
        picks = rng.integers(0, len(texts), size)
        own = sacrebleus_own([texts[i] for i in picks], [references[i] for i in picks])
        assert bleu_of_sums(rows[picks].sum(0)) == pytest.approx(own, abs=1e-9)
    # nor is it the mean of sentence scores
    assert abs(whole - np.mean([bleu_of_sums(r) for r in rows])) > 0.1


def test_intervals_are_of_the_corpus_score_by_prompt() -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    texts, references = corpus()
    single, signature = overlap_figures(texts, references, np.arange(24), stemmer=False)
    bleu = single[0]
    assert bleu.interval is not None and bleu.interval[0] < bleu.value < bleu.interval[1]
    rng = np.random.default_rng(5)
    drawn = []
    for _ in range(100):
        picks = rng.integers(0, 24, 24)
        drawn.append(sacrebleus_own([texts[i] for i in picks], [references[i] for i in picks]))
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert bleu.interval == (pytest.approx(low, abs=2.5), pytest.approx(high, abs=2.5))
    twice = overlap_figures(texts * 2, references * 2, np.tile(np.arange(24), 2), stemmer=False)[0][0]
    assert twice.interval == (pytest.approx(bleu.interval[0], abs=0.5), pytest.approx(bleu.interval[1], abs=0.5))
    assert "tok:13a" in signature and "stemmer:off" in signature


def test_rouge_by_hand() -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    texts, references = ["the cats sat", "a dog"], [["the cat sat down", "no"], ["a dog"]]

    def f1(stemmer: bool) -> list[float]:
        return [f.value for f in overlap_figures(texts, references, [0, 1], stemmer=stemmer)[0][1:]]

    unigram = 2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4)  # the, sat
    assert f1(False) == pytest.approx([(unigram + 1) / 2, 0.5, (unigram + 1) / 2])
    stemmed = 2 * 1.0 * (3 / 4) / (1.0 + 3 / 4)
    bigram = 2 * 1.0 * (2 / 3) / (1.0 + 2 / 3)
    assert f1(True) == pytest.approx([(stemmed + 1) / 2, (bigram + 1) / 2, (stemmed + 1) / 2])


@pytest.mark.parametrize("package", ["sacrebleu", "rouge_score"])
def test_without_a_package_a_sentence_says_what_to_install(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=r"pip install 'penchant\[eval\]'"):
        require_overlap()
