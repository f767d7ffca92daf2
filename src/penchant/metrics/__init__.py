"""Evaluation: figures over rows, with intervals."""
