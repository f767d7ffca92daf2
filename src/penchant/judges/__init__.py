"""Pairwise judges: which of two answers to a prompt is better, by a person's own function or a model behind an endpoint."""

from penchant.judges.both_ways import BothWays, ask_both_ways
from penchant.judges.load import JudgeOptions, load_judge
from penchant.judges.protocol import Answers, PairJudge, Question

__all__ = ["Answers", "BothWays", "JudgeOptions", "PairJudge", "Question", "ask_both_ways", "load_judge"]
