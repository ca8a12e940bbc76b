"""Choose the balancing: trains the quickstart's model with several settings and measures each on held-out text.

    python examples/balancing_study.py --study sweep                # one seed, 250 steps: which γ, α and schedule
    python examples/balancing_study.py --study seeds                # three seeds, 500 steps: with and without
    python examples/balancing_study.py --study long                 # the same, 1,000 steps
    python examples/balancing_study.py --study sweep --plot sweep.png

Every run is written to `--results` when it is done; the same command goes on with those that are missing. Settings are
trained on the same tokens in the same order, from the same weights. Two cores take about 40 minutes for each study.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments, set_seed

import transformers_dsv3
from transformers_dsv3.data.byte_bpe import TokenBlocks, token_stream, train_byte_bpe
from transformers_dsv3.data.text_files import build_corpus, standard_library
from transformers_dsv3.evaluation.routing import routing_report
from transformers_dsv3.files import write_json
from transformers_dsv3.training.quickstart import quickstart_config
from transformers_dsv3.training.quickstart_run import QuickstartSettings


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

    @property
    def name(self) -> str:
        rate = "default" if self.rate is None else f"{self.rate:g}"
        return (
            f"γ {rate}, decay {self.decay:g}, α {self.alpha:g}, λ {self.mtp:g}, {self.steps} steps, seed {self.seed}"
        )


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
    study: str = field(default="sweep", metadata={"help": "Which settings to train.", "choices": list(STUDIES)})
    results: Path | None = field(default=None, metadata={"help": "JSON file. Default: balancing_STUDY.json here."})
    plot: Path | None = field(default=None, metadata={"help": "Draw the results that are there, and train nothing."})
    threads: int = field(default=2, metadata={"help": "CPU threads."})


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    path = Path(arguments.results or f"balancing_{arguments.study}.json")
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    if arguments.plot:
        return draw(results, Path(arguments.plot))
    torch.set_num_threads(arguments.threads)
    settings = QuickstartSettings()
    corpus = build_corpus(  # more held out than the quickstart does, since loads differ from file to file
        standard_library(), "", held_out_share=0.1, held_out_max_bytes=700_000, max_bytes=settings.max_text_bytes
    )
    tokenizer = train_byte_bpe((d.text for d in corpus.train), settings.vocab_size, model_max_length=1024)
    blocks = TokenBlocks(token_stream(tokenizer, [d.text for d in corpus.train]), settings.block_length)
    held_out = token_stream(tokenizer, [d.text for d in corpus.held_out])
    for setting in STUDIES[arguments.study]:
        if asdict(setting) not in [entry["setting"] for entry in results]:
            results.append({"setting": asdict(setting), **run(setting, settings, tokenizer, blocks, held_out)})
            write_json(path, results)
        entry = next(entry for entry in results if entry["setting"] == asdict(setting))
        print(f"{setting.name}: " + ", ".join(f"{k} {v:.4g}" for k, v in entry.items() if k != "setting"), flush=True)


def run(setting: Setting, settings: QuickstartSettings, tokenizer, blocks, held_out) -> dict[str, float]:
    set_seed(setting.seed)
    model = AutoModelForCausalLM.from_config(quickstart_config(settings, tokenizer))
    # No rate: the callback is there all the same, and says how the load is
    callbacks = [transformers_dsv3.LoadBalancingCallback(setting.rate, 0.0, setting.decay, setting.alpha)]
    model.config.mtp_loss_weight = 0.0
    if setting.mtp:
        callbacks.append(transformers_dsv3.MtpObjectiveCallback(weight=setting.mtp))
    args = TrainingArguments(
        output_dir="balancing_study",
        max_steps=setting.steps,
        per_device_train_batch_size=setting.batch,
        learning_rate=settings.learning_rate,
        weight_decay=0.1,
        adam_beta2=0.95,
        lr_scheduler_type="warmup_stable_decay",
        warmup_steps=settings.warmup_steps,
        lr_scheduler_kwargs={"num_decay_steps": int(0.9 * setting.steps), "decay_type": "linear"},
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        seed=setting.seed,
        data_seed=setting.seed,
        full_determinism=not torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    )
    Trainer(model=model, args=args, train_dataset=blocks, callbacks=callbacks).train()
    report = routing_report(model, held_out, window=settings.block_length)
    figures = report.statistics.mean()
    result = {name: figures[name] for name in ("utilisation", "max_violation", "load_entropy", "dead_experts")}
    result["least_utilisation"] = float(report.statistics.utilisation.min())
    result["held_out_loss"] = report.loss
    if setting.mtp and report.mtp is not None:
        result["mtp_loss"] = report.mtp.mean_loss
        result["second_token_acceptance"] = report.mtp.second_token_acceptance
    return result


def draw(results: list[dict], path: Path) -> None:
    """Utilisation and held-out loss over γ, a line for each schedule; balancing off as a line across."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axis, key, label in zip(
        figure.subplots(1, 2),
        ("utilisation", "held_out_loss"),
        ("held-out utilisation", "held-out loss, nats a token"),
    ):
        for decay, name in (
            (1.0, "γ falls from the start"),
            (0.0, "γ constant"),
            (0.2, "γ falls over the last fifth"),
        ):
            line = sorted(
                (entry["setting"]["rate"], entry[key])
                for entry in results
                if entry["setting"]["rate"] and entry["setting"]["decay"] == decay and not entry["setting"]["alpha"]
            )
            axis.plot(*zip(*line), marker="o", label=name)
        off = [e[key] for e in results if e["setting"]["rate"] == 0 and not e["setting"]["alpha"]]
        axis.axhline(math.fsum(off) / len(off), color="black", linestyle=":", label="no balancing")
        axis.set(xscale="log", xlabel="γ (bias update rate)", ylabel=label)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
