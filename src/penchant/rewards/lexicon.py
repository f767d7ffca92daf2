"""A sentiment lexicon as a reward: VADER's compound score."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np


@lru_cache(maxsize=1)
def _analyser() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def sentiment(texts: Iterable[str]) -> np.ndarray:
    """VADER's compound sentiment of each text, in [-1, 1] (Hutto & Gilbert, ICWSM 2014)."""
    analyser = _analyser()
    return np.array([analyser.polarity_scores(text)["compound"] for text in texts], dtype=np.float64)
