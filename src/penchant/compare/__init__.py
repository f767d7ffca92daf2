"""`penchant compare`: several runs on the same prompts, and a verdict on which is better."""
