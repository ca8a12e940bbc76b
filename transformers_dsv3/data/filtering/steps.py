"""The stages as datatrove's pipeline steps: they run wherever its executors do.

Each reads a shard of the input again and writes one small file about its documents, whole: nothing is half done when a
task is killed, and a text is copied once, at the end.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from ...files import write_json
from .inputs import Columns, InputFile, Row, domain_of, read_rows
from .plan import FilterPlan, load_table, save_table
from .seed import UNKNOWN, Seed
from .statistics import exact_hash, statistics_of


# sha1, since datatrove's xxhash functions fail with xxhash 4
MINHASH = MinhashConfig(hash_config=HashConfig(precision=64, hash_fc="sha1"))
# Of longer documents so many characters have the signature
SIGNED = 400_000
LANGUAGE_BYTES = 50_000
TOKENIZED = 200_000  # characters at once
EXACT = np.dtype([("first", "<u8"), ("second", "<u8"), ("place", "<i4")])
DUPLICATE = np.dtype([("shard", "<i4"), ("place", "<i4"), ("of_shard", "<i4"), ("of_place", "<i4")])


class Words(WordTokenizer):
    """Words of any script without a model: those of letters, and each character of Chinese and Japanese by itself."""

    WORD = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")

    def word_tokenize(self, text: str) -> list[str]:
        return self.WORD.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return text.splitlines()

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in self.WORD.finditer(text)]


class _Timed:
    """CPU seconds and bytes of a task, for the report's rates."""

    def __init__(self) -> None:
        self.start, self.bytes = time.process_time(), 0

    def save(self, plan: FilterPlan, stage: str, rank: int) -> None:
        path = plan.path("rates", f"{stage}-{rank:05d}.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"seconds": time.process_time() - self.start, "bytes": self.bytes})


class InputReader(PipelineStep):
    """Reads the documents of a shard; each knows its place in it."""

    type = "📖 - READER"
    name = "files of any kind"

    def __init__(self, shards: list[list[InputFile]], columns: Columns):
        super().__init__()
        self.shards, self.columns = shards, columns

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for place, row in enumerate(read_rows(self.shards[rank], self.columns)):
            yield Document(row.text, row.id, metadata={**row.metadata, "place": place})


class _OfPlan(PipelineStep):
    """A step of a filtering run."""

    def __init__(self, plan: FilterPlan):
        super().__init__()
        self.plan = plan


class HashDocuments(_OfPlan):
    """First stage: a hash of each document's normalised text, and what of the shard could not be read."""

    type = "🫂 - DEDUP"
    name = "exact hashes"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        timed = _Timed()
        skipped: list[tuple[str, int | None, str]] = []
        hashes: list[bytes] = []
        n_bytes = 0
        for row in read_rows(self.plan.shards[rank], self.plan.settings.columns, lambda *what: skipped.append(what)):
            hashes.append(exact_hash(row.text))
            n_bytes += len(row.text.encode("utf-8"))
        rows: np.ndarray = np.zeros(len(hashes), dtype=EXACT)
        both = np.frombuffer(b"".join(hashes), dtype="<u8").reshape(-1, 2)
        rows["first"], rows["second"], rows["place"] = both[:, 0], both[:, 1], np.arange(len(hashes))
        rows.sort(order=("first", "second", "place"))
        save_table(self.plan.path("exact", f"{rank:05d}.npz"), {"skipped": skipped, "bytes": n_bytes}, rows=rows)
        timed.bytes = n_bytes
        timed.save(self.plan, "exact", rank)


class FindExactDuplicates(_OfPlan):
    """Second stage: of documents with the same hash, all but the first; one task a range of hashes."""

    type = "🫂 - DEDUP"
    name = "exact duplicates"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        low, high = (np.uint64(min((1 << 64) - 1, (1 << 64) * part // world_size)) for part in (rank, rank + 1))
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        for shard in range(len(self.plan.shards)):
            rows = load_table(self.plan.path("exact", f"{shard:05d}.npz"))[1]["rows"]
            end = len(rows) if rank + 1 == world_size else int(np.searchsorted(rows["first"], high))
            part = rows[int(np.searchsorted(rows["first"], low)) : end]
            parts.append((part, np.full(len(part), shard, dtype=np.int32)))
        rows = np.concatenate([part for part, _ in parts])
        shards = np.concatenate([numbers for _, numbers in parts])
        order = np.lexsort((rows["place"], shards, rows["second"], rows["first"]))
        rows, shards = rows[order], shards[order]
        same: np.ndarray = np.zeros(len(rows), dtype=bool)
        same[1:] = (rows["first"][1:] == rows["first"][:-1]) & (rows["second"][1:] == rows["second"][:-1])
        # The first of each run of equal ones
        first = np.maximum.accumulate(np.where(same, 0, np.arange(len(rows))))
        found: np.ndarray = np.zeros(int(same.sum()), dtype=DUPLICATE)
        found["shard"], found["place"] = shards[same], rows["place"][same]
        found["of_shard"], found["of_place"] = shards[first[same]], rows["place"][first[same]]
        found.sort(order=("shard", "place"))
        save_table(self.plan.path("duplicates", f"{rank:05d}.npz"), {}, rows=found)


def exact_duplicates(plan: FilterPlan, shard: int) -> dict[int, tuple[int, int]]:
    """By a document's place in a shard, shard and place of the one that it repeats."""
    found = {}
    for path in sorted(plan.path("duplicates", "").glob("*.npz")):
        rows = load_table(path)[1]["rows"]
        for row in rows[np.searchsorted(rows["shard"], shard) : np.searchsorted(rows["shard"], shard, side="right")]:
            found[int(row["place"])] = (int(row["of_shard"]), int(row["of_place"]))
    return found


class Judge:
    """What all stages but the duplicates' say of one document."""

    def __init__(self, plan: FilterPlan):
        self.plan, self.settings = plan, plan.settings
        folder = plan.path("seed", "")
        self.seed = Seed.load(folder) if (folder / "seed.json").exists() else None
        self.decontaminate = None
        if "contamination" in self.settings.stages:
            from .decontamination import contamination_filter

            self.decontaminate = contamination_filter(plan.path("contamination", ""), Words("any"))
        self._tokenizer: Any = None

    def tokens(self, text: str, n_bytes: int) -> int:
        if self.settings.tokenizer is None:
            return -(-n_bytes // 4)
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(self.settings.tokenizer)
        pieces = [text[start : start + TOKENIZED] for start in range(0, len(text), TOKENIZED)] or [""]
        return sum(map(len, self._tokenizer(pieces, add_special_tokens=False, verbose=False)["input_ids"]))

    def domain(self, row: Row, data: bytes) -> str:
        known = [] if self.seed is None else self.seed.nearest.domains
        said = domain_of(row, self.settings.columns, known)
        if said is not None:
            return said
        return "text" if self.seed is None else self.seed.nearest(data)

    def reason(self, row: Row, data: bytes, domain: str) -> tuple[str, str, str] | None:
        """Stage, reason and what else there is to say, of the first stage that drops the document."""
        stages = self.settings.stages
        if not row.text.strip():
            return "entropy", "empty", ""
        if len(data) < self.settings.min_bytes:
            return "entropy", "too short", ""
        if self.seed is not None and "entropy" in stages and (reason := self.seed.bounds.entropy_reason(data)):
            return "entropy", reason, ""
        if self.seed is not None and "statistics" in stages:
            reason = self.seed.bounds.reason(domain, statistics_of(row.text))
            if reason is not None:
                return "statistics", reason, ""
        if self.decontaminate is not None:
            document = Document(row.text, row.id)
            if self.decontaminate.filter(document) is not True:
                said = document.metadata
                return "contamination", f"in {said['contaminated_task']}", said["contaminated_ngram"]
        return None


def language_of(data: bytes) -> str:
    """The language by Compact Language Detector 2, such as `en`; `UNKNOWN` where it is not sure."""
    import pycld2

    try:
        sure, _, found = pycld2.detect(data[:LANGUAGE_BYTES].decode("utf-8", "ignore"), bestEffort=True)
    except (pycld2.error, ValueError):  # characters that no text has
        return UNKNOWN
    return found[0][1] if sure and found[0][1] != "un" else UNKNOWN


class Measure(_OfPlan):
    """Third stage: domain, language, tokens and n-gram score of each document that is no exact duplicate, and why the
    cheap stages drop it. What they leave goes on, to the signatures.
    """

    type = "🔻 - FILTER"
    name = "entropy, statistics, contamination, n-grams"

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        timed, judge = _Timed(), Judge(self.plan)
        repeated = exact_duplicates(self.plan, rank)
        groups: dict[str, int] = {}
        reasons: dict[tuple[str, str], int] = {("", ""): 0}
        details: dict[int, str] = {}
        rows: list[tuple[int, int, int, int, int, float]] = []
        for document in data:
            place = document.metadata.pop("place")
            if place in repeated:
                continue
            row = Row(document.text, document.id, document.metadata)
            encoded = row.text.encode("utf-8")
            timed.bytes += len(encoded)
            domain = judge.domain(row, encoded)
            language = language_of(encoded)
            group = groups.setdefault(f"{domain}/{language}", len(groups))
            dropped = judge.reason(row, encoded, domain)
            bits = float("nan")
            if dropped is None and judge.seed is not None and "ngram" in self.plan.settings.stages:
                bits = next(judge.seed.model.bits_per_byte([encoded]))
                least, most = judge.seed.bits_of(domain, language)
                if bits < least:
                    dropped = ("ngram", "too predictable", "")
                elif bits > most:
                    dropped = ("ngram", "in no known language, and unlike the seed", "")
            number = 0
            if dropped is not None:
                number = reasons.setdefault(dropped[:2], len(reasons))
                if dropped[2]:
                    details[place] = dropped[2]
                self.stat_update(f"dropped_{dropped[1]}")
            rows.append((place, judge.tokens(row.text, len(encoded)), len(encoded), group, number, bits))
            if dropped is None:
                yield document
        table = list(zip(*rows)) if rows else [()] * 6
        types = ("i4", "i8", "i8", "i4", "i4", "f8")
        arrays = {
            name: np.array(column, dtype=kind)
            for name, column, kind in zip(("place", "tokens", "bytes", "group", "reason", "bits"), table, types)
        }
        told = {"groups": list(groups), "reasons": list(reasons), "details": details}
        save_table(self.plan.path("measured", f"{rank:05d}.npz"), told, **arrays)
        timed.save(self.plan, "measure", rank)


class Signatures(MinhashDedupSignature):
    """datatrove's MinHash signatures, in bounded memory: datatrove's own hold 900 bytes a word of a document."""

    def get_shingles(self, text: str) -> np.ndarray:
        return super().get_shingles(text[:SIGNED])

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        least = None
        for first in range(0, len(shingles), 4096):
            part = np.array(super().get_signature(shingles[first : first + 4096]), dtype=np.uint64)
            least = part if least is None else np.minimum(least, part)
        return [] if least is None else least.tolist()


def signatures(plan: FilterPlan) -> Signatures:
    return Signatures(str(plan.path("signatures", "")), config=MINHASH, language=Words("any"))


class ScoreByModel(_OfPlan):
    """The stage `model`: what a DSv3 needs for the documents that the n-gram scores leave, in bits a byte."""

    type = "🔻 - FILTER"
    name = "perplexity of a model"

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        from .model_scorer import ModelScorer

        timed = _Timed()
        chosen = load_table(self.plan.path("candidates", f"{rank:05d}.npz"))[1]["place"]
        wanted, scorer = set(chosen.tolist()), ModelScorer(str(self.plan.settings.scorer))
        scores = []
        for document in data:
            if document.metadata["place"] in wanted:
                scores.append((document.metadata["place"], scorer(document.text)))
                timed.bytes += len(document.text.encode("utf-8"))
        places, bits = zip(*scores) if scores else ((), ())
        arrays = {"place": np.array(places, dtype=np.int32), "bits": np.array(bits, dtype=np.float64)}
        save_table(self.plan.path("scored", f"{rank:05d}.npz"), {}, **arrays)
        timed.save(self.plan, "model", rank)


class WriteShards(_OfPlan):
    """Last stage: every document of a shard, its text unchanged, in a file of its domain or in that of the dropped."""

    type = "💾 - WRITER"
    name = "kept and dropped"

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        from .outputs import ShardWriter

        timed = _Timed()
        fates, columns = load_table(self.plan.path("fates", f"{rank:05d}.npz"))
        place_of = {int(place): row for row, place in enumerate(columns["place"])}
        repeated = exact_duplicates(self.plan, rank)
        with ShardWriter(self.plan.output, rank) as writer:
            for document in data:
                metadata = dict(document.metadata)
                place = metadata.pop("place")
                size = len(document.text.encode("utf-8"))
                timed.bytes += size
                row: dict[str, Any] = {
                    "text": document.text,
                    "id": document.id,
                    "file": metadata.pop("file"),
                    "shard": rank,
                    "place": place,
                    "bytes": size,
                    "metadata": json.dumps(metadata, ensure_ascii=False, sort_keys=True, default=str),
                }
                if place in repeated:
                    of = "/".join(map(str, repeated[place]))
                    writer.drop({**row, "stage": "exact", "reason": "exact duplicate", "detail": of})
                    continue
                at = place_of[place]
                domain, _, language = fates["groups"][columns["group"][at]].rpartition("/")
                row |= {"domain": domain, "language": language, "tokens": int(columns["tokens"][at])}
                for name in ("ngram_bits_per_byte", "model_bits_per_byte"):
                    value = float(columns[name][at])
                    row[name] = value if np.isfinite(value) else None
                stage, reason = fates["reasons"][columns["reason"][at]]
                if stage:
                    detail = fates["details"].get(str(place), "")
                    writer.drop({**row, "stage": stage, "reason": reason, "detail": detail})
                else:
                    writer.keep(row)
        timed.save(self.plan, "write", rank)


def rates(plan: FilterPlan) -> dict[str, float]:
    """Bytes a second of a core by stage, of what ran."""
    seconds: dict[str, float] = {}
    sizes: dict[str, int] = {}
    for path in sorted(Path(plan.path("rates", "")).glob("*.json")):
        told = json.loads(path.read_text(encoding="utf-8"))
        stage = path.name.rpartition("-")[0]
        seconds[stage] = seconds.get(stage, 0.0) + told["seconds"]
        sizes[stage] = sizes.get(stage, 0) + told["bytes"]
    return {stage: sizes[stage] / seconds[stage] for stage in seconds if seconds[stage] > 0}
