"""A byte-level BPE tokenizer to the metadata of a GGUF file, and back.

llama.cpp knows how a text is cut before merging by a name. It is found here by the tokenizer's own expressions, where
llama.cpp's converter compares the tokens of a sample text with a list.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .format import ARCHITECTURE


NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
_GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
# Of DeepSeek-V3's tokenizer.json: digits, Chinese and Japanese, all else
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)
# llama.cpp's names
SPLITS: dict[str, tuple[str, ...]] = {"gpt-2": (), "deepseek-v3": _DEEPSEEK_V3}


def _plain_split(step: Mapping[str, Any]) -> str | None:
    pattern = step.get("pattern", {})
    is_plain = step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert")
    return pattern.get("Regex") if is_plain else None


def _escapes_undone(expression: str | None) -> str | None:
    """An expression with line ends written as escapes, whichever way the tokenizer's file has them."""
    return None if expression is None else expression.replace("\r", r"\r").replace("\n", r"\n")


def pre_tokenizer_name(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer cuts a text before merging.

    Args:
        tokenizer: what its `tokenizer.json` holds.

    Raises:
        ValueError: where it is none that llama.cpp is known to have, with its description.
    """
    step = tokenizer.get("pre_tokenizer") or {}
    steps = step.get("pretokenizers", []) if step.get("type") == "Sequence" else [step]
    kinds = [{key: s.get(key) for key in _GPT2} for s in steps]
    if kinds == [_GPT2]:
        return "gpt-2"
    if kinds and kinds[-1] == _BYTE_LEVEL:
        splits = tuple(_escapes_undone(_plain_split(s)) for s in steps[:-1])
        for name, expressions in SPLITS.items():
            if splits and splits == tuple(map(_escapes_undone, expressions)):
                return name
    described = json.dumps(step, ensure_ascii=False)
    raise ValueError(f"no name of llama.cpp's is known for its pre-tokenizer {described[:400]}")


def tokenizer_refusal(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> str | None:
    """Why a tokenizer cannot be written to a GGUF file, in one line; None where it can."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return f"{type(tokenizer).__name__} has no tokenizer.json"
    fields = json.loads(backend.to_str())
    model = fields["model"]
    if model.get("type") != "BPE" or model.get("ignore_merges") or model.get("byte_fallback"):
        return f"its model is {model.get('type')} with other rules than byte-level BPE's"
    normalizer = fields.get("normalizer")
    if normalizer and not (normalizer.get("type") == "Sequence" and not normalizer.get("normalizers")):
        return f"its normalizer {normalizer.get('type')} is nothing that llama.cpp does for such a vocabulary"
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size:
        return f"it has a token {largest}, and the model a vocabulary of {vocab_size}"
    try:
        pre_tokenizer_name(fields)
    except ValueError as error:
        return str(error)
    if not model["merges"]:
        return "it has no merges, and llama.cpp opens no vocabulary without"
    return None


def metadata_of_tokenizer(tokenizer: PreTrainedTokenizerBase, config: Any) -> dict[str, Any]:
    """Keys and values of a GGUF file's metadata for a tokenizer without `tokenizer_refusal`, chat template included.

    Args:
        config: the model's. Its vocabulary may have more rows than there are tokens.
    """
    fields = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [f"[PAD{i}]" for i in range(config.vocab_size)]
    types = [UNUSED] * config.vocab_size
    for token, i in tokenizer.get_vocab().items():
        tokens[i], types[i] = token, NORMAL
    for i, added in tokenizer.added_tokens_decoder.items():
        types[i] = CONTROL if added.special else USER_DEFINED
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in fields["model"]["merges"]]
    metadata: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre_tokenizer_name(fields),
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
    }
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    for key, name in names.items():
        token_id = getattr(tokenizer, f"{name}_token_id", None)
        token_id = getattr(config, f"{name}_token_id", None) if token_id is None else token_id
        if isinstance(token_id, int):
            metadata[f"tokenizer.ggml.{key}_token_id"] = token_id
    ids = tokenizer("a")["input_ids"]
    metadata["tokenizer.ggml.add_bos_token"] = tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
    metadata["tokenizer.ggml.add_eos_token"] = tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id
    template = tokenizer.chat_template
    if template := template.get("default") if isinstance(template, dict) else template:
        metadata["tokenizer.chat_template"] = template
    return metadata


def tokenizer_of(fields: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a GGUF file with one of the pre-tokenizers of `SPLITS`.

    Args:
        fields: of its metadata: `tokens`, `merges`, `token_type` and `pre_tokenizer_type`, as Transformers calls them.

    Raises:
        ValueError: for another pre-tokenizer.
    """
    if (name := fields.get("pre_tokenizer_type")) not in SPLITS:
        raise ValueError(f"the GGUF file's pre-tokenizer is {name!r}; known are {', '.join(SPLITS)}")
    tokens = fields["tokens"]
    kinds = fields.get("token_type") or [NORMAL] * len(tokens)
    vocabulary = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds)) if kind != UNUSED}
    merges = [tuple(merge.split(" ")) for merge in fields.get("merges", ())]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in SPLITS[name]]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not splits)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, last]) if splits else last
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, kinds):
        if kind == CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False)])
    return tokenizer


_ADDED = ("add_bos_token", "add_eos_token")


class _Converter:
    """What Transformers up to 5.22 looks up for an architecture."""

    def __init__(self, fields: dict[str, Any]):
        self.fields = fields
        self.additional_kwargs = {name: fields[name] for name in _ADDED if name in fields}

    def converted(self) -> Tokenizer:
        return tokenizer_of(self.fields)


def register_tokenizers() -> None:
    """Adds tokenizers of `deepseek2` files to Transformers' tables. Repeating does nothing."""
    from transformers.integrations import gguf

    if hasattr(gguf, "GGUF_TOKENIZER_ARCHS"):
        from transformers.integrations.ggml import GGUF_TO_FAST_CONVERTERS, GGUF_TOKENIZER_MAPPING

        names = GGUF_TOKENIZER_MAPPING["tokenizer"]
        for key, name in {"ggml.pre": "pre_tokenizer_type", **{f"ggml.{name}": name for name in _ADDED}}.items():
            names.setdefault(key, name)
        gguf.GGUF_TOKENIZER_ARCHS[ARCHITECTURE] = ARCHITECTURE
        GGUF_TO_FAST_CONVERTERS[ARCHITECTURE] = _Converter
        return
    # From 5.23 on the table goes by the kind of vocabulary, which other architectures have too
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_TOKENIZER_TYPES

    theirs = GGUF_TOKENIZER_TYPES["gpt2"]
    if isinstance(theirs, _ByteLevel):
        return
    GGUF_TOKENIZER_TYPES["gpt2"] = _ByteLevel(theirs)


class _ByteLevel:
    """Builds what Transformers' own builder does not: a pre-tokenizer of `SPLITS`, and a vocabulary without GPT-2's
    `<|endoftext|>`, which it would put behind the last token of the model. All others are built as before.
    """

    def __init__(self, theirs: Any):
        self.theirs = theirs

    def __call__(self, fields: dict[str, Any]) -> PreTrainedTokenizerBase:
        name = fields.get("pre_tokenizer_type")
        if name not in SPLITS or (name == "gpt-2" and "<|endoftext|>" in fields["tokens"]):
            return self.theirs(fields)
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer_of(fields))
