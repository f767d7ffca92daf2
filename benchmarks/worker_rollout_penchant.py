"""Penchant's rollout worker, which calls `sample`. Takes a JSON spec, then one request per line, as worker_rollout_peer.py does."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from measure import finish, peak_bytes


def main() -> None:
    import torch

    import penchant
    from penchant.models.load import cast_parameters, load_causal_model
    from penchant.models.options import ModelConfig
    from penchant.rollout.generate import sample

    spec = json.loads(sys.argv[1])
    torch.set_num_threads(spec["threads"])
    prompts_by_kind = json.loads(Path(spec["prompts"]).read_text())
    model = load_causal_model(ModelConfig(path=spec["model"]), torch.device("cpu")).eval()
    cast_parameters(model, {"fp32": torch.float32, "bf16": torch.bfloat16}[spec["precision"]])  # as a run does
    finish({"name": f"penchant {getattr(penchant, '__version__', 'dev')}", "torch": torch.__version__})
    for line in sys.stdin:
        request = json.loads(line)
        prompts = prompts_by_kind[request["kind"]][: request["prompts"]]
        started, cpu = time.perf_counter(), time.process_time()
        samples = sample(
            model,
            prompts,
            n=request["n"],
            max_new_tokens=request["new_tokens"],
            temperature=1.0,
            seed=request["seed"],
            eos_token_id=request["eos"],
        )
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        lengths = [len(s.ids) for of_prompt in samples for s in of_prompt]
        finish({"seconds": seconds, "cpu_seconds": cpu, "lengths": lengths, "peak_bytes": peak_bytes()})


if __name__ == "__main__":
    main()
