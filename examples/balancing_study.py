"""Choose the balancing: trains the quickstart's model with several settings and measures each on held-out text.

    python examples/balancing_study.py --study sweep               # one seed: which γ, α and schedule
    python examples/balancing_study.py --study seeds               # 500 steps, with and without; long: 1,000
    python examples/balancing_study.py --study sweep --plot sweep.png

Every run is written to `--results` when it is done; the same command goes on with those that are missing. Settings are
trained on the same tokens in the same order, from the same weights. Two cores take about 40 minutes for each study.
"""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, set_seed
from transformers.hf_argparser import HfArg

from transformers_dsv3 import LoadBalancingCallback, MtpObjectiveCallback, routing_report
from transformers_dsv3.data.byte_bpe import TokenizedCorpus, tokenize_corpus
from transformers_dsv3.data.text_files import build_corpus, standard_library
from transformers_dsv3.training.quickstart import quickstart_config
from transformers_dsv3.training.quickstart_run import QuickstartSettings
from transformers_dsv3.training.study import Study, plot_entries, study_arguments


@dataclass(frozen=True)
class Setting:
    """One way to train. `rate` is γ, None the callback's default and 0 no balancing; `alpha` and `mtp` are α and λ."""

    rate: float | None = None
    decay: float = 0.2
    alpha: float = 0.0
    mtp: float = 0.3
    steps: int = 250
    seed: int = 0
    batch: int = 4


STUDIES = {
    "default": [Setting(steps=400)],
    "sweep": [
        *(Setting(rate=rate, decay=decay) for decay in (1.0, 0.0) for rate in (1e-3, 4e-3, 1.6e-2)),
        *(Setting(rate=1.6e-2, decay=1.0, alpha=alpha) for alpha in (1e-2, 1e-1, 1.0)),
        Setting(rate=4e-3, decay=1.0, alpha=1e-1),
        *(Setting(rate=4e-3, alpha=alpha) for alpha in (0.0, 1e-1)),
        *(Setting(rate=0.0, decay=1.0, alpha=alpha) for alpha in (0.0, 1e-1)),
    ],
    "seeds": [
        Setting(rate=rate, decay=1.0, alpha=alpha, mtp=mtp, steps=500, seed=seed)
        for rate, alpha, mtp in ((0.0, 0.0, 0.3), (8e-3, 1e-1, 0.3), (8e-3, 1e-1, 0.0))
        for seed in (0, 1, 2)
    ],
    "long": [
        Setting(rate=rate, decay=decay, alpha=alpha, steps=1000, seed=seed)
        for rate, decay, alpha in ((0.0, 1.0, 0.0), (None, 0.2, 1e-1), (None, 1.0, 1e-1))
        for seed in (0, 1, 2)
    ],
}


@dataclass
class Arguments:
    study: str = HfArg(default="sweep", help="Which settings to train.", metadata={"choices": list(STUDIES)})
    results: Path | None = HfArg(default=None, help="JSON file. Default: balancing_STUDY.json here.")
    plot: Path | None = HfArg(default=None, help="Draw the results that are there, and train nothing.")
    threads: int = HfArg(default=2, help="CPU threads.")


def main(arguments: Arguments) -> None:
    study = Study(arguments.results or f"balancing_{arguments.study}.json")
    if arguments.plot:
        return plot_entries(
            arguments.plot,
            [{**entry["setting"], **entry} for entry in study.entries if not entry["setting"]["alpha"]],
            x=("rate", "γ (bias update rate)"),
            y={"utilisation": "held-out utilisation", "held_out_loss": "held-out loss, nats a token"},
            lines=("decay", {1.0: "γ falls from the start", 0.0: "γ constant", 0.2: "γ falls over the last fifth"}),
            zero="no balancing",
        )
    torch.set_num_threads(arguments.threads)
    settings = QuickstartSettings()
    corpus = build_corpus(  # more held out than the quickstart does, since loads differ from file to file
        standard_library(), "", held_out_share=0.1, held_out_max_bytes=700_000, max_bytes=settings.max_text_bytes
    )
    tokens = tokenize_corpus(corpus, settings.vocab_size, settings.block_length, model_max_length=1024)
    for setting in STUDIES[arguments.study]:
        study.result({"setting": asdict(setting)}, partial(run, setting, settings, tokens))


def run(setting: Setting, settings: QuickstartSettings, corpus: TokenizedCorpus) -> dict[str, float]:
    set_seed(setting.seed)
    model = AutoModelForCausalLM.from_config(quickstart_config(settings, corpus.tokenizer))
    callbacks = [LoadBalancingCallback(setting.rate, 0.0, setting.decay, setting.alpha)]  # with no rate, it only logs
    if setting.mtp:
        callbacks.append(MtpObjectiveCallback(weight=setting.mtp))
    args = study_arguments(
        "balancing_study",
        setting.seed,
        max_steps=setting.steps,
        per_device_train_batch_size=setting.batch,
        learning_rate=settings.learning_rate,
        weight_decay=0.1,
        adam_beta2=0.95,
        lr_scheduler_type="warmup_stable_decay",
        warmup_steps=settings.warmup_steps,
        lr_scheduler_kwargs={"num_decay_steps": int(0.9 * setting.steps), "decay_type": "linear"},
    )
    Trainer(model=model, args=args, train_dataset=corpus.train, callbacks=callbacks).train()
    report = routing_report(model, corpus.held_out, window=settings.block_length)
    mean = report.statistics.mean()
    figures = {name: mean[name] for name in ("utilisation", "max_violation", "load_entropy", "dead_experts")}
    figures |= {"least_utilisation": float(report.statistics.utilisation.min()), "held_out_loss": report.loss}
    if setting.mtp and report.mtp is not None:
        figures |= {"mtp_loss": report.mtp.mean_loss, "second_token_acceptance": report.mtp.second_token_acceptance}
    return figures


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
