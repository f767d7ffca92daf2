"""The file format of flags."""

from __future__ import annotations

import json

from penchant.flags.rule import Evidence, Flag


def test_a_flag_comes_back_from_json_as_it_was() -> None:
    flag = Flag(
        "few_prompts", "few", "note", "12 prompts.", "give more", (Evidence("prompts", (12.0,), ()),), about="dpo"
    )
    assert Flag.from_json(json.loads(json.dumps(flag.to_json()))) == flag
