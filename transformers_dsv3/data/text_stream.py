"""Text that is read while training goes on, in an order that depends on the seed alone.

Every source is a `datasets.IterableDataset`, so that a position in it can be saved and returned to. A part of the text
is held out from the start. `text_files.py` reads a whole corpus into memory; this file never does.
"""

from __future__ import annotations

import copy
import hashlib
import json
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np
from transformers.utils import logging

from .local_paths import BUILDERS, local_or_hub
from .text_files import STDLIB_SKIPPED, Corpus, TextError


logger = logging.get_logger(__name__)

# Bytes that are read at once and make one document at most: a file of any size streams.
PIECE_BYTES = 1_000_000


@dataclass(frozen=True)
class Span:
    """Lines of a file: those that start at byte `start` or later and before byte `end`."""

    path: str
    start: int
    end: int


@dataclass(frozen=True)
class TextStream:
    """Documents to train on, as a stream, and documents held out.

    Attributes:
        source: where the text comes from, in words.
        texts_of_pass: function from the number of the pass (0 for the first) to a `datasets.IterableDataset` of
            `{text_column: str}`, at its start.
        text_column: the column that holds the text.
        held_out: texts that `texts_of_pass` leaves out.
        split: how they were chosen, in words.
        fingerprint: changes with the text as far as that can be told without reading it: with the names and sizes of
            files, with the name and split of a dataset.
        fingerprint_of: what it is a sha256 of, in words.
        held_out_languages: of each held-out text, where the dataset has a column `language`; else empty.
    """

    source: str
    texts_of_pass: Callable[[int], Any]
    text_column: str
    held_out: tuple[str, ...]
    split: str
    fingerprint: str
    fingerprint_of: str
    held_out_languages: tuple[str, ...] = ()

    @property
    def held_out_bytes(self) -> int:
        return sum(len(text.encode("utf-8")) for text in self.held_out)

    def to_dict(self) -> dict[str, Any]:
        """What a training run's record tells of its text."""
        names = ("source", "split", "fingerprint", "fingerprint_of", "held_out_bytes")
        return {name: getattr(self, name) for name in names}

    def head(self, n_bytes: int) -> list[str]:
        """The first documents to train on, of about `n_bytes` bytes together (the last one may reach past them)."""
        texts, size = [], 0
        for example in self.texts_of_pass(0):
            texts.append(checked_text(example[self.text_column], self.text_column))
            size += len(texts[-1].encode("utf-8"))
            if size >= n_bytes:
                break
        return texts


def checked_text(value: Any, column: str) -> str:
    if not isinstance(value, str):
        raise TextError(f"the column {column!r} holds {type(value).__name__}, not text")
    return value


def stream_files(
    paths: Sequence[str | Path] | None,
    *,
    seed: int = 0,
    exclude: Path | None = None,
    held_out_share: float = 0.05,
    held_out_max_bytes: int = 250_000,
) -> TextStream:
    """Stream text files and all text files under folders; without `paths`, Python's standard library.

    Hidden files, empty files and what lies under `exclude` are left out, and with a warning what turns out not to be
    UTF-8 text when its turn comes. Each pass reads the files in another order, drawn from `seed`.

    Whole files are held out, in the order of a hash of their names, or the end of each file where that is impossible.

    Raises:
        TextError: a path is missing, or nothing was found.
    """
    files: list[tuple[str, Path]] = []
    if paths is None:
        root = Path(sysconfig.get_path("stdlib"))
        found = ((path.relative_to(root), path) for path in root.rglob("*.py"))
        files = [(name.as_posix(), path) for name, path in found if STDLIB_SKIPPED.isdisjoint(name.parts)]
        source = "the Python standard library"
    else:
        for path in map(Path, paths):
            files.extend(_files_under(path, exclude))
        source = ", ".join(str(Path(path)) for path in paths)
    sizes = {path: (name, path.stat().st_size) for name, path in files}
    spans = sorted((name, str(path), size) for path, (name, size) in sizes.items() if size)
    if not spans:
        raise TextError(f"{source} has no file with text in it")

    total = sum(size for _, _, size in spans)
    wanted = min(int(total * held_out_share), held_out_max_bytes)
    held_out, taken = set(), 0
    for _, held, size in sorted(spans, key=lambda span: hashlib.sha256(span[0].encode("utf-8")).digest()):
        # A file past four times the wanted size would starve training or stretch the evaluation.
        if taken < wanted and taken + size <= 4 * wanted:
            held_out.add(held)
            taken += size
    if held_out and taken >= wanted // 2:
        train = [Span(path, 0, size) for _, path, size in spans if path not in held_out]
        ends = [Span(path, 0, size) for _, path, size in spans if path in held_out]
        split = f"{len(ends)} of {len(spans)} files held out"
    else:
        share = wanted / total
        train = [Span(path, 0, size - int(size * share)) for _, path, size in spans]
        ends = [Span(path, size - int(size * share), size) for _, path, size in spans]
        split = f"too few files to hold whole ones out: the last {share:.1%} of each file held out"

    pieces = [piece for span in train for piece in _pieces(span)]
    return TextStream(
        source=source,
        texts_of_pass=partial(_files_of_pass, pieces, seed),
        text_column="text",
        held_out=tuple(example["text"] for example in read_spans(ends)),
        split=split,
        fingerprint=_fingerprint([(name, size) for name, _, size in spans]),
        fingerprint_of="names and sizes of the files",
    )


def stream_corpus(corpus: Corpus, seed: int = 0) -> TextStream:
    """A corpus that is in memory, as a stream. Each pass reads its documents in another order, drawn from `seed`."""
    return TextStream(
        source=corpus.source,
        texts_of_pass=partial(_texts_of_pass, [document.text for document in corpus.train], seed),
        text_column="text",
        held_out=tuple(document.text for document in corpus.held_out),
        split=corpus.split,
        fingerprint=corpus.fingerprint,
        fingerprint_of="names and texts of the files",
    )


def stream_dataset(
    name: str,
    *,
    config: str | None = None,
    split: str = "train",
    text_column: str = "text",
    held_out_split: str | None = None,
    held_out_documents: int = 200,
    held_out_max_bytes: int = 250_000,
) -> TextStream:
    """Stream what `datasets.load_dataset` opens: a name on the Hub, a local folder, or one local file.

    Every pass reads it in its own order.

    Args:
        name: as for `load_dataset`, or a file that ends in .jsonl, .json, .parquet, .csv, .arrow or .txt, or several
            such by a pattern: `folder/part-*.jsonl`.
        config: which of the dataset's configurations.
        held_out_split: the split to evaluate on. Without it the first `held_out_documents` documents of `split` are
            held out.
        held_out_max_bytes: no more than about this is kept of it.

    Raises:
        TextError: it cannot be opened, lacks the column, or nothing is left to train on.
    """
    from datasets import load_dataset

    files = sorted(glob(str(Path(name).expanduser()))) if "*" in name else []
    try:
        name = name if files else local_or_hub(name)
    except ValueError as error:
        raise TextError(str(error)) from None
    files = files or ([name] if Path(name).is_file() else [])
    builder = BUILDERS.get(Path(files[0]).suffix) if files else None
    if files and builder is None:
        raise TextError(f"{name}: the ending is none of {', '.join(BUILDERS)}")

    def opened(which: str) -> Any:
        try:
            if builder is not None:
                return load_dataset(builder, data_files=files, split=which, streaming=True)
            return load_dataset(name, config, split=which, streaming=True)
        except (OSError, ValueError) as error:  # every error of `datasets` and huggingface_hub is one of them
            raise TextError(f"{name} cannot be opened as a dataset, split {which!r}: {error}") from error

    train = opened(split)
    first = next(iter(copy.deepcopy(train)), None)
    if first is None:
        raise TextError(f"{name} has no documents")
    if text_column not in first:
        raise TextError(f"{name} has no column {text_column!r}; it has {', '.join(map(repr, first))}")
    if held_out_split is None:
        ends, train = train.take(held_out_documents), train.skip(held_out_documents)
        words = f"its first {held_out_documents} documents held out"
        if next(iter(copy.deepcopy(train)), None) is None:
            raise TextError(f"{name} has {held_out_documents} documents or fewer: none is left to train on")
    else:
        ends, words = opened(held_out_split), f"its split {held_out_split!r} held out"
    texts: list[str] = []
    languages: list[str] = []
    size = 0
    for example in ends:
        texts.append(checked_text(example[text_column], text_column))
        languages.append(str(example.get("language")))
        size += len(texts[-1].encode("utf-8"))
        if size >= held_out_max_bytes:
            break
    return TextStream(
        source=name,
        texts_of_pass=partial(_dataset_of_pass, train),
        text_column=text_column,
        held_out=tuple(texts),
        split=words,
        fingerprint=_fingerprint([name, config, split, text_column, held_out_split, held_out_documents]),
        fingerprint_of="the dataset's name and splits",
        held_out_languages=tuple(languages) if "language" in first else (),
    )


def read_spans(spans: Sequence[Span]) -> Iterator[dict[str, str]]:
    """The text of each span as `{"text": …}`; spans that are blank or not UTF-8 text are left out."""
    for span in spans:
        try:
            with open(span.path, "rb") as file:
                data = _lines(file, span)
            text = data.decode("utf-8-sig" if span.start == 0 else "utf-8")
        except (UnicodeDecodeError, OSError) as error:
            logger.warning_once(f"{span.path} is left out: {error}")
            continue
        if "\0" in text:
            logger.warning_once(f"{span.path} is left out: it has NUL bytes, so it is not text")
        elif text.strip():
            yield {"text": text}


def _lines(file: Any, span: Span) -> bytes:
    def line_start(position: int) -> int:
        """Start of the first line at `position` or behind it."""
        if position == 0:
            return 0
        file.seek(position - 1)
        file.readline()
        return file.tell()

    start, end = line_start(span.start), line_start(span.end)
    file.seek(start)
    return file.read(end - start)


def _files_under(path: Path, exclude: Path | None) -> Iterator[tuple[str, Path]]:
    """Name and path of the file, or of every file that is not hidden under the folder."""
    if not path.exists():
        raise TextError(f"{path} does not exist")
    if path.is_file():
        yield path.name, path
        return
    for file in path.rglob("*"):
        name = file.relative_to(path)
        hidden = any(part.startswith(".") for part in name.parts)
        excluded = exclude is not None and file.resolve().is_relative_to(exclude.resolve())
        if file.is_file() and not hidden and not excluded:
            yield name.as_posix(), file


def _pieces(span: Span) -> Iterator[Span]:
    for start in range(span.start, span.end, PIECE_BYTES):
        yield Span(span.path, start, min(start + PIECE_BYTES, span.end))


def _files_of_pass(pieces: Sequence[Span], seed: int, pass_number: int) -> Any:
    from datasets import IterableDataset

    order = np.random.default_rng((seed, pass_number)).permutation(len(pieces))
    # A list among the arguments makes one shard of each of its entries, so that a saved position opens its file only.
    return IterableDataset.from_generator(read_spans, gen_kwargs={"spans": [pieces[i] for i in order]})


def _texts_of_pass(texts: Sequence[str], seed: int, pass_number: int) -> Any:
    from datasets import IterableDataset

    order = np.random.default_rng((seed, pass_number)).permutation(len(texts))
    return IterableDataset.from_generator(_as_examples, gen_kwargs={"texts": [texts[i] for i in order]})


def _as_examples(texts: Sequence[str]) -> Iterator[dict[str, str]]:
    for text in texts:
        yield {"text": text}


def _dataset_of_pass(dataset: Any, pass_number: int) -> Any:
    # A copy, because a dataset that was sent to a saved position starts there from then on
    fresh = copy.deepcopy(dataset)
    fresh.set_epoch(pass_number)
    return fresh


def _fingerprint(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode("utf-8")).hexdigest()


__all__ = ["Span", "TextStream", "read_spans", "stream_corpus", "stream_dataset", "stream_files"]
