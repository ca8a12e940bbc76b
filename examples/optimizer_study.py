"""AdamW beside Muon: trains the quickstart's model with each, at several learning rates, and measures held-out text.

    python examples/optimizer_study.py                              # 250 steps of 1,024 tokens
    python examples/optimizer_study.py --batch 32 --steps 120       # of 8,192 tokens, and the same seconds for all
    python examples/optimizer_study.py --plot optimizers.png

On seed 0 each optimizer finds its best rate; then all seeds are trained with it, and once more for as many steps as
take it AdamW's seconds. The same command goes on with the runs that `--results` does not have yet. One core takes two
and a half minutes a run of 250 steps, and there are about 25.
"""

import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, set_seed
from transformers.hf_argparser import HfArg

from transformers_dsv3 import LoadBalancingCallback, MtpObjectiveCallback, muon, routing_report
from transformers_dsv3.data.byte_bpe import TokenizedCorpus, tokenize_corpus
from transformers_dsv3.data.text_files import build_corpus, standard_library
from transformers_dsv3.training.quickstart import quickstart_config
from transformers_dsv3.training.quickstart_run import QuickstartSettings
from transformers_dsv3.training.study import Study, best_rate, mean_of_seeds, plot_entries, study_arguments


RATES = [7.5e-4, 1.5e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2]
OPTIMIZERS = {"adamw": "AdamW", "muon-2d": "Muon, experts by AdamW", "muon": "Muon"}


@dataclass(frozen=True)
class Setting:
    """One run: `batch` is rows of 256 tokens a step."""

    optimizer: str
    rate: float
    steps: int
    seed: int
    batch: int


@dataclass
class Arguments:
    optimizers: list[str] = HfArg(default_factory=lambda: list(OPTIMIZERS), help="Which of them.")
    steps: int = HfArg(default=250, help="Of each run.")
    batch: int = HfArg(default=4, help="Rows of 256 tokens a step.")
    seeds: int = HfArg(default=3, help="How many.")
    rates: list[float] = HfArg(default_factory=lambda: RATES[1:5], help="Where the search for the best begins.")
    results: Path = HfArg(default=Path("optimizers.json"), help="JSON file of all runs.")
    plot: Path | None = HfArg(default=None, help="Draw the results that are there, and train nothing.")
    threads: int = HfArg(default=1, help="CPU threads.")


def main(arguments: Arguments) -> None:
    study = Study(arguments.results)
    if arguments.plot:
        return plot_entries(
            arguments.plot,
            [{**entry["setting"], **entry} for entry in study.entries if entry["setting"]["seed"] == 0],
            x=("rate", "learning rate"),
            y={"held_out_loss": "held-out loss, nats a token"},
            lines=("optimizer", OPTIMIZERS),
            zero="not trained",
        )
    torch.set_num_threads(arguments.threads)
    settings = QuickstartSettings()
    text = build_corpus(standard_library(), "", held_out_max_bytes=200_000, max_bytes=settings.max_text_bytes)
    corpus = tokenize_corpus(text, settings.vocab_size, settings.block_length, model_max_length=1024)

    def entry(optimizer: str, rate: float, seed: int, steps: int) -> dict:
        setting = Setting(optimizer, rate, steps, seed, arguments.batch)
        return study.result({"setting": asdict(setting)}, partial(run, setting, settings, corpus))

    lines, seconds = [], 0.0
    for name in arguments.optimizers:
        searched = partial(entry, name, seed=0, steps=arguments.steps)
        rate = best_rate(lambda rate: searched(rate)["held_out_loss"], RATES, arguments.rates)  # noqa: B023
        found = [entry(name, rate, seed, arguments.steps) for seed in range(arguments.seeds)]
        mean = sum(each["seconds_a_step"] for each in found) / len(found)
        seconds = seconds or mean  # of the first, which is AdamW
        losses = mean_of_seeds([each["held_out_loss"] for each in found])
        lines.append(f"{OPTIMIZERS[name]}: rate {rate:g}, held-out loss {losses}, {mean / seconds:.2f} of the time")
        fewer = round(arguments.steps * seconds / mean)
        if fewer < arguments.steps:
            losses = [entry(name, rate, seed, fewer)["held_out_loss"] for seed in range(arguments.seeds)]
            lines.append(f"    at equal time, {fewer} steps: {mean_of_seeds(losses)}")
    print(*lines, sep="\n")


def run(setting: Setting, settings: QuickstartSettings, corpus: TokenizedCorpus) -> dict[str, float]:
    set_seed(setting.seed)
    model = AutoModelForCausalLM.from_config(quickstart_config(settings, corpus.tokenizer))
    args = study_arguments(
        "optimizer_study",
        setting.seed,
        max_steps=setting.steps,
        per_device_train_batch_size=setting.batch,
        learning_rate=setting.rate,
        weight_decay=0.1,
        adam_beta2=0.95,
        lr_scheduler_type="warmup_stable_decay",
        warmup_steps=min(settings.warmup_steps, setting.steps // 10),
        lr_scheduler_kwargs={"num_decay_steps": int(0.9 * setting.steps), "decay_type": "linear"},
    )
    callbacks = [LoadBalancingCallback(seq_aux_loss_weight=0.1), MtpObjectiveCallback()]
    chosen = None if setting.optimizer == "adamw" else muon(setting.rate, experts=setting.optimizer != "muon-2d")
    trainer = Trainer(model, args, train_dataset=corpus.train, callbacks=callbacks, optimizer_cls_and_kwargs=chosen)
    started = time.process_time()
    trainer.train()
    seconds = time.process_time() - started
    report = routing_report(model, corpus.held_out, window=settings.block_length)
    figures = {"held_out_loss": report.loss, "utilisation": report.statistics.mean()["utilisation"]}
    return {**figures, "seconds_a_step": seconds / setting.steps}


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
