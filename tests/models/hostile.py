"""Model folders with a fault in one of their files, and every command that reads them."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

from encoders import encoder_folder
from tiny import polite_rows, tiny_model_folder, write_jsonl

ODD: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    7,
    1000,
    10**6,
    10**9,
    2**31,
    2**63,
    10**30,
    -(10**18),
    0.5,
    -2.5,
    1e300,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../../etc/passwd",
    "\x00\x1b[31m",
    "\ud800",
    "a" * 100_000,
    [],
    [1, 2],
    [[]],
    ["full_attention"],
    {},
    {"a": 1},
    {"type": "linear", "factor": 0},
    {"rope_type": "nonsense"},
]
MORE: list[tuple[str, Any]] = [  # keys that a config may have, with untrustworthy values
    (
        "auto_map",
        {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", None]},
    ),
    ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    ("quantization_config", {"quant_method": "nonsense"}),
    ("layer_types", ["nonsense"] * 2),
    ("num_labels", 10**8),
    ("id2label", {"a": 1}),
    ("text_config", {"num_hidden_layers": 10**7}),
    ("architectures", ["os.system"]),
    ("_name_or_path", "../.."),
    ("is_encoder_decoder", True),
    ("attn_implementation", "evil/kernels"),
    ("_attn_implementation", "evil/kernels"),
    ("dtype", "object"),
    ("num_nextn_predict_layers", 10**6),
    ("pad_token_id", 10**9),
    ("eos_token_id", [1, "x", None, 10**12]),
    ("transformers_version", []),
    ("base_model_tp_plan", {"a": "b"}),
    ("tokenizer_class", "os.system"),
    ("processor_class", 7),
]
LOOPS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "{% for x in [1,2] recursive %}{% if loop.depth < 80 %}{{ loop([1,2]) }}{% endif %}{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(80) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=3) %}{% for i in range(80) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ 'a'.ljust(99999999999) }}",
    "{{ 'a' * 10**12 }}",
    "{% if messages|length > 1 %}{{ '%99999999999d' % 1 }}{% endif %}",
    "{% for m in messages %}" * 50,
    "{{" + "(" * 50_000,
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch /tmp/penchant-was-here') }}",
]


def make(folder: Path, kind: str) -> Path:
    """Make a valid folder of a kind: ``llama``, ``bert``, ``adapter`` (with its base model beside it), ``shards``."""
    if kind == "bert":
        return Path(encoder_folder(folder))
    tiny_model_folder(folder if kind != "adapter" else folder.parent / f"{folder.name}-base", chat=True, pad=True)
    if kind == "shards":
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder)
        (folder / "model.safetensors").unlink()
        model.save_pretrained(folder, max_shard_size="30KB")
    if kind == "adapter":
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, AutoTokenizer

        base = folder.parent / f"{folder.name}-base"
        how = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), how).save_pretrained(folder)
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


def damage(folder: Path, rng: random.Random) -> str:
    """Introduce a fault in one file of a folder, and return its description."""
    files = sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors", ".jinja"))
    path = rng.choice(files)
    if rng.random() < 0.15:
        return _damage_file(path, rng)
    if path.suffix == ".safetensors":
        return _damage_weights(path, rng)
    if path.suffix == ".jinja":
        path.write_text(rng.choice(LOOPS))
        return f"{path.name}: {path.read_text()[:70]}"
    return _damage_json(path, rng)


def _damage_file(path: Path, rng: random.Random) -> str:
    content = path.read_bytes()
    how = rng.choice(
        ["empty", "gone", "half", "garbage", "folder", "pipe", "loop", "nested", "digits", "list", "utf-16", "flip"]
    )
    if how == "flip":
        at = rng.randrange(len(content))
        content = content[:at] + bytes([content[at] ^ (1 << rng.randrange(8))]) + content[at + 1 :]
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "loop":
        path.symlink_to(path.name)
    elif how != "gone":
        made = {
            "empty": b"",
            "half": content[: len(content) // 2],
            "garbage": rng.randbytes(500),
            "nested": b"[" * 200_000,
            "digits": b'{"vocab_size": ' + b"9" * 5000 + b"}",
            "list": b"[1, 2]",
            "utf-16": content[:2000].decode("latin1").encode("utf-16"),
        }
        path.write_bytes(made.get(how, content))
    return f"{path.name}: {how}"


def _nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    few = list(items)[:40]
    return found + [n for key, inner in few for n in _nodes(inner, (*path, key))]


def _damage_json(path: Path, rng: random.Random) -> str:
    values = json.loads(path.read_bytes())
    if path.name == "tokenizer_config.json" and rng.random() < 0.4:
        key, new = "chat_template", rng.choice([*LOOPS, 7, [], {"a": 1}])
        values[key] = new
        (path.parent / "chat_template.jinja").unlink(missing_ok=True)
        path.write_text(json.dumps(values))
        return f"{path.name}: {key} = {str(new)[:70]!r}"
    if rng.random() < 0.3 and path.name != "tokenizer.json":
        key, new = rng.choice(MORE)
        values[key] = new
        path.write_text(json.dumps(values))
        return f"{path.name}: {key} = {str(new)[:70]!r}"
    *above, last = rng.choice(_nodes(values))
    inside = values
    for key in above:
        inside = inside[key]
    if rng.random() < 0.2:
        del inside[last]
        new: Any = "gone"
    else:
        new = inside[last] = rng.choice(ODD)
    path.write_text(json.dumps(values))
    return f"{path.name}: {'.'.join(map(str, [*above, last]))} = {str(new)[:70]!r}"


def _damage_weights(path: Path, rng: random.Random) -> str:
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])
    name = rng.choice([n for n in header if n != "__metadata__"])
    entry = header[name]
    start, end = entry["data_offsets"]
    how = rng.choice(
        [
            "shape",
            "swapped",
            "beyond",
            "backwards",
            "type",
            "gone",
            "more",
            "length",
            "nan",
            "inf",
            "odd",
            "overlap",
            "layer",
            "metadata",
        ]
    )
    if how == "shape":
        entry["shape"] = rng.choice(
            [[1], [], [end - start], [10**18], [-1, 2], [2**63, 2**63], ["x"], [0], None, [1.5]]
        )
    elif how == "swapped":
        entry["shape"] = entry["shape"][::-1]
    elif how == "beyond":
        entry["data_offsets"] = [start + 10**12, end + 10**12]
    elif how == "backwards":
        entry["data_offsets"] = [end, start]
    elif how == "type":
        entry["dtype"] = rng.choice(["I32", "BF16", "F64", "U8", "BOOL", "F8_E4M3", "C64", "X", 7, None])
    elif how == "gone":
        del header[name]
        if rng.random() < 0.8:  # mostly a valid file without the tensor
            for other in header.values():
                if "data_offsets" in other and other["data_offsets"][0] >= end:
                    other["data_offsets"] = [at - (end - start) for at in other["data_offsets"]]
            del data[start:end]
    elif how in ("more", "layer"):
        other = name.replace(".0.", ".9.") if how == "layer" else "extra.weight"
        header[other] = {"dtype": "F32", "shape": [2], "data_offsets": [len(data), len(data) + 8]}
        data += bytes(8)
    elif how in ("nan", "inf"):
        data[start : start + 4] = struct.pack("<f", float(how))
    elif how == "odd":
        header[name] = rng.choice([None, [], "x", {}, {"dtype": "F32"}])
    elif how == "overlap":
        entry["data_offsets"] = [0, end - start]
    elif how == "metadata":
        header["__metadata__"] = rng.choice(
            [7, {"format": 7}, {"format": "tf"}, {}, {"format": "pt", "x": "y" * 100_000}]
        )
    text = json.dumps(header).encode()
    size = rng.choice([2**63, 10**9, len(text) + 1, 0]) if how == "length" else len(text)
    path.write_bytes(struct.pack("<Q", size) + text + bytes(data))
    return f"{path.name}: {how} of {name} {entry.get('shape')} {entry.get('dtype')}"


def uses(folder: Path, kind: str, work: Path) -> dict[str, Any]:
    """``{command: function that reads the folder}``."""
    from penchant import api
    from penchant.serve.model import TemplateRefused, load_chat_model

    rows = write_jsonl(work / "rows.jsonl", polite_rows(6))
    values: dict[str, Any] = {
        "model": {"path": str(folder), "device": "cpu", "dtype": "fp32"},
        "data": {"path": rows, "max_length": 128, "validation_rows": 2},
        "train": {"max_steps": 1, "threads": 1},
        "output": str(work / "run"),
    }

    def train() -> None:
        if kind == "bert":
            values["algorithm"] = {"name": "reward_model"}
        else:
            values["loss"] = {"name": "dpo"}
        api.train(values, quiet=True)

    def chat() -> None:
        model = load_chat_model(str(folder))
        from penchant.types import Message

        with suppress(TemplateRefused):  # a clear error for the user
            model.encode_messages([Message("user", "Hello")])

    def reward() -> None:
        api.evaluate(str(folder), data=rows, quiet=True, generate=1, max_new_tokens=3)

    def plan() -> None:
        train_values = {
            **values,
            ("algorithm" if kind == "bert" else "loss"): {"name": "reward_model" if kind == "bert" else "dpo"},
        }
        api.plan(train_values, probe=False)

    def export() -> None:
        shutil.rmtree(work / "exported", ignore_errors=True)
        api.export(work / "lora", to="merged", output=str(work / "exported"))

    found = {"train": train, "plan": plan}
    if kind != "bert":
        found |= {"eval": reward, "chat": chat}
    if kind == "llama" and (work / "lora").exists():
        found["export"] = export
    return found
