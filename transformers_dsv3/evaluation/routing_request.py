"""What a report of routing is asked of: a checkpoint and a text, by name; a refusal names the option at fault."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import transformers_dsv3  # noqa: F401  registers the plugin's classes

from ..data.text_files import TextError, build_corpus, read_documents, standard_library
from ..training.quickstart_run import QuickstartSettings
from .loading import RefusedOption, checkpoint_problem
from .routing import RoutingReport, moe_layers, routing_report, text_stream


def load_config(option: str, checkpoint: str, window: int) -> Any:
    """The config of a checkpoint whose routing can be measured; a refusal names the option."""
    try:
        config = AutoConfig.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        raise RefusedOption(option, checkpoint_problem(checkpoint, error)) from None
    if config.model_type != "deepseek_v3":
        raise RefusedOption(option, f"{checkpoint} is a {config.model_type!r} checkpoint, not 'deepseek_v3'")
    if not moe_layers(config):
        raise RefusedOption(
            option,
            f"{checkpoint} has no mixture-of-experts layer: first_k_dense_replace={config.first_k_dense_replace} of "
            f"{config.num_hidden_layers} layers are dense",
        )
    if window > config.max_position_embeddings:
        raise RefusedOption(
            "--window", f"{window} is more than the {config.max_position_embeddings} positions of {checkpoint}"
        )
    return config


def read_texts(paths: Sequence[Path] | None) -> tuple[str, list[str]]:
    """Where the text comes from, in words, and the texts."""
    try:
        if paths:
            documents = [document for path in paths for document in read_documents(path)[0]]
            return ", ".join(map(str, paths)), [document.text for document in documents]
        # As `quickstart` cuts it, so that its checkpoints are measured on what they have not seen
        source = "the Python standard library"
        corpus = build_corpus(standard_library(), source, max_bytes=QuickstartSettings.max_text_bytes)
        return f"{source}, {corpus.split}", [document.text for document in corpus.held_out]
    except TextError as error:
        raise RefusedOption("--text", str(error)) from None


def tokens_of(option: str, checkpoint: str, texts: list[str], window: int, vocab_size: int) -> torch.Tensor:
    """The texts in the tokens of a checkpoint, `(n_tokens,)`, at least a window of them."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        reason = checkpoint_problem(checkpoint, error).removeprefix(f"{checkpoint}: ").removesuffix(":")
        raise RefusedOption(
            option,
            f"{checkpoint} has no tokenizer that can be loaded ({reason}): save one there with "
            "tokenizer.save_pretrained(...)",
        ) from None
    return checked_stream(option, checkpoint, tokenizer, texts, window, vocab_size)


def checked_stream(
    option: str, checkpoint: str, tokenizer: Any, texts: Sequence[str], window: int, vocab_size: int
) -> torch.Tensor:
    """The texts as token ids that the model knows, `(n_tokens,)`, at least a window of them."""
    stream = text_stream(tokenizer, texts)
    if stream.numel() < window:
        raise RefusedOption(
            "--text", f"the text makes only {stream.numel():,} tokens, fewer than one window of {window}"
        )
    largest = int(stream.max())
    if largest >= vocab_size:
        raise RefusedOption(
            option,
            f"{checkpoint}: its tokenizer gives token {largest}, outside the model's vocabulary of {vocab_size}: it "
            "belongs to another model",
        )
    return stream


def measure(
    option: str,
    checkpoint: str,
    stream: torch.Tensor,
    window: int,
    max_tokens: int,
    device: str | None,
    dtype: str,
) -> RoutingReport:
    """Load a checkpoint and run it over its tokens. The model is let go before the next is loaded."""
    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, device_map=device)
    except (OSError, ValueError) as error:
        raise RefusedOption(option, checkpoint_problem(checkpoint, error)) from None
    return routing_report(model, stream, window=window, max_tokens=max_tokens)
