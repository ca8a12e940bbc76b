"""Expert-specialised fine-tuning beside LoRA at an equal trainable share and full fine-tuning, on held-out text.

    transformers-dsv3 quickstart && python examples/esft_study.py --results ./esft_study.json

Every method trains on the same tokens in the same order. Its learning rate is the one with the lowest loss on
validation topics, of a grid that grows until the best is not at its end, with seed 0; the other seeds repeat that one.
Runs with more parameters (p = 0.5) and with experts drawn at random have the rate of their counterpart.
A seed is the order of the text and LoRA's start. Test topics and general text (files of the standard library that the
quickstart holds out) decide nothing. Every run is written to --results when it is done; the same command goes on with
those that are missing. Two cores take about half an hour.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer, set_seed
from transformers.hf_argparser import HfArg

from transformers_dsv3 import ESFTCallback, ExpertSelection, LoadBalancingCallback, lora_config, score_experts
from transformers_dsv3.data.domain_blocks import DomainBlocks, python_domain_blocks
from transformers_dsv3.training.study import Study, best_rate, losses_of, mean_of_seeds, study_arguments


GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FIRST_TRIED = (3e-3, 1e-2)
# "half": p = 0.5 instead of the default
METHODS = ("esft token", "lora", "full", "random experts", "esft half", "lora half")
# Methods with the learning rate that was found for another
SAME_RATE = {"random experts": "esft token", "esft half": "esft token", "lora half": "lora"}


@dataclass
class Arguments:
    model: str = HfArg(default="./dsv3-quickstart", help="The checkpoint to specialise.")
    results: Path = HfArg(default=Path("esft_study.json"), help="JSON file.")
    methods: list[str] = HfArg(default_factory=lambda: list(METHODS), help="Which ones.")
    steps: int = HfArg(default=150, help="Optimizer steps of 4 x 256 tokens.")
    seeds: int = HfArg(default=3, help="How many.")
    threads: int = HfArg(default=2, help="CPU threads.")


def prepare(method: str, model, texts: DomainBlocks, seed: int):
    """The model to train and the trainer's callbacks."""
    if method == "none":
        return model, []
    if method == "full":
        return model, [LoadBalancingCallback(1e-3)]
    scores = score_experts(model, [{"input_ids": texts.train.blocks[::6]}])  # a sixth is enough
    selection = scores.select(by="token", p=0.5 if method.endswith("half") else None)
    if method.startswith("lora"):
        return adapted(model, selection), []
    if method == "random experts":
        selection = selection.at_random(seed)
    return model, [ESFTCallback(selection)]


def adapted(model, selection: ExpertSelection):
    """The model with LoRA on attention and experts, of the rank that trains as many parameters as ESFT would."""
    selected = sum(map(len, selection.experts.values()))
    wanted = selected * 3 * model.config.hidden_size * model.config.moe_intermediate_size

    def of_rank(rank: int):
        return get_peft_model(model, lora_config(model, rank=rank, where=("attention", "experts"), lora_alpha=rank))

    one = of_rank(1)
    rank = round(wanted / one.num_parameters(only_trainable=True))
    one.unload()
    return of_rank(rank)


def run(method: str, rate: float, seed: int, arguments: Arguments, texts: DomainBlocks) -> dict[str, float]:
    set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    total = model.num_parameters()
    model, callbacks = prepare(method, model, texts, seed)
    set_seed(seed)
    args = study_arguments(
        "esft_study",
        seed,
        max_steps=arguments.steps,
        per_device_train_batch_size=4,
        learning_rate=rate,
        warmup_steps=max(arguments.steps // 10, 1),
    )
    trainer = Trainer(model=model, args=args, train_dataset=texts.train, callbacks=callbacks)
    trained = 0 if method == "none" else trainer.model.num_parameters(only_trainable=True)
    if trained:
        trainer.train()
    losses = losses_of(trainer, texts.held_out)
    return {"trained_parameters": trained, "trained_share": trained / total, **losses}


def main(arguments: Arguments) -> None:
    torch.set_num_threads(arguments.threads)
    texts = python_domain_blocks(AutoTokenizer.from_pretrained(arguments.model))
    print({name: f"{part.blocks.numel():,} tokens" for name, part in vars(texts).items()})
    study = Study(arguments.results)

    def result(method: str, rate: float, seed: int) -> dict:
        setting = {"method": method, "learning_rate": rate, "seed": seed, "steps": arguments.steps}
        return study.result(setting, lambda: run(method, rate, seed, arguments, texts))

    before = result("none", 0.0, 0)
    table = []
    for method in arguments.methods:
        searched = SAME_RATE.get(method, method)
        best = best_rate(lambda rate, method=searched: result(method, rate, 0)["validation"], GRID, FIRST_TRIED)
        table.append((method, best, [result(method, best, seed) for seed in range(arguments.seeds)]))
    print("\n| method | trained share | learning rate | domain loss | general loss |\n|---|---|---|---|---|")
    print(f"| before | | | {before['test']:.3f} | {before['general']:.3f} |")
    for method, rate, runs in table:
        cells = [mean_of_seeds([entry[name] for entry in runs]) for name in ("test", "general")]
        print(f"| {method} | {runs[0]['trained_share']:.1%} | {rate:g} | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
