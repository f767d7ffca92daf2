"""Prepare the bundled model's training: clean film reviews, a split by hash, a 4,096-token byte-level BPE, a model config.

    python recipes/bundled_model/prepare.py REVIEWS.jsonl.gz WORK_FOLDER

Writes WORK_FOLDER/{train.jsonl,heldout.jsonl,openings.json} and WORK_FOLDER/model/ (config and tokenizer, no weights).
REVIEWS is the Large Movie Review Dataset as JSONL with a "text" field (Maas et al., ACL 2011).
"""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import re
import sys
from pathlib import Path

VOCABULARY = 4096
HELD_OUT = 500  # reviews for perplexity
OPENINGS = 700  # reviews of which only the first words are used, as prompts of the demo
SPECIALS = ["<|bos|>", "<|eos|>", "<|pad|>"]


def clean(text: str) -> str:
    """Plain text on one line: no tags, no entities, single spaces, straight quotes."""
    text = html.unescape(re.sub(r"<[^>]{1,20}>", " ", text))
    text = text.translate(str.maketrans("\u2018\u2019\u201c\u201d\u0096\u0097\u2013\u2014\u00b4", "''\"\"----'"))
    return re.sub(r"\s+", " ", text).strip()


def by_hash(texts: list[str]) -> list[str]:
    """A fixed, content-derived order, duplicates removed."""
    return sorted(set(texts), key=lambda t: hashlib.sha256(t.encode()).digest())


def opening(text: str) -> str | None:
    """The first words of a review as a prompt: 4 to 7 words of plain letters, or None where they are not."""
    words = text.split()
    count = 4 + len(text) % 4
    start = " ".join(words[:count])
    plain = re.fullmatch(r"[A-Za-z',\- ]+", start) is not None and not start.isupper()
    return start.rstrip(",- ") if plain and len(words) > 40 else None


def train_tokenizer(texts: list[str], folder: Path) -> int:
    """Train the BPE and save it as transformers loads it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>", model_max_length=512
    )
    fast.save_pretrained(folder)
    return len(fast)


def model_config(folder: Path) -> None:
    """3.4M parameters: the embedding is a quarter, the rest six layers of width 192."""
    from transformers import LlamaConfig

    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ).save_pretrained(folder)


def main(source: str, target: str) -> None:
    work = Path(target)
    (work / "model").mkdir(parents=True, exist_ok=True)
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        texts = by_hash([clean(json.loads(line)["text"]) for line in lines])
    openings, heldout, train = texts[:OPENINGS], texts[OPENINGS : OPENINGS + HELD_OUT], texts[OPENINGS + HELD_OUT :]
    starts = list(dict.fromkeys(o for t in openings if (o := opening(t))))
    for name, part in (("train", train), ("heldout", heldout)):
        with (work / f"{name}.jsonl").open("w", encoding="utf-8") as out:
            out.writelines(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in part)
    (work / "openings.json").write_text(json.dumps(starts, indent=0, ensure_ascii=False))
    size = train_tokenizer(train, work / "model")
    model_config(work / "model")
    print(
        f"{len(train):,} training reviews, {len(heldout)} held out, {len(starts)} openings, {size:,} tokens in the vocabulary"
    )


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
