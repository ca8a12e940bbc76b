"""What a small clean text teaches a filter: bounds of statistics, an n-gram model, what its domains look like."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...files import write_json
from ...option_error import OptionError
from .inputs import Columns, Row, find_files, read_rows
from .ngram_model import NearestDomain, NgramModel
from .statistics import ENTROPY_BYTES, Bounds, byte_entropy, exact_hash, statistics_of


# Less teaches nothing; more is read and not needed
LEAST_BYTES, MOST_BYTES = 50_000, 64_000_000
UNKNOWN = "und"  # the language of text that is in none, or in one that is not known


@dataclass(frozen=True)
class Seed:
    """See the top of this file.

    Attributes:
        shares: of each domain in the seed's bytes.
        quantiles: of each domain, bits a byte of its documents by a model of the other half of the seed: 1, 50, 99 %.
    """

    bounds: Bounds
    model: NgramModel
    nearest: NearestDomain
    shares: dict[str, float]
    quantiles: dict[str, list[float]]

    def bits_of(self, domain: str, language: str) -> tuple[float, float]:
        """The fewest and the most bits a byte that text of a domain and a language may need.

        A language that the seed has not may need any number. What is in no known language and needs more than bytes
        drawn at random is encoded or broken.
        """
        fewest = min(self.quantiles.values(), key=lambda q: q[0])
        most = max(self.quantiles.values(), key=lambda q: q[2])
        least = 0.4 * self.quantiles.get(domain, fewest)[0]
        return least, max(8.0, 1.25 * self.quantiles.get(domain, most)[2]) if language == UNKNOWN else math.inf

    def save(self, folder: Path) -> None:
        """Write it; `seed.json`, the last of its files, says that all are there."""
        self.model.save(folder)
        np.save(folder / "nearest.npy", self.nearest.table)
        told = {
            "domains": self.nearest.domains,
            "entropy": self.bounds.entropy,
            "most": self.bounds.most,
            "shares": self.shares,
            "quantiles": self.quantiles,
        }
        write_json(folder / "seed.json", told)

    @classmethod
    def load(cls, folder: Path) -> Seed:
        told = json.loads((folder / "seed.json").read_text(encoding="utf-8"))
        return cls(
            Bounds(tuple(told["entropy"]), told["most"]),
            NgramModel.load(folder),
            NearestDomain(told["domains"], np.load(folder / "nearest.npy")),
            told["shares"],
            told["quantiles"],
        )


def read_seed(paths: Sequence[str | Path], columns: Columns) -> dict[str, list[str]]:
    """A seed's texts by domain: that of the column, or the first folder under a path, or else `text`.

    Raises:
        OptionError: it is missing, or has too little text.
    """
    files = find_files(paths, "--seed-text")
    texts: dict[str, list[str]] = {}
    seen: set[bytes] = set()
    size = 0
    skipped: list[tuple[str, int | None, str]] = []
    for row in read_rows(files, columns, lambda *what: skipped.append(what)):
        said = exact_hash(row.text)
        if size < MOST_BYTES and row.text.strip() and said not in seen:
            seen.add(said)
            texts.setdefault(_domain(row, columns), []).append(row.text)
            size += len(row.text.encode("utf-8"))
    if size < LEAST_BYTES or len(seen) < 10:
        left_out = f"; {len(skipped)} left out, {skipped[0][0]}: {skipped[0][2]}" if skipped else ""
        raise OptionError(
            "--seed-text", f"has {size:,} bytes in {len(seen)} documents: {LEAST_BYTES:,} in 10 are needed{left_out}"
        )
    return texts


def learn_seed(texts: dict[str, list[str]]) -> Seed:
    """Learn from a seed's texts by domain."""
    data = {domain: [text.encode("utf-8") for text in documents] for domain, documents in sorted(texts.items())}
    entropies = [byte_entropy(one) for of in data.values() for one in of if len(one) >= ENTROPY_BYTES]
    bounds = Bounds.learn(entropies, {d: [statistics_of(text) for text in of] for d, of in sorted(texts.items())})
    everything = [(domain, one) for domain, of in data.items() for one in of]
    scores: dict[str, list[float]] = {domain: [] for domain in data}
    for part in (0, 1):
        model = NgramModel.train([one for _, one in everything[1 - part :: 2]])
        held_out = everything[part::2]
        for (domain, _), bits in zip(held_out, model.bits_per_byte(one for _, one in held_out), strict=True):
            scores[domain].append(bits)
    total = sum(len(one) for _, one in everything)
    return Seed(
        bounds,
        NgramModel.train([one for _, one in everything]),
        NearestDomain.train(data),
        {domain: sum(map(len, of)) / total for domain, of in data.items()},
        {domain: np.quantile(of, [0.01, 0.5, 0.99]).tolist() for domain, of in scores.items()},
    )


def _domain(row: Row, columns: Columns) -> str:
    said: Any = row.metadata.get(columns.domain)
    if isinstance(said, str) and said:
        return said
    folder, _, rest = row.metadata["file"].partition("/")
    return folder if rest else "text"
