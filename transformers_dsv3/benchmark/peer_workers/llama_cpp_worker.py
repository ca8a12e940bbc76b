"""Run by an interpreter with llama-cpp-python: `convert` a checkpoint to GGUF, `quantize` it, or `serve` timings."""

import argparse
import random
import runpy
import sys
import time
from pathlib import Path

import worker_lines


def convert(arguments):
    """Runs llama.cpp's converter.

    It knows pre-tokenizers by a hash over a vocabulary's ids. For one that it does not know it is told GPT-2's, since
    no text is tokenized here.
    """
    converter = Path(arguments.converter)
    sys.path[0:0] = [str(converter.parent), str(converter.parent / "gguf-py")]
    from conversion.base import TextModel

    known = TextModel.get_vocab_base_pre

    def named(self, tokenizer):
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            return "gpt-2"

    TextModel.get_vocab_base_pre = named
    sys.argv = [str(converter), arguments.checkpoint, "--outfile", arguments.gguf, "--outtype", arguments.outtype]
    runpy.run_path(str(converter), run_name="__main__")


def quantize(arguments):
    """Runs llama.cpp's quantizer with its own defaults: Q4_0 has the head in Q6_K."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{arguments.type.upper()}")
    status = llama_cpp.llama_model_quantize(arguments.source.encode(), arguments.gguf.encode(), parameters)
    if status:
        sys.exit(f"the quantizer ended with {status}")


class Timings:
    """A loaded model, which remembers the context that it has in its cache."""

    def __init__(self, arguments):
        import llama_cpp

        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        self.threads = arguments.threads
        self.batches = {}
        self.model = llama_cpp.Llama(
            arguments.gguf,
            n_ctx=arguments.positions,
            n_batch=2048,
            n_ubatch=512,
            n_threads=arguments.threads,
            n_threads_batch=arguments.threads,
            verbose=False,
        )
        self.random = random.Random(arguments.seed)
        self.vocab = self.model.n_vocab()
        self.cached = 0

    def tokens(self, count):
        return [self.random.randrange(2, self.vocab) for _ in range(count)]

    def __call__(self, request):
        if request["what"] == "prefill":
            self.model.reset()
            self.cached = 0
            tokens = self.tokens(request["tokens"])
            started = time.perf_counter()
            self.model.eval(tokens)
            return {"seconds": time.perf_counter() - started, "units": 1}
        if request["what"] == "batched":
            return self.batched(request["batch"], request["tokens"], request["new_tokens"])
        if request["what"] != "decode":
            raise ValueError(f"{request['what']} is not timed with llama.cpp")
        return self.decode(request["tokens"], request["new_tokens"])

    def batched(self, rows, context, new_tokens):
        key = rows, context, new_tokens
        if key not in self.batches:
            self.batches[key] = Batch(self.model.model, rows, context, new_tokens, self.threads, self.tokens(context))
        return self.batches[key].decode()

    def best(self):
        """The token with the largest logit. `eval` leaves the logits where the library has them."""
        from llama_cpp import llama_get_logits_ith
        from numpy.ctypeslib import as_array

        return int(as_array(llama_get_logits_ith(self.model.ctx, -1), shape=(self.vocab,)).argmax())

    def decode(self, context, new_tokens):
        # A context that is there already, or the beginning of one, is not computed again
        self.model.n_tokens = min(self.cached, context)
        if self.cached < context:
            self.model.eval(self.tokens(context - self.cached))
            self.cached = context
        times, token = [], 2
        for _ in range(new_tokens + 1):
            self.model.eval([token])
            token = self.best()
            times.append(time.perf_counter())
        return {"seconds": (times[-1] - times[0]) / new_tokens, "units": new_tokens}


class Batch:
    """Sequences of one context each, in a context of their own, every one with a cache of its own."""

    def __init__(self, model, rows, context, new_tokens, threads, tokens):
        import llama_cpp

        self.api = llama_cpp
        self.rows, self.context, self.new_tokens = rows, context, new_tokens
        parameters = llama_cpp.llama_context_default_params()
        longest = -(-(context + new_tokens + 1) // 256) * 256
        parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = rows * longest, 2048, 512
        parameters.n_seq_max, parameters.kv_unified = rows, False
        parameters.n_threads = parameters.n_threads_batch = threads
        self.llama = llama_cpp.llama_init_from_model(model, parameters)
        if not self.llama:
            raise RuntimeError(f"no context for {rows} sequences")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.memory = llama_cpp.llama_get_memory(self.llama)
        self.batch = llama_cpp.llama_batch_init(2048, 0, 1)
        # Computed once: how long a step takes does not depend on what is cached
        for first in range(0, context, 2048):
            self.evaluate([(0, first + place, token) for place, token in enumerate(tokens[first : first + 2048])])
        for row in range(1, rows):
            llama_cpp.llama_memory_seq_cp(self.memory, 0, row, -1, -1)

    def evaluate(self, entries):
        """Entries are (sequence, position, token); logits are computed of the last of each sequence."""
        batch = self.batch
        batch.n_tokens = len(entries)
        last = {sequence: place for place, (sequence, _, _) in enumerate(entries)}
        for place, (sequence, position, token) in enumerate(entries):
            batch.token[place], batch.pos[place] = token, position
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
            batch.logits[place] = last[sequence] == place
        if self.api.llama_decode(self.llama, batch):
            raise RuntimeError("llama_decode failed")

    def best(self, place):
        from numpy.ctypeslib import as_array

        return int(as_array(self.api.llama_get_logits_ith(self.llama, place), shape=(self.vocab,)).argmax())

    def decode(self):
        for row in range(self.rows):
            self.api.llama_memory_seq_rm(self.memory, row, self.context, -1)
        times, tokens = [], [2 + row for row in range(self.rows)]
        for step in range(self.new_tokens + 1):
            self.evaluate([(row, self.context + step, token) for row, token in enumerate(tokens)])
            tokens = [self.best(row) for row in range(self.rows)]
            times.append(time.perf_counter())
        return {"seconds": (times[-1] - times[0]) / self.new_tokens, "units": self.new_tokens}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("convert")
    command.add_argument("converter")
    command.add_argument("checkpoint")
    command.add_argument("gguf")
    command.add_argument("outtype")
    command.set_defaults(run=convert)
    command = commands.add_parser("quantize")
    command.add_argument("source")
    command.add_argument("gguf")
    command.add_argument("type")
    command.set_defaults(run=quantize)
    command = commands.add_parser("serve")
    command.add_argument("gguf")
    command.add_argument("positions", type=int)
    command.add_argument("threads", type=int)
    command.add_argument("seed", type=int)
    command.set_defaults(run=lambda arguments: worker_lines.serve(lambda: Timings(arguments)))
    parsed = parser.parse_args()
    parsed.run(parsed)
