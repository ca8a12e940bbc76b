"""A text corpus from files on disk, split into a training and a held-out part by file.

Everything here is deterministic: the same files give the same documents, the same split and the same fingerprint.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


# Test suites are half of the standard library and read unlike the rest; `encodings` and `pydoc_data` are tables
# written by a program.
STDLIB_SKIPPED = frozenset(
    {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}
)


class TextError(ValueError):
    """The text cannot be used; the message names the file or folder and says why."""


@dataclass(frozen=True)
class Document:
    """One text file. `name` is its path relative to the folder it was found in, with forward slashes."""

    name: str
    text: str

    @property
    def n_bytes(self) -> int:
        return len(self.text.encode("utf-8"))


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents held out, from the same source.

    Attributes:
        source: where the text comes from, in words.
        split: how the held-out part was chosen, in words.
        fingerprint: sha256 over all names and texts of both parts; equal exactly when the corpus is the same.
        skipped: files of the folder that were left out because they are empty or not UTF-8 text.
    """

    source: str
    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    split: str
    fingerprint: str
    skipped: tuple[str, ...] = ()

    @property
    def train_bytes(self) -> int:
        return sum(document.n_bytes for document in self.train)

    @property
    def held_out_bytes(self) -> int:
        return sum(document.n_bytes for document in self.held_out)


def standard_library() -> list[Document]:
    """The source of the running interpreter's standard library, without its test suites and generated tables."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if STDLIB_SKIPPED.isdisjoint(relative.parts):
            try:
                documents.append(Document(relative.as_posix(), path.read_text(encoding="utf-8")))
            except (UnicodeDecodeError, OSError):
                continue
    if not documents:
        raise TextError(f"no standard library source under {root}: give text of your own")
    return documents


def read_documents(path: Path, exclude: Path | None = None) -> tuple[list[Document], list[str]]:
    """Read a text file, or every text file under a folder.

    In a folder, hidden files, files that are not UTF-8 text (or have a NUL byte), empty files and what lies under
    `exclude` are left out.

    Returns:
        The documents in order of their names, and the names of the files left out as empty or not text.

    Raises:
        TextError: the path is missing, is a file that is not UTF-8 text, or has nothing to read.
    """
    if not path.exists():
        raise TextError(f"{path} does not exist")
    if path.is_file():
        documents = [Document(path.name, _decode(path, _read(path)))]
        if not documents[0].text.strip():
            raise TextError(f"{path} is empty")
        return documents, []
    documents, skipped = [], []
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        relative = file.relative_to(path)
        if any(part.startswith(".") for part in relative.parts):
            continue
        if exclude is not None and file.resolve().is_relative_to(exclude.resolve()):
            continue
        data = _read(file)
        try:
            text = _decode(file, data)
        except TextError:
            text = ""
        if text.strip():
            documents.append(Document(relative.as_posix(), text))
        else:
            skipped.append(relative.as_posix())
    if not documents:
        raise TextError(f"{path} has no UTF-8 text file in it")
    return documents, skipped


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TextError(f"{path} cannot be read: {error.strerror}") from error


def _decode(path: Path, data: bytes) -> str:
    if b"\0" in data:
        raise TextError(f"{path} is not text: it has NUL bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TextError(
            f"{path} is not UTF-8 text (byte {error.start} is {data[error.start]:#04x}): convert it or leave it out"
        ) from None


def build_corpus(
    documents: Sequence[Document],
    source: str,
    *,
    skipped: Sequence[str] = (),
    held_out_share: float = 0.05,
    held_out_max_bytes: int = 250_000,
    min_bytes: int = 0,
    max_bytes: int | None = None,
) -> Corpus:
    """Split documents into a training and a held-out part.

    Of more than `max_bytes` bytes, documents are taken in the order of a hash of their names up to that size, the last
    one cut at a line.

    Whole files are held out, in the order of a hash of their names, until `held_out_share` of the bytes (at most
    about `held_out_max_bytes`) is reached. Where that is impossible (a single file, or one file that is nearly all
    of the text), the end of every document is held out instead.

    Raises:
        TextError: all documents together have fewer than `min_bytes` bytes.
    """
    total = sum(document.n_bytes for document in documents)
    if total < min_bytes:
        raise TextError(f"{source} has {total:,} bytes of text; at least {min_bytes:,} are needed to learn from")
    if max_bytes is not None and total > max_bytes:
        documents = _sample(documents, max_bytes)
        source = f"{source} ({max_bytes / 1e6:.0f} of its {total / 1e6:.0f} MB)"
        total = sum(document.n_bytes for document in documents)
    wanted = min(int(total * held_out_share), held_out_max_bytes)

    held_out: list[Document] = []
    size = 0
    for document in sorted(documents, key=_shuffle_key):
        # A file past four times the wanted size would starve training or stretch the evaluation.
        if size < wanted and size + document.n_bytes <= 4 * wanted:
            held_out.append(document)
            size += document.n_bytes
    if held_out and size >= wanted // 2:
        names = {document.name for document in held_out}
        train = [document for document in documents if document.name not in names]
        held_out.sort(key=lambda d: d.name)
        split = f"by file: {len(held_out)} of {len(documents)} files held out"
    else:
        share = wanted / total
        train, held_out = [], []
        for document in documents:
            cut = _line_start(document.text, int(len(document.text) * (1 - share)))
            train.append(Document(document.name, document.text[:cut]))
            if document.text[cut:]:
                held_out.append(Document(document.name + "#end", document.text[cut:]))
        split = f"too few files to hold whole ones out: the last {share:.0%} of each file held out"

    digest = hashlib.sha256()
    for document in sorted(documents, key=lambda d: d.name):
        for part in (document.name, document.text):
            encoded = part.encode("utf-8")
            digest.update(len(encoded).to_bytes(8, "little"))
            digest.update(encoded)
    return Corpus(source, tuple(train), tuple(held_out), split, digest.hexdigest(), tuple(skipped))


def _shuffle_key(document: Document) -> bytes:
    return hashlib.sha256(document.name.encode("utf-8")).digest()


def _sample(documents: Sequence[Document], max_bytes: int) -> list[Document]:
    chosen, left = [], max_bytes
    for document in sorted(documents, key=_shuffle_key):
        if document.n_bytes > left:
            text = document.text.encode("utf-8")[:left].decode("utf-8", errors="ignore")
            chosen.append(Document(document.name, text[: _line_start(text, len(text))]))
            break
        chosen.append(document)
        left -= document.n_bytes
    return sorted((d for d in chosen if d.text), key=lambda d: d.name)


def _line_start(text: str, position: int) -> int:
    """The start of the line that contains `position`, or `position` itself where that would be the text's start."""
    start = text.rfind("\n", 0, position) + 1
    return start or position
