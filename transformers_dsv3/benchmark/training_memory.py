"""Peak memory of training steps, measured in a process that does nothing else.

`python -m transformers_dsv3.benchmark.training_memory` reads what to measure as JSON from its input; the
benchmark starts it once for each contender, since a peak cannot be told apart from that of what ran before.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from ..memory import resident_bytes
from ..models.dsv3 import DeepseekV3Config, DeepseekV3ForCausalLM
from .contenders import NATIVE, ModelContender, share_weights
from .presets import random_model
from .rounds import reason_of
from .workloads import Inputs, Workload, make_inputs


STEPS = 2  # the second runs beside the optimizer's moments, which the first makes


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Memory of a few training steps.

    Args:
        request: `contender`, `checkpoint` or `config` (a dict) of random weights, `dtype`, `batch`, `length`, `seed`,
            `threads`.

    Returns:
        `before_bytes`, resident with the model loaded, and `peak_bytes`, the most that was resident from then on.
    """
    torch.set_num_threads(request["threads"])
    dtype = getattr(torch, request["dtype"])
    if request["checkpoint"]:
        model = DeepseekV3ForCausalLM.from_pretrained(request["checkpoint"], dtype=dtype)
    else:
        model = random_model(DeepseekV3Config(**request["config"]), dtype, request["seed"])
    trained = share_weights(model) if request["contender"] == NATIVE else model
    config = model.config
    del model
    contender = ModelContender(request["contender"], trained, dtype)
    workload = Workload("train", request["length"], request["batch"], request["dtype"])
    inputs = make_inputs(workload, config, dtype, request["seed"])
    forget_peak()
    before = resident_bytes()
    for _ in range(STEPS):
        contender.measure(workload, inputs, 0)
    return {"before_bytes": before["now"], "peak_bytes": resident_bytes()["peak"]}


def measure_on_gpu(contender: ModelContender, workload: Workload, inputs: Inputs) -> dict[str, Any]:
    """The same of a GPU's memory, in this process, since PyTorch counts there and its peak can start anew."""
    contender.device.wait()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(STEPS):
        contender.measure(workload, inputs, 0)
    peak = torch.cuda.max_memory_allocated()
    contender.rest()
    return {"before_bytes": before, "peak_bytes": peak}


def forget_peak() -> None:
    """Starts the kernel's record of the peak anew, which loading has already raised; only Linux can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        print(f"the peak includes loading: {reason_of(error)}", file=sys.stderr)


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.stdin.read()))))
