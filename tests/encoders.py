"""Tiny random encoders of every supported family, with WordPiece or RoBERTa-like tokenizers over bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIZE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
VOCAB = dict(vocab_size=260, max_position_embeddings=160)
DISTILLED = dict(dim=32, n_layers=2, n_heads=4, hidden_dim=48)
RELATIVE = dict(type_vocab_size=0, relative_attention=True, pos_att_type=["p2c", "c2p"])
MODERN = dict(cls_token_id=0, sep_token_id=2, bos_token_id=0, eos_token_id=2, reference_compile=False)
# {family: (transformers' config class, style of the tokenizer, arguments of the config)}
ENCODERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "bert", SIZE | dict(pad_token_id=0)),
    "roberta": ("RobertaConfig", "roberta", SIZE | dict(pad_token_id=1, type_vocab_size=1)),
    "electra": ("ElectraConfig", "bert", SIZE | dict(pad_token_id=0, embedding_size=16)),
    "distilbert": ("DistilBertConfig", "roberta", DISTILLED | dict(pad_token_id=0)),
    "deberta-v2": ("DebertaV2Config", "bert", SIZE | RELATIVE | dict(pad_token_id=0)),
    "modernbert": ("ModernBertConfig", "roberta", SIZE | MODERN | dict(pad_token_id=1)),
}
SPREAD = 0.3  # random weights large enough for two texts to get different scores


def encoder_tokenizer(style: str = "bert") -> Any:
    """One token per letter, with pairs as ``[CLS] A [SEP] B [SEP]`` or ``<s> A </s></s> B </s>``."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    bert = style == "bert"
    specials = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"] if bert else ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: i for i, piece in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=specials[3]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if bert:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
        )
    else:
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), False, False)
    names = ["input_ids", "token_type_ids", "attention_mask"] if bert else ["input_ids", "attention_mask"]
    roles = (
        dict(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]")
        if bert
        else dict(
            bos_token="<s>", eos_token="</s>", pad_token="<pad>", cls_token="<s>", sep_token="</s>", unk_token="<unk>"
        )
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=names, **roles)


def encoder_folder(folder: Path, family: str = "bert", *, seed: int = 0) -> str:
    """Save a tiny random encoder (without a head) and its tokenizer, and return the folder as a string."""
    import torch
    import transformers

    torch.manual_seed(seed)
    name, style, arguments = ENCODERS[family]
    config = getattr(transformers, name)(**VOCAB, **arguments)
    config.initializer_range = SPREAD
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    encoder_tokenizer(style).save_pretrained(folder)
    return str(folder)
