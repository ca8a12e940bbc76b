"""Compression of a model whose weights are in its experts: bits a byte against bytes on disk, for every recipe tried.

    python examples/compress_study.py --folder ./compress_study [--plot compress.png]

Trains 80 M parameters, 94 % in experts, on Python's standard library, prunes, heals and compresses them. Beside that:
the control, trained as long as others are healed, and a dense model of the bytes of a file 7.6 times smaller. The same
command goes on with what is missing in --folder. Two cores take about four hours, three with --bf16 on AMX.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, HfArgumentParser, PreTrainedModel, set_seed
from transformers.hf_argparser import HfArg

from transformers_dsv3 import CompressionSettings, DeepseekV3Config, compress
from transformers_dsv3.compression.expert_pruning import expert_importance, prune_experts
from transformers_dsv3.compression.plan import gentlest, plan
from transformers_dsv3.data.byte_bpe import tokenize_corpus
from transformers_dsv3.data.text_files import build_corpus, standard_library
from transformers_dsv3.evaluation.text_quality import bits_per_byte
from transformers_dsv3.training.healing import heal, healing_arguments
from transformers_dsv3.training.quickstart import quickstart_config
from transformers_dsv3.training.quickstart_run import QuickstartSettings
from transformers_dsv3.training.study import Study, plot_entries


BLOCK, BATCH, RATE, RATIO = 256, 8, 2e-3, 7.6  # tokens, blocks a step, learning rate, times smaller
MODEL = {"moe_intermediate_size": 256, "num_hidden_layers": 6, "n_routed_experts": 64}  # else the quickstart's
SMALL = {"hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2}
WHOLE = CompressionSettings(16, head_bits=16)  # the bf16 file as it is
WIDTHS = (WHOLE, CompressionSettings(8), CompressionSettings(4), CompressionSettings(4, experts_bits=3))
PRUNED = ("reap 25% healed", "reap 50% healed", "random 50% healed", "reap 50%", "random 50%")


@dataclass
class Arguments:
    folder: Path = HfArg(default=Path("compress_study"), help="Of the models and of study.json.")
    plot: Path | None = HfArg(default=None, help="Draw the figures that are there, and train nothing.")
    steps: int = HfArg(default=2000, help="Optimizer steps of the base model, of 8 x 256 tokens.")
    heal: int = HfArg(default=400, help="Optimizer steps of healing, and of the control.")
    bf16: bool = HfArg(default=False, help="Train with products in bf16: faster with AMX.")
    small: bool = HfArg(default=False, help="A small model on little text, to see that all of it runs.")


class Models:
    """The models of the study. Each is trained once, and then read from its folder."""

    def __init__(self, arguments: Arguments):
        self.arguments = arguments
        self.corpus = build_corpus(standard_library(), "", max_bytes=300_000 if arguments.small else None)
        self.tokens = tokenize_corpus(self.corpus, 2048, BLOCK, model_max_length=1024)
        self.fields = {**QuickstartSettings().model, **(SMALL if arguments.small else MODEL)}

    def config(self, **fields: int) -> DeepseekV3Config:
        return quickstart_config(QuickstartSettings(model={**self.fields, **fields}), self.tokens.tokenizer)

    def get(self, name: str) -> PreTrainedModel:
        folder = self.arguments.folder / name
        if not (folder / "model.safetensors").exists():
            set_seed(0)
            model, steps, teacher = self.start(name)
            rate = RATE if name in ("base", "dense") else RATE / 2
            if steps:
                options = {"per_device_train_batch_size": BATCH, "bf16": self.arguments.bf16, "use_cpu": True}
                heal(model, self.tokens.train, healing_arguments(folder / "training", steps, rate, **options), teacher)
            self.tokens.tokenizer.save_pretrained(folder)
            model.to(torch.bfloat16).save_pretrained(folder)
            shutil.rmtree(folder / "training", ignore_errors=True)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def start(self, name: str) -> tuple[PreTrainedModel, int, PreTrainedModel | None]:
        steps, more = self.arguments.steps, self.arguments.heal
        if name in ("base", "dense"):
            config, steps = (self.config(), steps) if name == "base" else (self.dense(), steps + more)
            return AutoModelForCausalLM.from_config(config), steps, None
        model = self.get("base")
        if name == "control":
            return model, more, None
        by, percent, *healed = name.split()
        importance = expert_importance(model, self.tokens.train.blocks[::40].flatten(), window=BLOCK, progress=True)
        prune_experts(model, int(percent[:-1]) / 100, importance, by)
        return (model, more, self.get("base")) if healed else (model, 0, None)

    def dense(self) -> DeepseekV3Config:
        """The widest model without experts whose bf16 file is no larger than the compressed one."""
        most = gentlest(self.config(), RATIO).plan.file_bytes
        without = {"first_k_dense_replace": 99, "num_nextn_predict_layers": 0}
        configs = [self.config(**without, intermediate_size=64 * i) for i in range(1, 99)]
        return [config for config in configs if plan(config, WHOLE).file_bytes <= most][-1]

    def measure(self, name: str, settings: CompressionSettings) -> dict[str, float]:
        model, folder = self.get(name), self.arguments.folder / name
        if settings != WHOLE:
            source, folder = folder, folder.with_name(f"{name} {settings.bits}-{settings.of('experts')}")
            if not folder.exists():
                settings = replace(settings, method="nearest" if self.arguments.small else "gptq")
                compress(source, folder, settings, progress=True)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        text = self.tokens.held_out, self.corpus.held_out_bytes
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        return {"bytes": size, "bits": bits_per_byte(model, *text, window=BLOCK, stride=BLOCK // 2).value}


def main(arguments: Arguments) -> None:
    study = Study(arguments.folder / "study.json")
    if arguments.plot:
        lines, bits = {entry["model"]: entry["model"] for entry in study.entries}, {"bits": "held-out bits a byte"}
        return plot_entries(arguments.plot, study.entries, ("bytes", "on disk"), bits, ("model", lines), "")
    models = Models(arguments)
    for name in ("base", "control", *PRUNED, "dense"):
        for settings in WIDTHS[:1] if name == "dense" else WIDTHS:
            setting = {"model": name, "settings": str(settings), "steps": arguments.steps, "heal": arguments.heal}
            study.result(setting, lambda name=name, settings=settings: models.measure(name, settings))


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())
