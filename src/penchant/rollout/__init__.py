"""Rollouts: completions sampled from a model."""
