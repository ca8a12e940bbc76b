"""Text of several domains in given shares, from a mixture file or the folder that `transformers-dsv3 filter` wrote.

A mixture file is JSON; paths in it are relative to its folder:

    {
      "weights": {"code": 0.35, "maths": 0.18, "prose": 0.47},
      "domains": {
        "code": {"text": ["./src", "~/more"]},
        "maths": {"dataset": "maths-*.jsonl", "text_column": "content"},
        "prose": {"dataset": "org/name", "config": "de", "split": "train", "eval_documents": 200, "tokens": 9000000}
      }
    }

`weights` may also be "article", or a schedule by tokens, {"0": {…}, "10000000": {…}}. `text` names text files and
folders of them, `dataset` what `datasets` opens. `tokens` is what a domain has, where it is known: then it is said
before a run how often it would be read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .local_paths import looks_like_path
from .mixture import MOST, WORTH_WHILE, MixedStream, MixtureError, epochs_needed
from .mixture_order import MixtureOrder
from .packed_stream import HeldOutBlocks, PackedStream
from .text_files import TextError
from .text_stream import TextStream, stream_dataset, stream_files


MIXTURE_FILE = "mixture.json"
# What a domain may have in a mixture file, beside `text` or `dataset`
OPTIONS = ("config", "split", "text_column", "eval_split", "eval_documents", "tokens")


@dataclass(frozen=True)
class TextMixture:
    """Streams of text by domain and their shares. It answers to what a [`TextStream`] is asked of.

    Attributes:
        weights: as for [`mix`].
        streams: the text of each domain.
        tokens: how many it has, of the domains where that is known.
        source, split, fingerprint, fingerprint_of: see [`TextStream`].
        filtered: what the filter that chose the text says of itself, or None.
    """

    weights: Any
    streams: dict[str, TextStream]
    tokens: dict[str, int]
    source: str
    fingerprint: str
    filtered: dict[str, Any] | None
    split: str = "a part of each domain held out"
    fingerprint_of: str = "the weights, and each domain's files or dataset"

    @property
    def held_out_bytes(self) -> int:
        return sum(stream.held_out_bytes for stream in self.streams.values())

    def to_dict(self) -> dict[str, Any]:
        """What a training run's record tells of its text, each domain under its name."""
        schedule = MixtureOrder(self.weights, list(self.streams), 0, 1).schedule
        domains = {
            name: {
                "share of tokens": ", then ".join(f"{shares[name]:.4g}" for shares in schedule.values()),
                "source": stream.source,
                "split": stream.split,
                "held_out_bytes": stream.held_out_bytes,
            }
            for name, stream in self.streams.items()
        }
        told = {name: getattr(self, name) for name in ("source", "split", "fingerprint", "fingerprint_of")}
        return {**told, **domains, **({} if self.filtered is None else {"filter": self.filtered})}

    def head(self, n_bytes: int) -> list[str]:
        """The first documents of all domains, of about `n_bytes` bytes together, each domain's by its first share."""
        shares = MixtureOrder(self.weights, list(self.streams), 0, 1).schedule[0]
        return [
            text
            for name, stream in self.streams.items()
            if shares[name]
            for text in stream.head(max(1, round(n_bytes * shares[name])))
        ]

    def packed(
        self,
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        *,
        reset_positions: bool,
        shuffle_window: int,
        seed: int,
        allow_repetition: bool,
    ) -> MixedStream:
        """The blocks to train on, see [`PackedStream`] and [`mix`]."""
        streams = {
            name: PackedStream(
                stream.texts_of_pass,
                tokenizer,
                block_size,
                text_column=stream.text_column,
                reset_positions=reset_positions,
                shuffle_window=shuffle_window,
                seed=seed,
            )
            for name, stream in self.streams.items()
        }
        return MixedStream(self.weights, streams, seed, block_size=block_size, allow_repetition=allow_repetition)

    def repetitions(self, total_tokens: int, block_size: int) -> dict[str, float]:
        """How often a run of so many tokens reads the domains of which it is known how many they have."""
        order = MixtureOrder(self.weights, list(self.streams), 0, block_size)
        drawn = order.counts(-(-total_tokens // block_size))
        shares = {name: drawn[name] / max(1, sum(drawn.values())) for name in self.tokens}
        return epochs_needed(shares, self.tokens, total_tokens)

    def repetition_refusal(self, total_tokens: int, block_size: int) -> str | None:
        """The domains that a run of so many tokens would read more often than is of use, in one line, or None."""
        often = {name: n for name, n in self.repetitions(total_tokens, block_size).items() if n > MOST}
        return None if not often else f"{_times(often)}, more than {MOST}: give more text or smaller weights"

    def repetition_warning(self, total_tokens: int, block_size: int) -> str | None:
        """The same, of domains for which it begins to be of less use."""
        often = {name: n for name, n in self.repetitions(total_tokens, block_size).items() if n > WORTH_WHILE}
        return None if not often else f"{_times(often)}: past {WORTH_WHILE} the same text is worth less and less."


class HeldOutMixture(torch.utils.data.Dataset):
    """The held-out texts of all domains as blocks, domain after domain, and in each language after language.

    Attributes:
        bytes_per_token: of all of it.
        groups: of each domain, and of each language in it where there are several and a block of it: name, numbers of
            the first block and of the one behind the last, bytes a token.
    """

    def __init__(
        self, mixture: TextMixture, tokenizer: PreTrainedTokenizerBase, block_size: int, reset_positions: bool
    ):
        self.examples: list[dict[str, torch.Tensor]] = []
        self.groups: list[tuple[str, int, int, float]] = []
        n_bytes = n_tokens = 0.0
        for domain, stream in mixture.streams.items():
            whole = HeldOutBlocks(stream, tokenizer, block_size, reset_positions)
            parts = {domain: whole}
            for language, texts in _by_language(stream):
                part = replace(stream, held_out=tuple(texts), held_out_languages=())
                try:
                    parts[f"{domain}_{language}"] = HeldOutBlocks(part, tokenizer, block_size, reset_positions)
                except TextError:
                    continue  # less than a block
            n_bytes += whole.bytes_per_token * len(whole)
            n_tokens += len(whole)
            for name, blocks in parts.items():
                first = len(self.examples)
                self.examples.extend(blocks.examples)
                self.groups.append((name, first, len(self.examples), blocks.bytes_per_token))
        self.bytes_per_token = n_bytes / n_tokens

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.examples[index]


def read_mixture(path: str | Path, seed: int = 0, exclude: Path | None = None, weights: Any = None) -> TextMixture:
    """Open all that a mixture file names.

    Args:
        path: the file, or a folder that has `mixture.json`.
        seed: of the order in which text files are read.
        exclude: a folder whose files are left out.
        weights: in place of the file's.

    Raises:
        TextError: the file is missing or wrong, or a domain cannot be opened; it is named.
        MixtureError: the weights do not fit.
    """
    path = Path(path).expanduser()
    file = path / MIXTURE_FILE if path.is_dir() else path
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise TextError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise TextError(f"{file} is no JSON: {error}") from None
    if not isinstance(told, dict) or not isinstance(told.get("domains"), dict) or not told["domains"]:
        raise TextError(f'{file} needs "domains", an object of at least one')
    unknown = sorted(set(told) - {"weights", "domains", "filter"})
    if unknown:
        raise TextError(f"{file}: {unknown[0]!r} is none of weights, domains and filter")
    weights = told.get("weights") if weights is None else weights
    if weights is None:
        raise TextError(f'{file} needs "weights", shares of tokens by domain')
    weights = weights_from_json(weights)
    MixtureOrder(weights, list(told["domains"]), 0, 1)  # what is wrong with them, before any text is opened
    streams = {}
    for name, domain in told["domains"].items():
        try:
            streams[name] = _stream(domain, file.parent, seed, exclude)
        except TextError as error:
            raise TextError(f"{file}, domain {name!r}: {error}") from None
    fingerprints = [told.get("weights") and repr(weights), *(stream.fingerprint for stream in streams.values())]
    return TextMixture(
        weights=weights,
        streams=streams,
        tokens={name: int(domain["tokens"]) for name, domain in told["domains"].items() if "tokens" in domain},
        source=f"a mixture of {', '.join(streams)}",
        fingerprint=hashlib.sha256(json.dumps(fingerprints).encode()).hexdigest(),
        filtered=told.get("filter"),
    )


def weights_from_json(weights: Any) -> Any:
    """Weights as JSON has them, where numbers of tokens are strings: `{"0": {…}}`."""
    if (
        isinstance(weights, Mapping)
        and weights
        and all(isinstance(value, (Mapping, str)) for value in weights.values())
    ):
        try:
            return {int(token): value for token, value in weights.items()}
        except ValueError:
            raise MixtureError(f"a schedule's weights are by numbers of tokens, not by {list(weights)}") from None
    return weights


def _stream(domain: Any, folder: Path, seed: int, exclude: Path | None) -> TextStream:
    if not isinstance(domain, dict) or ("text" in domain) == ("dataset" in domain):
        raise TextError('it needs either "text", files and folders, or "dataset"')
    unknown = sorted(set(domain) - {"text", "dataset", *OPTIONS})
    if unknown:
        raise TextError(f"{unknown[0]!r} is none of text, dataset, {', '.join(OPTIONS)}")
    if "text" in domain:
        paths = domain["text"] if isinstance(domain["text"], list) else [domain["text"]]
        return stream_files([folder / Path(path).expanduser() for path in paths], seed=seed, exclude=exclude)
    name = str(domain["dataset"])
    if looks_like_path(name) and "://" not in name:
        name = str(folder / Path(name).expanduser())
    return stream_dataset(
        name,
        config=domain.get("config"),
        split=domain.get("split", "train"),
        text_column=domain.get("text_column", "text"),
        held_out_split=domain.get("eval_split"),
        held_out_documents=domain.get("eval_documents", 200),
    )


def _by_language(stream: TextStream) -> Iterator[tuple[str, list[str]]]:
    languages = sorted(set(stream.held_out_languages))
    if len(languages) > 1:
        for language in languages:
            pairs = zip(stream.held_out, stream.held_out_languages, strict=True)
            yield language, [text for text, of in pairs if of == language]


def _times(often: dict[str, float]) -> str:
    return "the run would read " + ", ".join(f"{name} {n:.1f} times" for name, n in often.items())
