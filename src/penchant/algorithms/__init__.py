"""Algorithms: each turns packed batches into losses; the loop owns everything else."""
