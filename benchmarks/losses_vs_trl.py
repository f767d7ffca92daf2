"""Compare Penchant's preference losses and their gradients with TRL's, on the same token ids, policy and reference.

    .venv/bin/python benchmarks/losses_vs_trl.py

The models are two tiny random Llamas in fp32; the data is three sets of random pairs. Our side calls `Offline` as the training
loop does. TRL's side runs this file in TRL's environment (see harness.py), where each loss's trainer collates the token ids and
computes one batch. A gradient covers all parameters of the policy, and two gradients differ by the norm of their difference. The
exit code is 1 if a loss or gradient differs by more than 1e-4 (relative) without a reason listed here. If there is a reason, the
losses are compared again on pairs, or with terms, for which the definitions coincide.

Not covered because TRL 1.16 lacks them: DPO-Shift, DPOP, R-DPO, Cal-DPO, chi-PO, REBEL, ODPO, PMPO, SLiC's regularization,
BCO's running mean, listwise losses. Not covered because Penchant lacks them: CPO's `ipo`, KTO's `apo_zero_unpaired`, TPO.
Not compared: divergence exponents above 20, where ours continue along the tangent, and how the ids are made (templates,
truncation, TRL's choice of KTO's mismatched completions: both sides get the same ones).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from harness import HERE, WorkerFailed, peer_python, run_worker, stop_with_workers
from measure import finish

VOCAB, PAD, BOS, EOS = 97, 0, 1, 2
TOLERANCE = 1e-4
Pair = dict[str, list[int]]  # prompt_ids, chosen_ids, rejected_ids

PER_TOKEN = "TRL averages the NLL over the batch's tokens, Penchant over examples"
NO_SMOOTHING = "TRL's `sigmoid` ignores label_smoothing; in Penchant it gives cDPO"
PROMPT_TOO = "TRL's NLL includes the prompt and is averaged over the batch's tokens; Penchant's covers only the completion and is averaged over examples"
NOT_CLIPPED = "Penchant clips the weight at 1, TRL does not"


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison: our loss and its hyperparameters, TRL's trainer and settings, and the pairs.

    Args:
        more: extra arguments of `Offline`.
        pairs: a key of `made_up_pairs`.
        one_by_one: average TRL's loss over batches of a single pair.
        factor: known ratio of TRL's loss to ours.
        reason: why the two are meant to differ, "" if they must agree.
    """

    loss: str
    params: dict[str, Any]
    trainer: str
    settings: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)
    pairs: str = "random"
    one_by_one: bool = False
    factor: float = 1.0
    reason: str = ""

    @property
    def ours(self) -> str:
        return f"{self.loss} {hyperparameters(self.params | self.more)}".strip()

    @property
    def theirs(self) -> str:
        rest = {k: v for k, v in self.settings.items() if k != "loss_type"}
        kind = self.settings.get("loss_type", "")
        name = f"{self.trainer} {'+'.join(kind) if isinstance(kind, list) else kind} {hyperparameters(rest)}"
        return " ".join(name.split()) + (", one by one" if self.one_by_one else "")


def hyperparameters(values: dict[str, Any]) -> str:
    """Format hyperparameters as "name=value ..."."""
    return " ".join(f"{k}={v}" for k, v in values.items())


def dpo_case(loss: str, params: dict[str, Any], kind: str, settings: dict[str, Any] | None = None, **more: Any) -> Case:
    """A case for a loss of TRL's DPOTrainer, with the same beta on both sides."""
    params = {"beta": 0.3, **params}
    return Case(loss, params, "DPO", {"loss_type": [kind], "beta": params["beta"], **(settings or {})}, **more)


def cpo_case(loss: str, params: dict[str, Any], kind: str, settings: dict[str, Any], **more: Any) -> Case:
    """A case for a loss of TRL's experimental CPOTrainer."""
    return Case(loss, params, "CPO", {"loss_type": kind, **settings}, **more)


def with_sft(loss: str, params: dict[str, Any], **more: Any) -> Case:
    """A case for DPO plus the chosen completion's NLL, which in TRL is the weighted sum of `sigmoid` and `sft`."""
    settings = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "beta": 0.3}
    return Case(loss, params, "DPO", settings, **more)


SMOOTH = {"label_smoothing": 0.2}
# trainers that use the chosen completions only; the second is a function of TRL's GKDTrainer
ON_CHOSEN = ("SFT", "generalized_jsd_loss")
CASES = [
    dpo_case("dpo", {}, "sigmoid"),
    dpo_case("dpo", SMOOTH, "sigmoid", SMOOTH, reason=NO_SMOOTHING),
    dpo_case("dpo", SMOOTH, "aot", SMOOTH, one_by_one=True),  # AOT of a single pair is cDPO
    dpo_case("dpo", {}, "sigmoid_norm", more={"average_log_prob": True}),
    dpo_case("rdpo", SMOOTH, "robust", SMOOTH),
    dpo_case("ipo", {}, "ipo"),
    dpo_case("hinge", {}, "hinge"),
    dpo_case("exo", SMOOTH, "exo_pair", SMOOTH),
    dpo_case("exo", {"label_smoothing": 1e-3}, "exo_pair", {"label_smoothing": 1e-3}),
    dpo_case("nca", {}, "nca_pair"),
    dpo_case("aot", {}, "aot"),
    dpo_case("aot", SMOOTH, "aot", SMOOTH),
    dpo_case("aot_unpaired", {}, "aot_unpaired"),
    dpo_case("aot_unpaired", SMOOTH, "aot_unpaired", SMOOTH),
    dpo_case("apo_zero", {}, "apo_zero"),
    dpo_case("apo_down", {}, "apo_down"),
    dpo_case("discopop", {"tau": 0.2}, "discopop", {"discopop_tau": 0.2}),
    dpo_case("sppo", {}, "sppo_hard"),
    dpo_case("bco", {}, "bco_pair", factor=2.0),  # TRL sums over a pair's completions; delta is 0 in our first step
    dpo_case("f_dpo", {"divergence": "reverse_kl"}, "sigmoid", {"f_divergence_type": "reverse_kl"}),
    dpo_case("f_dpo", {"divergence": "forward_kl"}, "sigmoid", {"f_divergence_type": "forward_kl"}),
    dpo_case("f_dpo", {"divergence": "js"}, "sigmoid", {"f_divergence_type": "js_divergence"}),
    *(
        dpo_case(
            "f_dpo",
            {"divergence": "alpha", "alpha": alpha},
            "sigmoid",
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1 - alpha},
        )
        for alpha in (0.25, 0.5)
    ),
    *(dpo_case("ld_dpo", {"alpha": a}, "sigmoid", {"ld_alpha": a}) for a in (0.0, 0.5)),
    dpo_case("wpo", {}, "sigmoid", {"use_weighting": True}),
    dpo_case("wpo", {}, "sigmoid", {"use_weighting": True}, pairs="likely", reason=NOT_CLIPPED),
    with_sft("rpo", {"beta": 0.3, "alpha": 0.5}, reason=PER_TOKEN),
    with_sft("rpo", {"beta": 0.3, "alpha": 0.5}, pairs="even"),
    with_sft("dpo", {"beta": 0.3}, more={"nll_weight": 0.5}),
    Case("sft", {}, "DPO", {"loss_type": ["sft"]}),
    Case("dft", {}, "SFT", {"loss_type": "dft"}),
    Case("gkd", {}, "generalized_jsd_loss", {}),
    Case("gkd", {"beta": 0.1, "temperature": 0.7}, "generalized_jsd_loss", {"beta": 0.1, "temperature": 0.7}),
    Case("gkd", {"divergence": "forward_kl"}, "generalized_jsd_loss", {"beta": 0}),
    Case(
        "gkd", {"divergence": "reverse_kl", "temperature": 1.5}, "generalized_jsd_loss", {"beta": 1, "temperature": 1.5}
    ),
    Case("kto", {"beta": 0.3}, "KTO", {"loss_type": "kto", "beta": 0.3}),
    Case(
        "kto",
        {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7},
        "KTO",
        {"loss_type": "kto", "beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.7},
    ),
    cpo_case("simpo", {"beta": 2.0, "gamma": 1.0}, "simpo", {"beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0}),
    cpo_case(
        "alpha_po",
        {"beta": 2.0, "gamma": 1.0, "alpha": 0.25},
        "alphapo",
        {"beta": 2.0, "simpo_gamma": 1.0, "alpha": 0.25},
    ),
    cpo_case("cpo", {"beta": 0.1, "alpha": 0.5}, "sigmoid", {"beta": 0.1, "cpo_alpha": 0.5}, reason=PER_TOKEN),
    cpo_case("cpo", {"beta": 0.1, "alpha": 0.5}, "sigmoid", {"beta": 0.1, "cpo_alpha": 0.5}, pairs="even"),
    cpo_case(
        "cpo",
        {"beta": 0.1, "alpha": 0.0, **SMOOTH},
        "sigmoid",
        {"beta": 0.1, "cpo_alpha": 0.5, **SMOOTH},
        more={"nll_weight": 0.5},
    ),
    cpo_case("slic", {"delta": 1.0, "reg_weight": 0.0}, "hinge", {"beta": 1.0, "cpo_alpha": 0.0}),
    Case("orpo", {"beta": 0.5}, "ORPO", {"beta": 0.5}, reason=PROMPT_TOO),
    Case("orpo", {"beta": 0.5}, "ORPO", {"beta": 0.5}, pairs="even"),
]


# ---- models and pairs -------------------------------------------------------------------------------------------------


def save_models(folder: Path) -> dict[str, str]:
    """Save two tiny random Llamas, a few nats apart per completion, with a tokenizer of made-up words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=128,
        initializer_range=0.08,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": f"w{PAD}", "bos_token": f"w{BOS}", "eos_token": f"w{EOS}", "unk_token": "w3"}
    folders = {}
    for seed, name in enumerate(("policy", "reference")):
        torch.manual_seed(seed)
        folders[name] = str(folder / name)
        LlamaForCausalLM(config).save_pretrained(folders[name])
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folders[name])
    return folders


def load_model(folder: str) -> Any:
    """Load a saved model in fp32, in eval mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def made_up_pairs(policy: Any) -> dict[str, list[Pair]]:
    """Six pairs of each kind.

    `random`: unequal lengths. `even`: prompts of one token and chosen completions of equal length, so that means over tokens
    and over examples coincide and no prompt token is predicted. `likely`: the policy's greedy completion, and one that is
    greedy after the second most likely first token.
    """
    rng = np.random.default_rng(0)

    def ids(n: int) -> list[int]:
        return [int(t) for t in rng.integers(4, VOCAB, n)]

    def pair(prompt: int, chosen: int, rejected: int) -> Pair:
        return {"prompt_ids": ids(prompt), "chosen_ids": ids(chosen), "rejected_ids": ids(rejected)}

    lengths = [(4, 7, 3), (2, 1, 5), (9, 4, 4), (1, 6, 9), (6, 2, 8), (3, 8, 1)]
    random = [pair(*n) for n in lengths]
    return {
        "random": random,
        "even": [pair(1, 5, n) for _, _, n in lengths],
        "likely": [
            {
                "prompt_ids": row["prompt_ids"],
                "chosen_ids": greedy(policy, row["prompt_ids"], 0, 6),
                "rejected_ids": greedy(policy, row["prompt_ids"], 1, 6),
            }
            for row in random
        ],
    }


@torch.no_grad()
def greedy(policy: Any, prompt: list[int], rank: int, length: int) -> list[int]:
    """The policy's greedy completion after a first token of rank `rank` (0 or 1)."""
    answer: list[int] = []
    for position in range(length):
        logits = policy(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0, -1]
        answer.append(int(logits.topk(2).indices[rank if position == 0 else 0]))
    return answer


def thumbs(pairs: list[Pair]) -> list[dict[str, Any]]:
    """KTO's rows: one per completion, each with a mismatched completion. The last is dropped, so more are desirable."""
    from penchant.data.adapt import mismatched_rows

    rows = [
        {"prompt_ids": p["prompt_ids"], "completion_ids": p[side], "label": side == "chosen_ids"}
        for p in pairs
        for side in ("chosen_ids", "rejected_ids")
    ][:-1]
    partners = mismatched_rows([bytes(r["prompt_ids"]) for r in rows])
    assert partners is not None
    return [r | {"KL_completion_ids": rows[i]["completion_ids"]} for r, i in zip(rows, partners, strict=True)]


def rows_of(case: Case, pairs: dict[str, list[Pair]]) -> list[dict[str, Any]]:
    """The rows that a case is computed on."""
    if case.trainer in ON_CHOSEN:
        return [{n: v for n, v in row.items() if n != "rejected_ids"} for row in pairs[case.pairs]]
    return thumbs(pairs[case.pairs]) if case.trainer == "KTO" else pairs[case.pairs]


def flat_gradient(model: Any) -> np.ndarray:
    """Return the gradient of all parameters as one vector, and reset it."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad()
    return torch.cat([g.flatten() for g in parts]).double().numpy()


# ---- our side ---------------------------------------------------------------------------------------------------------


def our_loss(case: Case, rows: list[dict[str, Any]], policy: Any, reference: Any) -> tuple[float, np.ndarray]:
    """Penchant's loss and gradient with all rows in one optimizer step."""
    from penchant.algorithms.gkd import GKD, GKDConfig
    from penchant.algorithms.offline import Component, Offline
    from penchant.algorithms.rollouts import Writer
    from penchant.data.packing import pack
    from penchant.logprobs import Scorer
    from penchant.logprobs.reference import LiveReference
    from penchant.losses import LOSSES
    from penchant.training.steps import reduced

    scorer, ref_scorer = Scorer(policy, "shared"), Scorer(reference, "shared")
    algorithm: Any
    if case.loss == "gkd":
        config = GKDConfig.model_validate({"name": "gkd", "lambda": 0.0, **case.params})
        scorer.temperature = ref_scorer.temperature = config.temperature
        algorithm = GKD(scorer, LiveReference(ref_scorer), Writer(policy, None, None, config, 0), config)
    else:
        spec = LOSSES[case.loss]
        algorithm = Offline(
            scorer,
            [Component(spec, spec.params(**case.params))],
            LiveReference(ref_scorer),
            mismatched={
                i: tree(i, r["prompt_ids"], [r["KL_completion_ids"]]) for i, r in enumerate(rows) if "label" in r
            },
            **case.more,
        )
    trees = [
        tree(i, r["prompt_ids"], [r["completion_ids"]], (r["label"],))
        if "label" in r
        else tree(i, r["prompt_ids"], [r["chosen_ids"], r["rejected_ids"]], (True, False))
        if "rejected_ids" in r
        else tree(i, r["prompt_ids"], [r["chosen_ids"]])
        for i, r in enumerate(rows)
    ]
    algorithm.begin_step(0, 0.0, trees)
    batch = pack(trees)
    loss = case.factor * reduced(algorithm.loss(algorithm.score(batch)), algorithm.weights(batch))
    loss.backward()
    return float(loss.detach()), flat_gradient(policy)


def tree(row: int, prompt: list[int], completions: list[list[int]], labels: tuple[bool, ...] = ()) -> Any:
    """Build the token tree of a prompt and its completions."""
    from penchant.types import TokenTree

    ids = [np.array(part, dtype=np.int32) for part in (prompt, *completions)]
    return TokenTree(row, ids[0], tuple(ids[1:]), (False,) * len(completions), labels=labels)


# ---- TRL's side, in its environment -----------------------------------------------------------------------------------


def worker(spec: dict[str, Any]) -> None:
    """Compute TRL's loss of every case in the spec. Gradients go to a file, losses to the last line of stdout."""
    import datasets

    torch.set_num_threads(spec["threads"])
    datasets.disable_progress_bars()
    losses, gradients = [], []
    for case in spec["cases"]:
        if case["trainer"] == "generalized_jsd_loss":
            policy = load_model(spec["policy"])
            loss = generalized_jsd(case, policy, load_model(spec["reference"]))
            loss.backward()
            losses.append(float(loss.detach()))
            gradients.append(flat_gradient(policy))
            continue
        trainer = make_trainer(case, spec)
        parts = [[r] for r in case["rows"]] if case["one_by_one"] else [case["rows"]]
        total = 0.0
        for part in parts:
            batch = trainer.data_collator([collated_row(r, case["trainer"]) for r in part])
            loss = trainer.compute_loss(trainer.model, batch) / len(parts)
            loss.backward()
            total += float(loss.detach())
        losses.append(total)
        gradients.append(flat_gradient(trainer.model))
    np.save(spec["gradients"], np.stack(gradients))
    finish({"losses": losses})


def generalized_jsd(case: dict[str, Any], policy: Any, reference: Any) -> torch.Tensor:
    """TRL's `generalized_jsd_loss`, summed one row at a time and divided by the number of completion tokens."""
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    total, tokens = torch.zeros(()), 0
    for row in case["rows"]:
        ids = torch.tensor([row["prompt_ids"] + row["chosen_ids"]])
        labels = ids.clone()
        labels[:, : len(row["prompt_ids"])] = -100
        logits = policy(input_ids=ids, use_cache=False).logits
        theirs = reference(input_ids=ids, use_cache=False).logits.detach()
        inputs = logits[:, :-1], theirs[:, :-1], labels[:, 1:]
        total = total + GKDTrainer.generalized_jsd_loss(*inputs, reduction="sum", **case["settings"])
        tokens += len(row["chosen_ids"])
    return total / tokens


def make_trainer(case: dict[str, Any], spec: dict[str, Any]) -> Any:
    """A trainer around the policy. Its one text row is a placeholder: the caller collates the token ids."""
    import datasets
    import trl
    from transformers import AutoTokenizer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    kinds = {
        "DPO": (trl.DPOConfig, trl.DPOTrainer),
        "KTO": (trl.KTOConfig, trl.KTOTrainer),
        "CPO": (CPOConfig, CPOTrainer),
        "ORPO": (ORPOConfig, ORPOTrainer),
        "SFT": (trl.SFTConfig, trl.SFTTrainer),
    }
    config, trainer = kinds[case["trainer"]]
    text = {"prompt": "w4 w5", "chosen": " w6", "rejected": " w7"}
    if case["trainer"] == "KTO":
        text = {"prompt": "w4 w5", "completion": " w6", "label": True}
    if case["trainer"] == "SFT":
        text = {"prompt": "w4 w5", "completion": " w6"}
    with_reference = {"ref_model": load_model(spec["reference"])} if case["trainer"] in ("DPO", "KTO") else {}
    return trainer(
        model=load_model(spec["policy"]),
        args=config(
            output_dir=spec["work"],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=16,
            report_to=[],
            disable_tqdm=True,
            **case["settings"],
        ),
        train_dataset=datasets.Dataset.from_list([text]),
        processing_class=AutoTokenizer.from_pretrained(spec["policy"]),
        **with_reference,
    )


def collated_row(row: dict[str, Any], trainer: str) -> dict[str, Any]:
    """Convert a row to the format of the trainer's collator. CPO and ORPO use the older one, with labels."""
    if trainer in ("DPO", "KTO"):
        return row
    prompt = row["prompt_ids"]
    if trainer == "SFT":
        ids = prompt + row["chosen_ids"]
        return {"input_ids": ids, "labels": [-100] * len(prompt) + row["chosen_ids"]}
    features: dict[str, Any] = {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}
    for side in ("chosen", "rejected"):
        answer = row[f"{side}_ids"]
        features[f"{side}_input_ids"] = prompt + answer
        features[f"{side}_attention_mask"] = [1] * len(prompt + answer)
        features[f"{side}_labels"] = [-100] * len(prompt) + answer
    return features


# ---- the comparison ---------------------------------------------------------------------------------------------------


def compare(folder: Path) -> list[dict[str, Any]]:
    """Compute every case on both sides."""
    transformers.utils.logging.disable_progress_bar()
    folders = save_models(folder)
    policy, reference = (load_model(f) for f in folders.values())
    reference.requires_grad_(False)
    pairs = made_up_pairs(policy)
    rows = [rows_of(c, pairs) for c in CASES]
    worker_cases = [
        {"trainer": c.trainer, "settings": c.settings, "one_by_one": c.one_by_one, "rows": r}
        for c, r in zip(CASES, rows, strict=True)
    ]
    spec = {**folders, "cases": worker_cases, "gradients": str(folder / "gradients.npy")}
    log = HERE / "results" / "logs" / "losses_vs_trl.log"
    losses = run_worker(peer_python(), Path(__file__).name, spec, threads=1, log=log)["losses"]
    results = []
    for case, case_rows, loss, gradient in zip(CASES, rows, losses, np.load(spec["gradients"]), strict=True):
        ours, our_gradient = our_loss(case, case_rows, policy, reference)
        norm = float(np.linalg.norm(gradient))
        results.append(
            {
                "case": case,
                "ours": ours,
                "theirs": loss,
                "difference": abs(ours - loss) / abs(loss),
                "our_norm": float(np.linalg.norm(our_gradient)),
                "their_norm": norm,
                "gradient_difference": float(np.linalg.norm(our_gradient - gradient)) / norm,
            }
        )
    return results


def agrees(result: dict[str, Any]) -> bool:
    """Whether loss and gradient agree within the tolerance. NaN never agrees."""
    return result["difference"] <= TOLERANCE and result["gradient_difference"] <= TOLERANCE


def verdict(result: dict[str, Any]) -> str:
    """Text of the last column: equal, different, or the reason why the two are meant to differ."""
    if agrees(result):
        return "equal"
    return f"expected: {result['case'].reason}" if result["case"].reason else "**DIFFERENT**"


def table(results: list[dict[str, Any]]) -> str:
    """Format the results as a Markdown table."""
    lines = [
        "| Penchant | TRL | pairs | loss, Penchant | loss, TRL | difference | gradient norm, Penchant | gradient norm, TRL | difference | result |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        case = r["case"]
        ours = case.ours + (f" (x {case.factor:g})" if case.factor != 1.0 else "")
        lines.append(
            f"| {ours} | {case.theirs} | {case.pairs} | {r['ours']:.6f} | {r['theirs']:.6f} | {r['difference']:.1e} "
            f"| {r['our_norm']:.6f} | {r['their_norm']:.6f} | {r['gradient_difference']:.1e} | {verdict(r)} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare Penchant's preference losses with TRL's.", allow_abbrev=False)
    parser.add_argument("spec", nargs="?", help=argparse.SUPPRESS)  # a worker's JSON spec
    args = parser.parse_args()
    if args.spec:
        worker(json.loads(args.spec))
        return 0
    stop_with_workers()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="penchant-losses-") as folder:
        results = compare(Path(folder))
    wrong = [r for r in results if not agrees(r) and not r["case"].reason]
    equal = sum(agrees(r) for r in results)
    print(table(results))
    print(
        f"\n{len(results)} comparisons: {equal} equal, {len(results) - equal - len(wrong)} different as expected",
        end="",
    )
    print(f", {len(wrong)} UNEXPECTED (relative difference above {TOLERANCE:g})")
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except WorkerFailed as error:
        sys.exit(f"benchmark: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
