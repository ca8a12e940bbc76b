"""Run by an interpreter that has llama-cpp-python: `convert` a checkpoint to GGUF, or write the `logits` of one."""

import argparse
import json
import runpy
import sys
from pathlib import Path


def convert(arguments):
    """Runs llama.cpp's converter, telling it the pre-tokenizer's name where that is given.

    The converter knows pre-tokenizers by a hash over a vocabulary's token ids, so it cannot know the one of a
    vocabulary trained a minute ago; a list in its source is where a model's author would enter it.
    """
    converter = Path(arguments.converter)
    sys.path[0:0] = [str(converter.parent), str(converter.parent / "gguf-py")]
    if arguments.pre_tokenizer:
        from conversion.base import TextModel

        TextModel.get_vocab_base_pre = lambda self, tokenizer: arguments.pre_tokenizer
    sys.argv = [str(converter), arguments.checkpoint, "--outfile", arguments.gguf, "--outtype", "f32"]
    runpy.run_path(str(converter), run_name="__main__")


def logits(arguments):
    """Writes `(tokens, vocabulary)` fp32 logits to a .npy file and prints how llama.cpp tokenizes the text."""
    import numpy as np
    from llama_cpp import Llama

    request = json.loads(Path(arguments.request).read_text())
    ids = request["ids"]
    f32 = 0  # GGML_TYPE_F32; the cache is fp16 by default
    model = Llama(
        arguments.gguf, n_ctx=512, n_batch=512, n_threads=2, logits_all=True, type_k=f32, type_v=f32, verbose=False
    )
    model.eval(ids)
    np.save(arguments.output, model.scores[: len(ids)])
    print(json.dumps(model.tokenize(request["text"].encode(), add_bos=True, special=False)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("convert")
    command.add_argument("converter")
    command.add_argument("checkpoint")
    command.add_argument("gguf")
    command.add_argument("--pre-tokenizer")
    command.set_defaults(run=convert)
    command = commands.add_parser("logits")
    command.add_argument("gguf")
    command.add_argument("request")
    command.add_argument("output")
    command.set_defaults(run=logits)
    parsed = parser.parse_args()
    parsed.run(parsed)
