"""`penchant chat` and `penchant serve`, which share one model wrapper and one stream of completions."""
