"""From answers through an arena to a better model: DPO on collected judgments beats its start by the true reward."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
from studio_people import say
from studios import SOURCE, arena_of

from penchant import api
from penchant.demo import TRAINING, _load, _write, asset
from penchant.metrics.stats import paired_bootstrap
from penchant.models.load import load_tokenizer
from penchant.rewards.builtin import sentiment
from penchant.studio.pairs import Answers
from penchant.studio.queue import next_item

FIRST, SECOND = "one draw", "another draw"


@pytest.mark.slow
def test_dpo_on_what_the_arena_collected_beats_its_start_by_the_true_reward(tmp_path: Path) -> None:
    """The true reward is VADER's. Two simulated annotators judge by it, one with much noise and a bias for the left."""
    start, tokenizer = _load(str(asset("model"))), load_tokenizer(str(asset("model")))
    drawn = json.loads(asset("openings.json").read_text())
    openings, held_out = drawn["train"][:260], drawn["eval"][:60]
    written = _write(start, tokenizer, openings, 2, 0, None)
    rows = [(o, {FIRST: written.texts[2 * i], SECOND: written.texts[2 * i + 1]}) for i, o in enumerate(openings)]
    arena = arena_of(tmp_path, answers=Answers(rows, {FIRST: SOURCE, SECOND: SOURCE}), overlap=0.2)
    rng = random.Random(0)
    going = ["Ada", "Ben"]
    while going:
        for who in list(going):
            item = next_item(arena, who)
            if item is None:
                going.remove(who)
                continue
            assert item.pair.answers is not None
            a, b = sentiment(list(item.pair.answers))
            logit = 6 * (a - b) if who == "Ada" else 2 * (a - b) + (0.5 if item.left == "a" else -0.5)
            tie = abs(a - b) < 0.05
            verdict = "tie" if tie else "a" if rng.random() < 1 / (1 + math.exp(-logit)) else "b"
            say(arena, item, who, verdict)
    before = _write(start, tokenizer, held_out, 4, 1, None)
    data = {**TRAINING["data"], "path": str(arena.preferences.path), "validation_rows": 20}
    train = {**TRAINING["train"], "epochs": 3, "batch_size": 16}
    config = {**TRAINING, "data": data, "train": train, "model": {"path": str(asset("model")), "dtype": "fp32"}}
    result = api.train({**config, "output": str(tmp_path / "run")}, quiet=True)
    after = _write(_load(str(result.model)), tokenizer, held_out, 4, 1, None)
    assert before.rewards is not None and after.rewards is not None
    gain = paired_bootstrap(before.rewards, after.rewards, clusters=after.prompts)
    print(gain)
    assert gain.low > 0.05
