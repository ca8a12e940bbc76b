"""What a filter and its controls take from a pool of [`make_pool`]."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..filtering.ngram_model import NgramModel
from ..filtering.pipeline import filter_text
from ..filtering.plan import FilterSettings, usual_stages


FILTER, ALL, RANDOM = "filter", "all", "random"
STAGES = {
    FILTER: usual_stages(True, False, False),
    "duplicates dropped": ("exact", "near"),
    "entropy": ("exact", "entropy"),
}
MIDDLE, CLEAN = "middle perplexity", "clean by provenance"
CHOICES = (FILTER, ALL, RANDOM, *(name for name in STAGES if name != FILTER), MIDDLE, CLEAN)


class Choices:
    """Texts of a pool, in an order drawn once, and the part of them that each of `CHOICES` takes.

    Args:
        pool: folder of [`make_pool`].
        output: folder for the filter's runs.
        keep: share of the pool's bytes that the filter, the random part and the middle take.
    """

    def __init__(self, pool: Path, output: Path, keep: float):
        self.pool, self.output, self.keep = pool, output, keep
        self.rows = read_lines(sorted((pool / "pool").glob("*.jsonl")))
        random.Random(1).shuffle(self.rows)
        self.texts: list[str] = [row["text"] for row in self.rows]
        self.budget = keep * sum(len(text.encode("utf-8")) for text in self.texts)

    @property
    def sample(self) -> list[str]:
        """A twentieth of the pool."""
        return self.texts[: -(-len(self.texts) // 20)]

    def take(self, choice: str) -> list[str]:
        """The texts of a choice."""
        if choice in STAGES:
            return self._filtered(choice)
        if choice == MIDDLE:
            model = NgramModel.train([text.encode("utf-8") for text in self.sample])
            scores = model.bits_per_byte(text.encode("utf-8") for text in self.texts)
            ordered = [text for _, text in sorted(zip(scores, self.texts, strict=True))]
            sizes = [len(text.encode("utf-8")) for text in ordered]
            before, skipped = 0, 0
            while before < (sum(sizes) - self.budget) / 2:
                before += sizes[skipped]
                skipped += 1
            return self._first(ordered[skipped:])
        if choice == CLEAN:
            clean = set(json.loads((self.pool / "pool.json").read_text(encoding="utf-8"))["clean"])
            return self._first(row["text"] for row in self.rows if row["kind"] in clean)
        return self._first(self.texts) if choice == RANDOM else self.texts

    def _first(self, texts: Iterable[str]) -> list[str]:
        """As many as are within the budget."""
        left, taken = self.budget, []
        for text in texts:
            left -= len(text.encode("utf-8"))
            if left < 0:
                break
            taken.append(text)
        return taken

    def _filtered(self, choice: str) -> list[str]:
        import pyarrow.parquet as pq

        settings = FilterSettings(keep=self.keep if choice == FILTER else None, stages=STAGES[choice])
        seed = [] if choice == "duplicates dropped" else [self.pool / "seed"]
        filter_text([self.pool / "pool"], self.output / choice, settings, seed_text=seed)
        files = sorted((self.output / choice).glob("kept/*.parquet"))
        return [text for file in files for text in pq.read_table(file, columns=["text"])["text"].to_pylist()]


def read_lines(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The rows of JSONL files."""
    rows = []
    for path in paths:
        with path.open(encoding="utf-8") as file:
            rows += [json.loads(line) for line in file]
    return rows
