"""Expert-specialised fine-tuning beside LoRA at an equal trainable share and full fine-tuning, on held-out text.

    transformers-dsv3 quickstart && python examples/esft_study.py --results ./esft_study.json

Every method trains on the same tokens in the same order. Its learning rate is the one with the lowest loss on
validation topics, of a grid that grows until the best is not at its end, with seed 0; the other seeds repeat that one.
Runs with more parameters (p = 0.5) and with experts drawn at random have the rate of their counterpart.
A seed is the order of the text and LoRA's start. Test topics and general text (files of the standard library that the
quickstart holds out) decide nothing. Every run is written to --results when it is done; the same command goes on with
those that are missing. Two cores take about half an hour.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer, TrainingArguments, set_seed

import transformers_dsv3
from transformers_dsv3.data.byte_bpe import TokenBlocks, token_stream
from transformers_dsv3.data.python_reference import python_reference
from transformers_dsv3.data.text_files import build_corpus, standard_library
from transformers_dsv3.files import write_json


GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FIRST_TRIED = (3e-3, 1e-2)
# "half": p = 0.5 instead of the default
METHODS = ("esft token", "lora", "full", "random experts", "esft half", "lora half")
# Methods with the learning rate that was found for another
SAME_RATE = {"random experts": "esft token", "esft half": "esft token", "lora half": "lora"}
# Experts are scored on every so many blocks
SCORED = 6


@dataclass
class Arguments:
    model: str = field(default="./dsv3-quickstart", metadata={"help": "The checkpoint to specialise."})
    results: Path = field(default=Path("esft_study.json"), metadata={"help": "JSON file."})
    methods: list[str] = field(default_factory=lambda: list(METHODS), metadata={"help": "Which ones."})
    steps: int = field(default=150, metadata={"help": "Optimizer steps of 4 x 256 tokens."})
    seeds: int = field(default=3, metadata={"help": "How many."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})


@dataclass(frozen=True)
class Texts:
    """Blocks of 256 tokens."""

    train: TokenBlocks
    validation: TokenBlocks
    test: TokenBlocks
    general: TokenBlocks


def read_texts(tokenizer) -> Texts:
    domain = python_reference()
    parts: tuple[list[str], list[str]] = ([], [])
    for document in sorted(domain.held_out, key=lambda document: -document.n_bytes):
        min(parts, key=lambda part: sum(map(len, part))).append(document.text)  # two halves of about the same size
    general = build_corpus(standard_library(), "").held_out
    texts = ([d.text for d in domain.train], *parts, [d.text for d in general])
    return Texts(*(TokenBlocks(token_stream(tokenizer, part), 256) for part in texts))


def prepare(method: str, model, texts: Texts, seed: int):
    """The model to train and the trainer's callbacks."""
    if method == "none":
        return model, []
    if method == "full":
        return model, [transformers_dsv3.LoadBalancingCallback(1e-3)]
    scores = transformers_dsv3.score_experts(model, [{"input_ids": texts.train.blocks[::SCORED]}])
    selection = scores.select(by="token", p=0.5 if method.endswith("half") else None)
    if method == "random experts":
        generator = torch.Generator().manual_seed(seed)
        chosen = {
            layer: tuple(torch.randperm(selection.n_experts, generator=generator)[: len(experts)].tolist())
            for layer, experts in selection.experts.items()
        }
        selection = transformers_dsv3.ExpertSelection(chosen, selection.n_experts, "random", selection.p)
    if not method.startswith("lora"):
        return model, [transformers_dsv3.ESFTCallback(selection)]
    wanted = (
        sum(map(len, selection.experts.values())) * 3 * model.config.hidden_size * model.config.moe_intermediate_size
    )

    def adapted(rank: int):
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            # Attention of the main model's layers; the MTP layer behind them has no part in the loss
            target_modules=rf".*\.layers\.[0-{model.config.num_hidden_layers - 1}]\.self_attn\.(q_a_proj|q_b_proj"
            r"|kv_a_proj_with_mqa|kv_b_proj|o_proj)",
            target_parameters=[
                f"layers.{layer}.mlp.experts.{name}"
                for layer in selection.experts
                for name in ("gate_up_proj", "down_proj")
            ],
        )
        return get_peft_model(model, config)

    def count(model) -> int:
        return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)

    one = adapted(1)
    rank = round(wanted / count(one))
    one.unload()
    return adapted(rank), []


def run(method: str, rate: float, seed: int, arguments: Arguments, texts: Texts) -> dict[str, float]:
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    total = model.num_parameters()
    model, callbacks = prepare(method, model, texts, seed)
    set_seed(seed)
    args = TrainingArguments(
        output_dir="esft_study",
        max_steps=arguments.steps,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=8,
        learning_rate=rate,
        warmup_steps=max(arguments.steps // 10, 1),
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
    trainer = Trainer(model=model, args=args, train_dataset=texts.train, callbacks=callbacks)
    trained = 0
    if method != "none":
        trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
        trainer.train()
    parts = {name: getattr(texts, name) for name in ("validation", "test", "general")}
    losses = {name: trainer.evaluate(part)["eval_loss"] for name, part in parts.items()}
    return {"trained_parameters": trained, "trained_share": trained / total, **losses}


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    path = Path(arguments.results)
    path.parent.mkdir(parents=True, exist_ok=True)
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    torch.set_num_threads(arguments.threads)
    texts = read_texts(AutoTokenizer.from_pretrained(arguments.model))
    print({name: f"{part.blocks.numel():,} tokens" for name, part in vars(texts).items()})

    def result(method: str, rate: float, seed: int) -> dict:
        setting = {"method": method, "learning_rate": rate, "seed": seed, "steps": arguments.steps}
        found = next((entry for entry in results if all(entry[key] == value for key, value in setting.items())), None)
        if found is None:
            found = {**setting, **run(method, rate, seed, arguments, texts)}
            results.append(found)
            write_json(path, results)
        print(", ".join(f"{k} {v:.5g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items()), flush=True)
        return found

    before = result("none", 0.0, 0)
    table = []
    for method in arguments.methods:
        searched = SAME_RATE.get(method, method)
        tried = {rate: result(searched, rate, 0) for rate in FIRST_TRIED}
        while True:
            best = min(tried, key=lambda rate: tried[rate]["validation"])
            place = GRID.index(best)
            missing = [rate for rate in GRID[max(place - 1, 0) : place + 2] if rate not in tried]
            if not missing:
                break
            tried.update({rate: result(searched, rate, 0) for rate in missing})
        table.append((method, best, [result(method, best, seed) for seed in range(arguments.seeds)]))
    print("\n| method | trained share | learning rate | domain loss | general loss |\n|---|---|---|---|---|")
    print(f"| before | | | {before['test']:.3f} | {before['general']:.3f} |")
    for method, rate, runs in table:
        cells = []
        for name in ("test", "general"):
            values = [entry[name] for entry in runs]
            cells.append(f"{statistics.mean(values):.3f} ({' / '.join(f'{value:.3f}' for value in values)})")
        print(f"| {method} | {runs[0]['trained_share']:.1%} | {rate:g} | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
    main()
