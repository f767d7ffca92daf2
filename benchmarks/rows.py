"""Turn hh-rlhf transcripts into the token ids that both sides train on.

A transcript is split after its last "Assistant:", and the completion ends with EOS. If the prompt and the longest completion
exceed `max_length`, the prompt is truncated from the left. A completion is truncated to 7/8 of `max_length`.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

MARK = "\n\nAssistant:"
Row = dict[str, Any]


def make_rows(data: Path, model: Path, count: int, max_length: int) -> tuple[list[Row], dict[str, int]]:
    """Return the first `count` usable pairs as token ids, and the number of skipped rows for each reason."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows: list[Row] = []
    skipped = {"prompts differ": 0, "identical or empty": 0}
    with data.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if len(rows) == count:
                break
            pair = json.loads(line)
            cut = pair["chosen"].rfind(MARK) + len(MARK)
            prompt, texts = pair["chosen"][:cut], (pair["chosen"][cut:], pair["rejected"][cut:])
            if not pair["rejected"].startswith(prompt):
                skipped["prompts differ"] += 1
            elif texts[0] == texts[1] or not all(t.strip() for t in texts):
                skipped["identical or empty"] += 1
            else:
                rows.append({"line": number, **_tokenize(tokenizer, prompt, texts, max_length)})
    return rows, skipped


def _tokenize(tokenizer: Any, prompt: str, texts: tuple[str, ...], max_length: int) -> Row:
    sequences = [tokenizer(prompt + t + tokenizer.eos_token)["input_ids"] for t in texts]
    prompt_ids = tokenizer(prompt)["input_ids"]
    # as in TRL, the completion starts at the first token that differs from the prompt's own tokenization
    shared = min(_common_prefix(prompt_ids, ids) for ids in sequences)
    limit = max_length * 7 // 8
    completions = [ids[shared:][:limit] for ids in sequences]
    room = max_length - max(map(len, completions))
    return {
        "prompt_ids": prompt_ids[:shared][-room:],
        "completion_ids": completions,
        "truncated": [len(ids) - shared > limit for ids in sequences],
    }


def _common_prefix(a: list[int], b: list[int]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


if __name__ == "__main__":  # run as a separate process, so that the driver imports only the standard library
    import sys

    spec = json.loads(sys.argv[1])
    made_rows, skipped_rows = make_rows(Path(spec["data"]), Path(spec["model"]), spec["count"], spec["max_length"])
    Path(spec["out"]).write_text(json.dumps(made_rows))
    print(json.dumps({"rows": len(made_rows), "skipped": skipped_rows}))
