"""Tokenize prompts once, so that every side of a benchmark samples from the same token ids.

`fixed`: the first `length` tokens of a transcript. `natural`: unmodified prompts of 16 to 2 x `length` tokens.
A row has `chosen` (as in hh-rlhf), `prompt` or `text`.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rows import MARK

SHORTEST = 16  # tokens


def texts_of(data: Path) -> Iterator[tuple[str, str]]:
    """Yield (prompt, whole text) of each row."""
    with data.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            text = row.get("chosen") or row.get("text") or row.get("prompt") or ""
            cut = text.rfind(MARK)
            yield (text[: cut + len(MARK)] if cut >= 0 else text), text


def make_prompts(data: Path, model: Path, count: int, length: int) -> dict[str, Any]:
    """Return up to `count` prompts of each kind, the full-stop and EOS token ids, and a pad token id other than EOS."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    fixed = (t[:length] for _, text_of_row in texts_of(data) if len(t := ids(text_of_row)) >= length)
    natural = (t for prompt, _ in texts_of(data) if SHORTEST <= len(t := ids(prompt)) <= 2 * length)
    prompts = {"fixed": list(itertools.islice(fixed, count)), "natural": list(itertools.islice(natural, count))}
    return {**prompts, "full_stop": ids(" good.")[-1], "eos": tokenizer.eos_token_id, "pad": spare_token(tokenizer)}


def spare_token(tokenizer: Any) -> int:
    """The pad token, or another special token if it equals EOS or BOS: padding with EOS would hide real ends."""
    reserved = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    spare = [tokenizer.pad_token_id, *tokenizer.all_special_ids, *tokenizer.added_tokens_decoder]
    return next(i for i in spare if i is not None and i not in reserved)


if __name__ == "__main__":
    spec = json.loads(sys.argv[1])
    prompts = make_prompts(Path(spec["data"]), Path(spec["model"]), spec["count"], spec["length"])
    Path(spec["out"]).write_text(json.dumps(prompts))
    print(json.dumps({kind: [len(p) for p in prompts[kind]] for kind in ("fixed", "natural")}))
