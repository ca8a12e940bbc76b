"""Run by an interpreter with ik-llama-cpp-python: timings of ik_llama.cpp on a GGUF file."""

import argparse
import random
import time
from importlib.metadata import version

import worker_lines


class Timings:
    """A loaded model, which remembers how many tokens its cache holds."""

    def __init__(self, arguments):
        from ik_llama_cpp import _ctypes_api, _internals

        self.api = _ctypes_api
        self.version = f"ik-llama-cpp-python {version('ik-llama-cpp-python')}"
        self.model = _internals.IkModel(arguments.gguf)
        # Its flash attention fails an assertion on processors without AVX-VNNI, says the package
        self.context = _internals.IkContext(
            self.model, n_ctx=arguments.positions, n_threads=arguments.threads, flash_attn=False
        )
        self.batch = self.api.llama_batch_init(arguments.positions, 0, 1)
        self.random = random.Random(arguments.seed)
        self.cached = 0

    def evaluate(self, tokens):
        batch = self.batch
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place] = token, self.cached + place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            batch.logits[place] = place == len(tokens) - 1
        if self.context.decode(batch):
            raise RuntimeError(f"llama_decode failed at {self.cached} cached tokens")
        self.cached += len(tokens)

    def tokens(self, count):
        return [self.random.randrange(2, self.model.n_vocab) for _ in range(count)]

    def fill(self, context):
        """The package has no call that drops the end of a cache: it is filled anew."""
        self.context.kv_cache_clear()
        self.cached = 0
        self.evaluate(self.tokens(context))

    def __call__(self, request):
        if request["what"] == "prefill":
            started = time.perf_counter()
            self.fill(request["tokens"])
            return {"seconds": time.perf_counter() - started, "units": 1}
        if request["batch"] != 1 or request["what"] != "decode":
            raise ValueError("only single sequences are timed with ik_llama.cpp")
        self.fill(request["tokens"])
        from numpy.ctypeslib import as_array

        times, token = [], 2
        for _ in range(request["new_tokens"] + 1):
            self.evaluate([token])
            token = int(as_array(self.context.get_logits(-1), shape=(self.model.n_vocab,)).argmax())
            times.append(time.perf_counter())
        return {"seconds": (times[-1] - times[0]) / request["new_tokens"], "units": request["new_tokens"]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("gguf")
    parser.add_argument("positions", type=int)
    parser.add_argument("threads", type=int)
    parser.add_argument("seed", type=int)
    arguments = parser.parse_args()
    worker_lines.serve(lambda: Timings(arguments))
