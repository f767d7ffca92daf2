"""Distributed training on torch's own engine: which processes take part, how a model is sharded, how the processes start and end."""
