"""Metrics: figures over rows with confidence intervals, verdicts and trust flags."""
