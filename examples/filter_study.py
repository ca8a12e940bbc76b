"""A fifth of a pool, chosen by the filter, beside all of it, a random fifth and other choices: losses on clean text.

    python examples/filter_study.py --folder ./filter_study --download
    python examples/filter_study.py --folder ./filter_study --plot filter.png

Fetches 350 MB of Debian packages and wheels into --folder, installs nothing, and makes of their text a pool of 100
MB, a quarter of it clean, the rest junk of ten kinds and near duplicates. What each choice takes trains one model for
the same steps, at two lengths, with three seeds; one pass over the fifth stands beside one over all of it. What is
measured on was parted by file before anything was scored, most of it from sources that neither seed nor pool have. The
same command goes on with what is missing. Two cores take four hours, three with --bf16 on AMX.
"""

import random
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean

from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, set_seed
from transformers.hf_argparser import HfArg

from transformers_dsv3 import LoadBalancingCallback
from transformers_dsv3.data.byte_bpe import TokenBlocks, token_stream, train_byte_bpe
from transformers_dsv3.data.known_pool.choices import ALL, CHOICES, FILTER, Choices, read_lines
from transformers_dsv3.data.known_pool.pool import make_pool
from transformers_dsv3.data.known_pool.sources import download, missing
from transformers_dsv3.evaluation.text_quality import bits_per_byte
from transformers_dsv3.training.quickstart import quickstart_config
from transformers_dsv3.training.quickstart_run import QuickstartSettings
from transformers_dsv3.training.study import Study, mean_of_seeds, plot_entries, study_arguments


BLOCK, BATCH, RATE, KEEP = 256, 8, 3e-3, 0.19  # tokens, blocks a step, learning rate, share of the pool
MODEL = {"hidden_size": 128, "intermediate_size": 384, "moe_intermediate_size": 64, "num_nextn_predict_layers": 0}


@dataclass
class Arguments:
    folder: Path = HfArg(default=Path("filter_study"), help="Of packages, pool, choices and study.json.")
    download: bool = HfArg(default=False, help="Fetch the packages that are missing.")
    plot: Path | None = HfArg(default=None, help="Draw the figures that are there, and train nothing.")
    steps: list[int] = HfArg(default_factory=lambda: [300, 600], help="Lengths, in steps of 8 x 256 tokens.")
    seeds: int = HfArg(default=3, help="How many.")
    passes: bool = HfArg(default=True, help="One pass over the fifth and over everything, too.")
    scale: float = HfArg(default=1.0, help="Of the pool.")
    bf16: bool = HfArg(default=False, help="Train with products in bf16: faster with AMX.")


class Runs:
    """Trains on what a choice takes, and measures on each set of held-out text."""

    def __init__(self, pool: Path, choices: Choices, bf16: bool):
        self.texts, self.bf16 = cache(choices.take), bf16
        self.tokenizer = train_byte_bpe(choices.sample, 4096, 1024)
        self.sets = defaultdict(list)
        for row in read_lines(sorted((pool / "held_out").glob("*.jsonl"))):
            self.sets[row["set"] + (", as the seed" if row["in_seed"] else "")].append(row["text"])

    def run(self, choice: str, steps: int, seed: int) -> dict:
        """`steps` of 0 are one pass."""
        set_seed(seed)
        settings = QuickstartSettings(model={**QuickstartSettings().model, **MODEL})
        model = AutoModelForCausalLM.from_config(quickstart_config(settings, self.tokenizer))
        texts = random.Random(seed).sample(self.texts(choice), len(self.texts(choice)))
        blocks = TokenBlocks(token_stream(self.tokenizer, texts), BLOCK)
        trained = steps or len(blocks) // BATCH
        args = study_arguments(
            "filter_study",
            seed,
            max_steps=trained,
            per_device_train_batch_size=BATCH,
            learning_rate=RATE,
            weight_decay=0.1,
            lr_scheduler_type="warmup_stable_decay",
            warmup_steps=max(1, trained // 20),
            bf16=self.bf16,
            lr_scheduler_kwargs={"num_decay_steps": int(0.8 * trained), "decay_type": "linear"},
        )
        Trainer(model, args, train_dataset=blocks, callbacks=[LoadBalancingCallback()]).train()
        bits = {name: self.bits(model, texts) for name, texts in self.sets.items()}
        by_domain = defaultdict(list)
        for name, value in bits.items():
            by_domain[name.split()[0]].append(value)
        told = {"trained_steps": trained, "passes": trained * BATCH / len(blocks)}
        return {**told, "mean": fmean(map(fmean, by_domain.values())), "bits": bits}

    def bits(self, model, texts: list[str]) -> float:
        stream, size = token_stream(self.tokenizer, texts), sum(len(text.encode("utf-8")) for text in texts)
        return bits_per_byte(model, stream, size, window=BLOCK, stride=BLOCK - 16).value


def main(arguments: Arguments) -> None:
    study, pool = Study(arguments.folder / "study.json"), arguments.folder / "pool"
    if arguments.plot:
        lines, y = ("choice", {name: name for name in CHOICES}), {"mean": "held-out bits a byte, mean of domains"}
        return plot_entries(arguments.plot, study.entries, ("trained_steps", "steps"), y, lines, "")
    if names := missing(arguments.folder / "packages"):
        if not arguments.download:
            raise SystemExit(f"--download fetches {len(names)} packages that are missing: {', '.join(names)}")
        download(arguments.folder / "packages", names)
    make_pool(arguments.folder / "packages", pool, arguments.scale, progress=print)
    runs = Runs(pool, Choices(pool, arguments.folder, KEEP), arguments.bf16)
    lengths = [(choice, steps) for steps in arguments.steps for choice in CHOICES]
    passes = [(choice, 0) for choice in (FILTER, ALL) if arguments.passes]
    for seed in range(arguments.seeds):
        for choice, steps in lengths if seed else lengths + passes:
            setting = {"choice": choice, "steps": steps, "seed": seed}
            study.result(setting, lambda setting=setting: runs.run(**setting))
    print("| choice | steps | bits a byte | worst set, beside all |\n|---|---|---|---|")
    for choice, steps in lengths + passes:
        of, whole = ([e for e in study.entries if (e["choice"], e["steps"]) == (n, steps)] for n in (choice, ALL))
        mean = {name: fmean(e["bits"][name] for e in of) / fmean(e["bits"][name] for e in whole) for name in runs.sets}
        worst = max(mean, key=lambda name: mean[name])
        steps, bits = of[0]["trained_steps"], mean_of_seeds([e["mean"] for e in of])
        print(f"| {choice} | {steps} | {bits} | {worst} {mean[worst]:.3f} |")


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
