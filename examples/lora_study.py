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

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from esft_study import read_texts  # the script beside this one
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments, set_seed

import transformers_dsv3
from transformers_dsv3.data.byte_bpe import TokenBlocks
from transformers_dsv3.files import write_json


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
    model: str = field(default="./dsv3-46m", metadata={"help": "The checkpoint to adapt."})
    results: Path = field(default=Path("model_cards/lora/study.json"), metadata={"help": "JSON file."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Which ones."})
    steps: int = field(default=150, metadata={"help": "Optimizer steps of 4 x 256 tokens."})
    seeds: int = field(default=3, metadata={"help": "How many."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})


def run(method: str, rate: float, seed: int, arguments: Arguments, texts: dict[str, TokenBlocks]) -> dict:
    budget, where, _ = METHODS[method]
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    total, rank = model.num_parameters(), None
    if where:
        config = transformers_dsv3.lora_config(model, budget=budget, where=where)
        model, rank = get_peft_model(model, config), config.r
    args = TrainingArguments(
        output_dir="lora_study",
        max_steps=arguments.steps,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        learning_rate=rate,
        warmup_steps=arguments.steps // 10,
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        data_seed=seed,
        full_determinism=not torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        prediction_loss_only=True,
    )
    trainer = Trainer(model=model, args=args, train_dataset=texts["train"])
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    result = {"method": method, "rate": rate, "seed": seed, "steps": arguments.steps, "rank": rank}
    if rate:
        output = trainer.train()
        result["share"], result["train_seconds"] = trained / total, output.metrics["train_runtime"]
    return result | {name: trainer.evaluate(texts[name])["eval_loss"] for name in ("validation", "test", "general")}


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses()
    torch.set_num_threads(arguments.threads)
    path = Path(arguments.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    texts = vars(read_texts(AutoTokenizer.from_pretrained(arguments.model)))

    def result_of(method: str, rate: float, seed: int) -> dict:
        for entry in results:
            if (entry["method"], entry["rate"], entry["seed"], entry["steps"]) == (
                method,
                rate,
                seed,
                arguments.steps,
            ):
                return entry
        results.append(run(method, rate, seed, arguments, texts))
        write_json(path, results)
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in results[-1].items()}, flush=True)
        return results[-1]

    for method in arguments.methods:
        tried = [result_of(method, rate, 0) for rate in METHODS[method][2]]
        best = min(tried, key=lambda entry: entry["validation"])["rate"]
        for seed in range(arguments.seeds if best else 1):
            result_of(method, best, seed)
    report(results, arguments)


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
    main()
