"""Check that llama.cpp reads an exported GGUF correctly: the same tokens, the same next-token log-probs.

    pip install xllamacpp          # wheels of llama.cpp with its server; use a separate environment
    python benchmarks/export_check.py RUN/export/step-N-gguf MODEL_FOLDER

MODEL_FOLDER is the same model for transformers: the run's `--to safetensors` export in the same dtype, or a checkpoint's model folder.
"""

from __future__ import annotations

import argparse
import json
import urllib.request
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXTS = (
    "Once upon a time, there was a little girl named Lily.",
    "def f(x):\n    return x ** 2  # 1234567 and 3.14\n\n\nprint(f(10))",
    "It's what they'll say: \u201cna\u00efve caf\u00e9\u201d, \u4f60\u597d, \U0001f600!  Two  spaces\tand a tab.",
    "ALL CAPS AND don't WE'RE   ",
)
TOP = 20  # number of most likely tokens whose log-probs are compared


def _server(path: Path) -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 512, 1, 1
    params.warmup = False
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return xllamacpp.Server(params)


def _ask(server: Any, path: str, **question: Any) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{server.listening_address}{path}", json.dumps(question).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gguf", type=Path, help="folder that holds the .gguf file")
    parser.add_argument("model", help="folder of the same model for transformers")
    args = parser.parse_args()
    (path,) = args.gguf.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    server = _server(path)
    same_tokens, worst, same_best, places = 0, 0.0, 0, 0
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        theirs = _ask(server, "/tokenize", content=text, add_special=False)["tokens"]
        same_tokens += ids == theirs
        if ids != theirs:
            print(f"tokens differ for {text!r}:\n  transformers {ids}\n  llama.cpp    {theirs}")
        for end in sorted({1, len(ids) // 2, len(ids)}):
            with torch.inference_mode():
                ours = model(input_ids=torch.tensor([ids[:end]])).logits[0, -1].log_softmax(-1)
            answer = _ask(
                server, "/completion", prompt=ids[:end], n_predict=1, n_probs=TOP, temperature=0, cache_prompt=False
            )
            top = answer["completion_probabilities"][0]["top_logprobs"]
            worst = max(worst, max(abs(t["logprob"] - float(ours[t["id"]])) for t in top))
            same_best += top[0]["id"] == int(ours.argmax())
            places += 1
    print(f"{path.name}: tokens equal for {same_tokens} of {len(TEXTS)} texts")
    print(f"log-probs of the {TOP} most likely next tokens differ by at most {worst:.3g} nats, over {places} positions")
    print(f"the most likely token is the same at {same_best} of {places} positions")


if __name__ == "__main__":
    main()
