"""Quantises one checkpoint in each way that other libraries offer, and reports which modules were taken, and results.

    python quantized_models.py CHECKPOINT OUTPUT.json [--plugin] [--only NAME ...]

Started twice by test_bitsandbytes.py, without the plugin and with it. A way whose library is missing is left out.
"""

import argparse
import importlib.util
import json
from unittest import mock

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config


TOKENS = torch.arange(4, 28).view(2, 12)


def bitsandbytes(checkpoint, **options):
    config = BitsAndBytesConfig(**options)
    return AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config, device_map="cpu")


def fine_grained_fp8(checkpoint):
    """Quantised while it is loaded. Native's kernels for it need a GPU, which is not asked for here."""
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    with mock.patch.object(FineGrainedFP8HfQuantizer, "validate_environment", lambda *args, **kwargs: None):
        return AutoModelForCausalLM.from_pretrained(
            checkpoint, quantization_config=FineGrainedFP8Config(), dtype=torch.bfloat16
        )


def torchao(checkpoint):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    config = TorchAoConfig(quant_type=Int8WeightOnlyConfig())
    return AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=config)


def torchao_in_memory(checkpoint):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    quantize_(model, Int8WeightOnlyConfig())
    return model


def quantize_dynamic(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


WAYS = {
    "bitsandbytes 4 bit": ("bitsandbytes", lambda path: bitsandbytes(path, load_in_4bit=True)),
    "bitsandbytes NF4, double": (
        "bitsandbytes",
        lambda path: bitsandbytes(path, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    ),
    "bitsandbytes 8 bit": ("bitsandbytes", lambda path: bitsandbytes(path, load_in_8bit=True)),
    "FineGrainedFP8Config": ("transformers", fine_grained_fp8),
    "TorchAoConfig": ("torchao", torchao),
    "torchao.quantize_": ("torchao", torchao_in_memory),
    "quantize_dynamic": ("torch", quantize_dynamic),
}
NOT_RUN = ("FineGrainedFP8Config",)  # its kernels need a GPU


def kinds(model):
    """By name: class, and what the weight is stored as, of every module with a weight or quantised in another way."""
    found = {}
    for name, module in model.named_modules():
        stored = {
            key: [type(tensor).__name__ if type(tensor) is not torch.nn.Parameter else "Parameter", str(tensor.dtype)]
            for key, tensor in module.named_parameters(recurse=False)
        }
        if stored or "quantized" in type(module).__module__:
            found[name] = [type(module).__name__, stored]
    return found


@torch.no_grad()
def outcome(model):
    model.eval()
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return {"logits": model(TOKENS).logits.float().tolist(), "tokens": model.generate(TOKENS, **settings).tolist()}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint")
    parser.add_argument("output")
    parser.add_argument("--plugin", action="store_true")
    parser.add_argument("--only", nargs="*", choices=WAYS)
    args = parser.parse_args()
    if args.plugin:
        import transformers_dsv3  # noqa: F401
    report = {}
    for name, (library, make) in WAYS.items():
        if importlib.util.find_spec(library) is None or args.only and name not in args.only:
            continue
        model = make(args.checkpoint)
        report[name] = {"module": type(model).__module__.split(".")[0], "kinds": kinds(model)}
        report[name]["bytes"] = model.get_memory_footprint()
        if name not in NOT_RUN:
            try:
                report[name] |= outcome(model)
            except Exception as error:  # of the library, on native's model as well
                report[name]["error"] = f"{type(error).__name__}: {error}"
    with open(args.output, "w") as file:
        json.dump(report, file)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
