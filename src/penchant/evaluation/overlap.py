"""BLEU (sacrebleu) and ROUGE (rouge-score) of completions against reference answers; the two packages are an extra."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from penchant.errors import ConfigError
from penchant.evaluation.figures import DRAWS, Figure, mean_of
from penchant.evaluation.stats import bootstrap_sums

ROUGE = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_L"}
ORDERS = 4


@dataclass(frozen=True, slots=True)
class Overlap:
    """Figures (``generated/bleu`` from 0 to 100, ``generated/rouge_...`` from 0 to 1), and how they were computed in the packages' words."""

    figures: list[Figure]
    signature: str


def require_overlap() -> None:
    """Both packages are there.

    Raises:
        ConfigError: they are not; it says how to install them.
    """
    try:
        import rouge_score  # noqa: F401
        import sacrebleu  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "BLEU and ROUGE",
            f"need an extra ({error.name or error} is not installed)",
            "pip install 'penchant[eval]', or leave them out with --no-overlap",
        ) from error


def overlap_figures(
    texts: Sequence[str], references: Sequence[Sequence[str]], clusters: Sequence[int] | np.ndarray, *, stemmer: bool
) -> Overlap:
    """Corpus BLEU and mean ROUGE F1 over completions, with intervals by prompt.

    BLEU is of the whole corpus, ``BP exp(mean_n log p_n)`` of summed n-gram counts; its interval draws prompts and computes it anew from
    their counts. ROUGE is a mean over completions, each against the reference answer that gives it the highest F1.

    Args:
        texts: completions; references: of each, at least one; clusters: each one's prompt; stemmer: Porter's, for ROUGE.

    Raises:
        ConfigError: a package is missing.

    Papers: Papineni et al. (2002); arXiv 1804.08771 (sacrebleu); Lin (2004).
    """
    require_overlap()
    bleu, signature = _bleu(texts, references, clusters)
    how = "on" if stemmer else "off"
    return Overlap([bleu, *_rouge(texts, references, clusters, stemmer)], f"BLEU|{signature}; ROUGE F1|stemmer:{how}")


def _bleu(
    texts: Sequence[str], references: Sequence[Sequence[str]], clusters: Sequence[int] | np.ndarray
) -> tuple[Figure, str]:
    from sacrebleu.metrics import BLEU

    rows = sentence_statistics(texts, references)
    interval = bootstrap_sums(rows, bleu_of_sums, clusters=clusters, draws=DRAWS)
    metric = BLEU(force=True)  # completions that look tokenised are no reason to warn
    # also says with which settings; streams of references are as many as the most that one completion has
    streams = [[r[i] if i < len(r) else None for r in references] for i in range(max(map(len, references)))]
    whole = metric.corpus_score(list(texts), streams)  # type: ignore[arg-type]
    if abs(whole.score - interval.estimate) > 1e-6:
        raise AssertionError(f"BLEU from counts is {interval.estimate}, sacrebleu's own {whole.score}")
    return Figure.of("generated/bleu", interval, len(texts), clusters), str(metric.get_signature())


def sentence_statistics(texts: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """What corpus BLEU sums over completions, (n, 10): own and reference length, n-grams that match, n-grams in all."""
    from sacrebleu.metrics import BLEU

    metric: Any = BLEU(effective_order=True)  # of one sentence it is the counts alone that are taken
    scores = [metric.sentence_score(text, list(refs)) for text, refs in zip(texts, references, strict=True)]
    return np.array([[s.sys_len, s.ref_len, *s.counts, *s.totals] for s in scores], dtype=np.float64)


def bleu_of_sums(sums: np.ndarray) -> float:
    """Corpus BLEU of summed `sentence_statistics`, as sacrebleu computes it by default (smoothing: exp)."""
    from sacrebleu.metrics import BLEU

    counts = [round(v) for v in sums]
    return BLEU.compute_bleu(
        counts[2 : 2 + ORDERS], counts[2 + ORDERS :], counts[0], counts[1], smooth_method="exp"
    ).score


def _rouge(
    texts: Sequence[str], references: Sequence[Sequence[str]], clusters: Sequence[int] | np.ndarray, stemmer: bool
) -> list[Figure]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE), use_stemmer=stemmer)
    scores = [scorer.score_multi(list(refs), text) for text, refs in zip(texts, references, strict=True)]
    return [mean_of(f"generated/{ours}", [s[name].fmeasure for s in scores], clusters) for name, ours in ROUGE.items()]
