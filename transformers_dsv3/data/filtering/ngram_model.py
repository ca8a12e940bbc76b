"""A byte 6-gram model (Witten-Bell smoothing, IEEE TIT 37(4), 1991): what text costs in bits a byte, in any language.

Contexts of two to five bytes are looked up in hashed tables. These have, for each context, the weight of the next
shorter one, and for each context with the byte behind it, that byte's share of the rest, with 16 more bits of the
hash, since what was never seen must not be found:

    P_k(b | context of k) = share(context, b) + weight(context) * P_(k-1)(b | context of k - 1)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np


ORDERS = (2, 3, 4, 5)  # bytes of hashed contexts; those of none and one are exact
MULTIPLIERS = {k: np.uint64(0x9E3779B97F4A7C15 + 2 * k * 0x5851F42D4C957F2D & (1 << 64) - 1 | 1) for k in range(2, 7)}
GAP = b"\n" * 6  # before each document: what it costs does not depend on the one before it
BATCH_BYTES = 1 << 20
ONE = np.uint32(1)  # of the tables' own type, with which numpy adds without a detour


def _windows(data: np.ndarray) -> np.ndarray:
    """Of each byte, it and the five before it as one number, the byte itself lowest: uint64."""
    value: np.ndarray = data.astype(np.uint64)
    windows = value.copy()
    for back in range(1, 6):
        windows[back:] |= value[:-back] << np.uint64(8 * back)
    return windows


def _slots(windows: np.ndarray, n_bytes: int, bits: int, skip: int) -> np.ndarray:
    """Places in a table of 2**bits for the lowest `n_bytes` bytes behind the lowest `skip`: int64."""
    return (_hashes(windows, n_bytes, bits, skip) >> np.uint64(16)).view(np.int64)


def _hashes(windows: np.ndarray, n_bytes: int, bits: int, skip: int) -> np.ndarray:
    """The same, with 16 more bits of the hash below: uint64."""
    kept = (windows >> np.uint64(8 * skip)) & np.uint64((1 << (8 * n_bytes)) - 1)
    return (kept + np.uint64(1)) * MULTIPLIERS[n_bytes] >> np.uint64(48 - bits)


class NgramModel:
    """See the top of this file.

    Args:
        bigram: `(256 * 256,)`, probabilities of a byte behind one byte.
        weights: by the bytes of the context, fp32 `(2**bits,)`.
        shares: the same, uint32: the share as a 65,535th part, and above it 16 bits of the hash.
    """

    def __init__(self, bigram: np.ndarray, weights: dict[int, np.ndarray], shares: dict[int, np.ndarray]):
        self.bigram, self.weights, self.shares = bigram, weights, shares
        self.bits = len(next(iter(weights.values()))).bit_length() - 1

    @classmethod
    def train(cls, texts: Sequence[bytes], bits: int | None = None) -> NgramModel:
        """Train on documents, which are read twice.

        Args:
            bits: of the tables' size; by the size of the text where not given.
        """
        total = sum(len(text) for text in texts)
        bits = bits or min(24, max(16, (2 * total).bit_length()))
        pairs: np.ndarray = np.zeros(1 << 16)
        counts: dict[int, np.ndarray] = {k: np.zeros(1 << bits, dtype=np.uint32) for k in ORDERS}
        seen: dict[int, np.ndarray] = {k: np.zeros(1 << bits, dtype=np.uint32) for k in ORDERS}
        kinds: dict[int, np.ndarray] = {k: np.zeros(1 << bits, dtype=np.uint32) for k in ORDERS}
        scratch: np.ndarray = np.zeros(1 << bits, dtype=np.int32)
        for windows in _batches_of_windows(texts):
            pairs += np.bincount((windows & np.uint64(0xFFFF)).view(np.int64), minlength=1 << 16)
            places: np.ndarray = np.arange(len(windows), dtype=np.int32)
            for k in ORDERS:
                context = _slots(windows, k, bits, 1)
                following = _slots(windows, k + 1, bits, 0)
                # One place for each pair that was not there before this batch
                scratch[following] = places
                new = (scratch[following] == places) & (counts[k][following] == 0)
                np.add.at(kinds[k], context[new], ONE)
                np.add.at(counts[k], following, ONE)
                np.add.at(seen[k], context, ONE)
        shares: dict[int, np.ndarray] = {k: np.zeros(1 << bits, dtype=np.uint32) for k in ORDERS}
        for k in ORDERS:  # a context that shares all its slots with others has a kind too
            np.maximum(kinds[k], seen[k] > 0, out=kinds[k])
        for windows in _batches_of_windows(texts):
            for k in ORDERS:
                context, hashes = _slots(windows, k, bits, 1), _hashes(windows, k + 1, bits, 0)
                following = (hashes >> np.uint64(16)).view(np.int64)
                share = counts[k][following] / (seen[k][context] + kinds[k][context])
                share = np.minimum(np.rint(share * 65_535), 65_535).astype(np.uint32)
                shares[k][following] = hashes.astype(np.uint32) << np.uint32(16) | share
        weights: dict[int, np.ndarray] = {k: np.ones(1 << bits, dtype=np.float32) for k in ORDERS}
        for k in ORDERS:
            used = seen[k] > 0
            weights[k][used] = (kinds[k][used] / (seen[k][used] + kinds[k][used])).astype(np.float32)
        return cls(_bigram(pairs), weights, shares)

    def save(self, folder: Path) -> None:
        """Write the tables, one file each, which `load` maps: workers share them."""
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / "bigram.npy", self.bigram)
        for k in ORDERS:
            np.save(folder / f"weights{k}.npy", self.weights[k])
            np.save(folder / f"shares{k}.npy", self.shares[k])

    @classmethod
    def load(cls, folder: Path) -> NgramModel:
        tables = [
            {k: np.load(folder / f"{name}{k}.npy", mmap_mode="r") for k in ORDERS} for name in ("weights", "shares")
        ]
        return cls(np.load(folder / "bigram.npy"), *tables)

    def bits_of(self, windows: np.ndarray) -> np.ndarray:
        """What each byte costs, in bits: fp32."""
        probability = self.bigram[(windows & np.uint64(0xFFFF)).view(np.int64)]
        for k in ORDERS:
            probability *= self.weights[k][_slots(windows, k, self.bits, 1)]
            hashes = _hashes(windows, k + 1, self.bits, 0)
            found = self.shares[k][(hashes >> np.uint64(16)).view(np.int64)]
            same = (found >> np.uint32(16)) == (hashes.astype(np.uint32) & np.uint32(0xFFFF))
            probability += (found & np.uint32(0xFFFF)) * (same * np.float32(1 / 65_535))
        return -np.log2(np.minimum(probability, 1.0))

    def bits_per_byte(self, texts: Iterable[bytes]) -> Iterator[float]:
        """Of each document, each by itself: the same whatever is scored beside it. 0 for an empty one."""
        for batch in _batches(texts):
            total = dict.fromkeys(range(len(batch)), 0.0)
            for joined, parts in _joined(batch):
                bits = self.bits_of(_windows(joined))
                for number, start, end in parts:
                    total[number] += float(bits[start:end].sum(dtype=np.float64))
            yield from (total[number] / max(1, len(text)) for number, text in enumerate(batch))


def _bigram(pairs: np.ndarray) -> np.ndarray:
    """Probabilities of a byte behind another, smoothed by those of bytes, and these by equal ones: fp32 `(65536,)`."""
    table = pairs.reshape(256, 256)  # [byte before, byte]
    single = table.sum(0)
    kinds, total = (single > 0).sum(), single.sum()
    unigram = (single + kinds / 256) / max(1, total + kinds)
    kinds, total = (table > 0).sum(1, keepdims=True), table.sum(1, keepdims=True)
    probability = np.where(total > 0, (table + kinds * unigram) / np.maximum(1, total + kinds), unigram)
    return probability.reshape(-1).astype(np.float32)


def _batches(texts: Iterable[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _joined(batch: list[bytes]) -> Iterator[tuple[np.ndarray, list[tuple[int, int, int]]]]:
    """Documents laid end to end with gaps, of about `BATCH_BYTES` at most, and where which document's bytes are.

    A longer document is cut, each part with the five bytes before it.
    """
    pieces: list[bytes] = []
    parts: list[tuple[int, int, int]] = []
    size = 0
    for number, text in enumerate(batch):
        for first in range(0, len(text), BATCH_BYTES):
            if size and size + min(len(text) - first, BATCH_BYTES) > 2 * BATCH_BYTES:
                yield np.frombuffer(b"".join(pieces), dtype=np.uint8), parts
                pieces, parts, size = [], [], 0
            before = GAP if first == 0 else text[first - 6 : first]
            piece = text[first : first + BATCH_BYTES]
            pieces += [before, piece]
            parts.append((number, size + len(before), size + len(before) + len(piece)))
            size += len(before) + len(piece)
    if pieces:
        yield np.frombuffer(b"".join(pieces), dtype=np.uint8), parts


def _batches_of_windows(texts: Sequence[bytes]) -> Iterator[np.ndarray]:
    for batch in _batches(texts):
        for joined, parts in _joined(batch):
            windows = _windows(joined)
            yield np.concatenate([windows[start:end] for _, start, end in parts])


class NearestDomain:
    """Which of several kinds of text a document is most like, by its trigrams of bytes (naive Bayes, hashed).

    Args:
        table: logarithms of probabilities, fp32 `(domains, 2**16)`.
    """

    BYTES = 16_384  # of a document are looked at

    def __init__(self, domains: list[str], table: np.ndarray):
        self.domains, self.table = domains, table

    @classmethod
    def train(cls, texts: dict[str, list[bytes]]) -> NearestDomain:
        rows = []
        for documents in texts.values():
            counts: np.ndarray = np.full(1 << 16, 0.1)
            for windows in _batches_of_windows(documents):
                counts += np.bincount(_slots(windows, 3, 16, 0), minlength=1 << 16)
            rows.append(np.log(counts / counts.sum()))
        return cls(list(texts), np.array(rows, dtype=np.float32))

    def __call__(self, text: bytes) -> str:
        if len(self.domains) == 1 or not text:
            return self.domains[0]
        slots = _slots(_windows(np.frombuffer(text[: self.BYTES], dtype=np.uint8)), 3, 16, 0)
        return self.domains[int(self.table[:, slots].sum(1).argmax())]
