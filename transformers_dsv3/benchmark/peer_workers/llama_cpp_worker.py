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
        if request["batch"] != 1 or request["what"] != "decode":
            raise ValueError("only single sequences are timed with llama.cpp")
        return self.decode(request["tokens"], request["new_tokens"])

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
