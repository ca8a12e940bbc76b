"""How long until a checkpoint gives its first token, measured in a process that has loaded nothing yet.

`python -m transformers_dsv3.benchmark.loading` reads what to load as JSON from its input.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..models.dsv3 import DeepseekV3ForCausalLM
from .contenders import NATIVE, NATIVE_CLASS, VARIANTS, plain_generation
from .own_process import measure_apart
from .rounds import Turn
from .settings import DTYPES
from .workloads import Inputs, Workload


class LoadContender:
    """A way of loading the checkpoint, as a contender.

    Args:
        form: `NATIVE`, or one of `VARIANTS`.
    """

    static = False
    use_mtp = False
    linear_dtype = torch.float32
    weights: PreTrainedModel | None = None

    def __init__(self, name: str, form: str, checkpoint: Path | None):
        self.name, self.form, self.checkpoint = name, form, checkpoint

    def measure(self, workload: Workload, inputs: Inputs, new_tokens: int) -> Turn:
        request = {
            "contender": self.form,
            "checkpoint": str(self.checkpoint),
            "dtype": DTYPES[workload.dtype],
            "tokens": workload.tokens,
            "threads": torch.get_num_threads(),
        }
        parts = measure_apart(__spec__.name, request)
        return Turn(parts["loading"] + parts["first_token"], 1, parts)

    def rest(self) -> None:
        pass


def load(request: dict[str, Any]) -> dict[str, float]:
    """Loads a checkpoint and generates.

    Args:
        request: `contender` (`NATIVE`, or one of `VARIANTS`), `checkpoint`, `dtype`, `tokens` of the prompt and
            `threads`.

    Returns:
        Seconds: `reading`, of the files into new memory, which also brings them into the page cache; `loading`, by
        `from_pretrained`, with rounding where weights are rounded; `first_token` after it; `next_token`.
    """
    torch.set_num_threads(request["threads"])
    dtype = getattr(torch, request["dtype"])
    files = sorted(Path(request["checkpoint"]).glob("*.safetensors"))
    started = time.perf_counter()
    contents = [path.read_bytes() for path in files]
    seconds = {"reading": time.perf_counter() - started}
    del contents
    started = time.perf_counter()
    if request["contender"] == NATIVE:
        model = NATIVE_CLASS.from_pretrained(request["checkpoint"], dtype=dtype)
    else:
        model = DeepseekV3ForCausalLM.from_pretrained(request["checkpoint"], dtype=dtype)
        model = VARIANTS[request["contender"]].build(model)
    seconds["loading"] = time.perf_counter() - started
    plain_generation(model.eval())
    prompt = torch.arange(2, 2 + request["tokens"])[None] % model.config.vocab_size
    mask = torch.ones_like(prompt)
    for name, tokens in (("first_token", 1), ("next_token", 2)):
        started = time.perf_counter()
        model.generate(prompt, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
        seconds[name] = time.perf_counter() - started
    seconds["next_token"] -= seconds["first_token"]
    return seconds


if __name__ == "__main__":
    print(json.dumps(load(json.loads(sys.stdin.read()))))
