"""LoRA within budgets beside full fine-tuning, on held-out text of a domain and of what the model was trained on.

    python examples/pretrain.py --output_dir ./dsv3-46m --max_steps 1000 --per_device_train_batch_size 8 \\
        --learning_rate 2e-3 --mtp_weight 0 --config_overrides hidden_size=512,intermediate_size=1024,\
moe_intermediate_size=256,n_routed_experts=32,num_nextn_predict_layers=0,q_lora_rank=192,kv_lora_rank=128
    python examples/lora_study.py --model ./dsv3-46m

The domain is the reference documentation that comes with Python, English prose that the model, trained on the standard
library's source, has not seen. Every method trains on the same tokens; its learning rate is the one with the lowest
loss on validation topics, of a grid, with seed 0, and the other seeds repeat it. Test topics and general text (files
of the standard library that pre-training held out) decide nothing. Every run is written to --results when it is done;
the same command goes on with those that are missing.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer, set_seed
from transformers.hf_argparser import HfArg

from transformers_dsv3 import lora_config
from transformers_dsv3.data.domain_blocks import DomainBlocks, python_domain_blocks
from transformers_dsv3.training.study import Study, best_rate, losses_of, study_arguments


# Share of trainable parameters and where they are; learning rates to try
METHODS: dict[str, tuple[float, tuple[str, ...], tuple[float, ...]]] = {
    "none": (0.0, (), (0.0,)),
    "full": (1.0, (), (1e-4, 3e-4, 1e-3, 3e-3)),
    "0.1% attention": (0.001, ("attention",), (3e-3, 1e-2, 3e-2)),
    "0.1% attention, head": (0.001, ("attention", "head"), (1e-2, 3e-2)),
    "0.1% linear, head": (0.001, ("linear", "head"), (1e-2, 3e-2)),
    "0.3% linear, head": (0.003, ("linear", "head"), (3e-3, 1e-2, 3e-2)),
    "1% linear, head": (0.01, ("linear", "head"), (3e-3, 5e-3, 1e-2)),
    "1% all, head": (0.01, ("all", "head"), (3e-3, 1e-2)),
    "3% all, head": (0.03, ("all", "head"), (1e-3, 3e-3)),
}


@dataclass
class Arguments:
    model: str = HfArg(default="./dsv3-46m", help="The checkpoint to adapt.")
    results: Path = HfArg(default=Path("model_cards/lora/study.json"), help="JSON file.")
    methods: list[str] = HfArg(default_factory=lambda: list(METHODS), help="Which ones.")
    steps: int = HfArg(default=150, help="Optimizer steps of 4 x 256 tokens.")
    seeds: int = HfArg(default=3, help="How many.")
    threads: int = HfArg(default=2, help="CPU threads.")


def run(method: str, rate: float, seed: int, arguments: Arguments, texts: DomainBlocks) -> dict:
    budget, where, _ = METHODS[method]
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    total, rank = model.num_parameters(), None
    if where:
        config = lora_config(model, budget=budget, where=where)
        model, rank = get_peft_model(model, config), config.r
    args = study_arguments(
        "lora_study",
        seed,
        max_steps=arguments.steps,
        per_device_train_batch_size=4,
        learning_rate=rate,
        warmup_steps=arguments.steps // 10,
        lr_scheduler_type="cosine",
    )
    trainer = Trainer(model=model, args=args, train_dataset=texts.train)
    result: dict = {"rank": rank}
    if rate:
        result["share"] = model.num_parameters(only_trainable=True) / total
        result["train_seconds"] = trainer.train().metrics["train_runtime"]
    return result | losses_of(trainer, texts.held_out)


def main(arguments: Arguments) -> None:
    torch.set_num_threads(arguments.threads)
    texts = python_domain_blocks(AutoTokenizer.from_pretrained(arguments.model))
    study = Study(arguments.results)

    def result(method: str, rate: float, seed: int) -> dict:
        setting = {"method": method, "rate": rate, "seed": seed, "steps": arguments.steps}
        return study.result(setting, lambda: run(method, rate, seed, arguments, texts))

    for method in arguments.methods:
        best = best_rate(lambda rate, method=method: result(method, rate, 0)["validation"], METHODS[method][2])
        for seed in range(arguments.seeds if best else 1):
            result(method, best, seed)
    report(study.entries, arguments)


def report(results: list[dict], arguments: Arguments) -> None:
    """Means over seeds at each method's learning rate; the domain's loss as a share of full fine-tuning's drop."""

    def mean(method: str, part: str) -> float:
        tried = [entry for entry in results if entry["method"] == method and entry["steps"] == arguments.steps]
        rate = min((entry for entry in tried if entry["seed"] == 0), key=lambda entry: entry["validation"])["rate"]
        values = [entry[part] for entry in tried if entry["rate"] == rate]
        return sum(values) / len(values)

    before = {part: mean("none", part) for part in ("test", "general")}
    print("| method | domain loss | share of the full drop | general loss |")
    for method in arguments.methods:
        drop = (before["test"] - mean(method, "test")) / (before["test"] - mean("full", "test"))
        print(f"| {method} | {mean(method, 'test'):.3f} | {drop:.1%} | {mean(method, 'general'):.3f} |")


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses())
