"""Run by an interpreter that has llama-cpp-python: `convert` a checkpoint, `quantize` a file, write its `logits`."""

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
    sys.argv = [str(converter), arguments.checkpoint, "--outfile", arguments.gguf, "--outtype", arguments.outtype]
    runpy.run_path(str(converter), run_name="__main__")


def quantize(arguments):
    """Runs llama.cpp's quantizer, as its tool `llama-quantize` does."""
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{arguments.type.upper()}")
    sys.exit(llama_cpp.llama_model_quantize(arguments.source.encode(), arguments.gguf.encode(), parameters))


def logits(arguments):
    """Writes `(tokens, vocabulary)` fp32 logits to a .npy file; prints how llama.cpp tokenizes the text, what it says
    after its first tokens, and the chat template.

    Weights are not put in another order for the processor: on one with AMX, that of Q8_0 and Q4_0 ends in a crash.
    """
    import llama_cpp
    import numpy as np
    from llama_cpp import Llama

    default = llama_cpp.llama_cpp.llama_model_default_params

    def without_other_buffers():
        parameters = default()
        parameters.use_extra_bufts = False
        return parameters

    llama_cpp.llama_cpp.llama_model_default_params = without_other_buffers
    request = json.loads(Path(arguments.request).read_text())
    ids = request["ids"]
    f32 = 0  # GGML_TYPE_F32; the cache is fp16 by default
    model = Llama(
        arguments.gguf, n_ctx=512, n_batch=512, n_threads=2, logits_all=True, type_k=f32, type_v=f32, verbose=False
    )
    model.eval(ids)
    np.save(arguments.output, model.scores[: len(ids)])
    text = []
    model.reset()
    model.eval(ids[: request["prompt"]])
    for _ in range(request["new_tokens"]):
        text.append(int(np.argmax(model.scores[model.n_tokens - 1])))
        model.eval(text[-1:])
    tokens = model.tokenize(request["text"].encode(), add_bos=True, special=False)
    template = model.metadata.get("tokenizer.chat_template")
    print(json.dumps({"tokens": tokens, "text": text, "template": template}))


def mtp(arguments):
    """Writes the fp32 logits of a text's tokens and those of the MTP layer, `(tokens, vocabulary)` and one row fewer.

    Row i of the latter is made of the hidden state of token i and of token i + 1, and predicts token i + 2. So does
    llama.cpp's own drafting, by functions that its public headers do not have yet.
    """
    import ctypes

    import llama_cpp
    import numpy as np

    api, ids = llama_cpp.llama_cpp, json.loads(Path(arguments.request).read_text())["ids"]
    library = api._lib
    set_hidden = library._Z26llama_set_embeddings_nextnP13llama_contextbb
    set_hidden.argtypes, set_hidden.restype = [ctypes.c_void_p, ctypes.c_bool, ctypes.c_bool], None
    get_hidden = library._Z26llama_get_embeddings_nextnP13llama_context
    get_hidden.argtypes, get_hidden.restype = [ctypes.c_void_p], ctypes.POINTER(ctypes.c_float)

    parameters = api.llama_model_default_params()
    parameters.use_extra_bufts, parameters.load_mtp = False, True
    model = api.llama_model_load_from_file(arguments.gguf.encode(), parameters)
    assert api.llama_model_n_layer_nextn(model) == 1
    vocabulary, width = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model)), api.llama_model_n_embd(model)

    def context(kind, masked):
        settings = api.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = 512
        settings.n_threads = settings.n_threads_batch = 2
        settings.type_k = settings.type_v = 0  # GGML_TYPE_F32
        settings.ctx_type = kind
        made = api.llama_init_from_model(model, settings)
        assert made, "llama.cpp makes no context for this file"
        set_hidden(made, True, masked)
        return made

    def run(made, tokens, start, hidden=None):
        batch = api.llama_batch_ext_init(made)
        for i, token in enumerate(tokens):
            at = api.llama_batch_ext_add_token(batch, 0, token)
            api.llama_batch_ext_set_pos(batch, at, (ctypes.c_int32 * 4)(start + i))
            if hidden is not None:
                row = hidden[i].ctypes.data_as(ctypes.POINTER(ctypes.c_float))
                api.llama_batch_ext_set_embd_token(batch, at, api.llama_embd(row, 1, width))
            api.llama_batch_ext_set_output_logits(batch, at, True)
        assert api.llama_process(made, 1, batch) == 0  # LLAMA_PROCESS_TYPE_DECODE
        return np.ctypeslib.as_array(api.llama_get_logits(made), (len(tokens), vocabulary)).copy()

    target = context(api.LLAMA_CONTEXT_TYPE_DEFAULT, False)
    plain = run(target, ids, 0)
    hidden = np.ctypeslib.as_array(get_hidden(target), (len(ids), width)).copy()
    drafts = run(context(api.LLAMA_CONTEXT_TYPE_MTP, True), ids[1:], 1, hidden)
    np.savez(arguments.output, plain=plain, mtp=drafts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("convert")
    command.add_argument("converter")
    command.add_argument("checkpoint")
    command.add_argument("gguf")
    command.add_argument("--pre-tokenizer")
    command.add_argument("--outtype", default="f32")
    command.set_defaults(run=convert)
    command = commands.add_parser("quantize")
    command.add_argument("source")
    command.add_argument("gguf")
    command.add_argument("type")
    command.set_defaults(run=quantize)
    command = commands.add_parser("logits")
    command.add_argument("gguf")
    command.add_argument("request")
    command.add_argument("output")
    command.set_defaults(run=logits)
    command = commands.add_parser("mtp")
    command.add_argument("gguf")
    command.add_argument("request")
    command.add_argument("output")
    command.set_defaults(run=mtp)
    parsed = parser.parse_args()
    parsed.run(parsed)
