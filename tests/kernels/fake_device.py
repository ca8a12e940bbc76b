"""Prints as JSON what serves a model on a device of which there is none here, not even a driver.

    python fake_device.py mps|npu|cuda

For each operation the backends in use, as `explain` marks them, and the operators that a layer launches there.
"""

import json
import sys
import types

import torch

import transformers_dsv3
from tests.conftest import TINY
from tests.fake_gpu import Launches, fake_gpu
from transformers_dsv3.kernels import triton_support


def on_device(module, device):
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                    held[name] = torch.nn.Parameter(empty) if held is part._parameters else empty


def in_use(text):
    found = {}
    for line in text.splitlines()[1:]:
        if not line.startswith(" "):
            names = found[line.partition(" (")[0]] = []
        elif line[2] == "*":
            names.append(line[4:].split()[0])
    return found


def main():
    device = sys.argv[1]
    if device == "npu":  # as torch_npu names the device that PyTorch leaves to others
        torch.utils.rename_privateuse1_backend("npu")
        asked_for = {"is_initialized": bool, "is_available": bool, "get_amp_supported_dtype": lambda: [torch.float16]}
        torch._register_device_module("npu", types.SimpleNamespace(**asked_for))
    triton_support.interpreted = lambda: False  # conftest.py asks for it, to test Triton's programs on a CPU
    config = transformers_dsv3.Dsv3Config(**{**TINY, "num_nextn_predict_layers": 0})
    with torch.device("meta"):
        model = transformers_dsv3.Dsv3ForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
    launched = {}
    with fake_gpu():
        on_device(model, device)
        text = transformers_dsv3.explain(model)
        model.generation_config.cache_implementation = "static"
        static = in_use(transformers_dsv3.explain(model))["decoding step"]
        if device != "cuda":  # there the programs would have to be launched
            for tokens in (1, 40):
                with Launches() as seen, torch.no_grad():
                    hidden = torch.empty(1, tokens, config.hidden_size, dtype=torch.bfloat16, device=device)
                    model.model.layers[-1].mlp(hidden)
                launched[tokens] = seen.names
    print(json.dumps({"in use": in_use(text), "static": static, "launched": launched, "text": text}))


if __name__ == "__main__":
    main()
