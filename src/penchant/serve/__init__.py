"""`penchant chat` and `penchant serve`: one model and one stream of completions under both."""
