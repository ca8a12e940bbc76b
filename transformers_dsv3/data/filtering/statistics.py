"""What is counted of a document without a model, and the bounds that a clean seed sets for it, domain by domain."""

from __future__ import annotations

import hashlib
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


# Of longer documents the statistics are those of so many characters, from three places
SAMPLE = 60_000
# The entropy of fewer bytes says more about their number than about the text
ENTROPY_BYTES = 400
COMPRESSED_BYTES = 600  # the like of compression
WHITESPACE = re.compile(r"\s+")
WORD = re.compile(r"\w+")
# Parts of a line without a space, of ASCII: what is written in Chinese or Thai has none anywhere
UNBROKEN = re.compile(r"[!-~]{120,}")
TAG = re.compile(r"</?[A-Za-z][^<>\n]{0,400}>|&[a-z]{2,8};")
# UTF-8 that was read as Latin-1 or Windows-1252, and characters that were lost
MOJIBAKE = re.compile("[\u00c2\u00c3][\u0080-\u00bf\u2010-\u2122]|\u00e2\u20ac|\u00e2\u0080|\u00ef\u00bf\u00bd|\ufffd")
LEGAL = re.compile(
    r"licen[sc]e|copyright|warrant|liab(?:le|ility)|redistribut|permission|hereby|disclaim|merchantab|infring|cookie|"
    r"privacy policy|terms of (?:use|service)|all rights reserved|subscribe",
    re.IGNORECASE,
)
# Numbers, sums in hexadecimal, versions, hours: what logs, lock files and tables are made of
FIGURES = re.compile(r"\b(?:[0-9a-fA-F]*\d[0-9a-fA-F]*|\d[\d.:/,-]*)\b")

# Reasons by statistic, in the order in which they are asked; a larger value is worse
REASONS = {
    "mojibake": "mojibake",
    "unbroken": "long runs without a space",
    "markup": "markup",
    "figures": "figures",
    "legal": "legal text and notices",
    "repeated_lines": "repeated lines",
    "repeated_words": "repeated words",
    "redundancy": "compresses too well",
}


def exact_hash(text: str) -> bytes:
    """16 bytes that texts share which differ in spaces and Unicode's ways to write a letter at most."""
    plain = WHITESPACE.sub(" ", unicodedata.normalize("NFKC", text)).strip()
    return hashlib.blake2b(plain.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def byte_entropy(data: bytes) -> float:
    """Entropy of a document's bytes, each by itself, in bits."""
    counts = np.bincount(np.frombuffer(data, dtype=np.uint8), minlength=256)
    shares = counts[counts > 0] / max(1, len(data))
    return float(-(shares * np.log2(shares)).sum())


def statistics_of(text: str) -> dict[str, float]:
    """The statistics of `REASONS`, from 0 to about 1."""
    if len(text) > SAMPLE:
        third, last = SAMPLE // 3, len(text) - SAMPLE // 3
        text = "\n".join((text[:third], text[(last - third) // 2 :][:third], text[last:]))
    length = max(1, len(text))
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    said: Counter[str] = Counter(lines)
    words = WORD.findall(text.lower())
    triples = Counter(zip(words, words[1:], words[2:]))
    figures = sum(len(match) for match in FIGURES.findall(text))
    solid = max(1, sum(map(len, lines)))
    data = text.encode("utf-8")
    return {
        "mojibake": min(1.0, 50 * len(MOJIBAKE.findall(text)) / length),
        "unbroken": sum(map(len, UNBROKEN.findall(text))) / length,
        "markup": sum(map(len, TAG.findall(text))) / length,
        "figures": figures / solid,
        "legal": min(1.0, 10 * len(LEGAL.findall(text)) / max(60, len(words))),
        "repeated_lines": sum(len(line) * (times - 1) for line, times in said.items()) / solid,
        "repeated_words": sum(times - 1 for times in triples.values()) / max(30, sum(triples.values())),
        "redundancy": max(0.0, 1 - len(zlib.compress(data, 1)) / len(data)) if len(data) >= COMPRESSED_BYTES else 0.0,
    }


@dataclass(frozen=True)
class Bounds:
    """What documents may have, as the clean documents of a seed do.

    Attributes:
        entropy: least and most, in bits a byte.
        most: by domain, the largest value of each statistic; "" for domains that the seed has not.
    """

    entropy: tuple[float, float]
    most: Mapping[str, Mapping[str, float]]

    @classmethod
    def learn(cls, entropies: Sequence[float], statistics: Mapping[str, Sequence[Mapping[str, float]]]) -> Bounds:
        """From the seed's documents: beyond nearly all of them, and a quarter and a little more.

        Args:
            entropies: of documents that are long enough to have one.
            statistics: of each domain's documents.
        """
        low, high = np.quantile(entropies, [0.002, 0.998]) if len(entropies) else (0.0, 8.0)
        most = {domain: _most(documents) for domain, documents in statistics.items()}
        most[""] = {name: max(of[name] for of in most.values()) for name in REASONS}
        return cls((float(low) - 0.3, float(high) + 0.3), most)

    def entropy_reason(self, data: bytes) -> str | None:
        if len(data) < ENTROPY_BYTES:
            return None
        entropy = byte_entropy(data)
        if entropy < self.entropy[0]:
            return "low entropy"
        return "high entropy" if entropy > self.entropy[1] else None

    def most_of(self, domain: str) -> Mapping[str, float]:
        """The largest value of each statistic that documents of a domain may have."""
        return self.most.get(domain, self.most[""])

    def reason(self, domain: str, values: Mapping[str, float]) -> str | None:
        """Why a document is dropped for its statistics, or None."""
        most = self.most_of(domain)
        return next((REASONS[name] for name in REASONS if values[name] > most[name]), None)


def _most(documents: Sequence[Mapping[str, float]]) -> dict[str, float]:
    slack = {"mojibake": 0.05, "unbroken": 0.05, "markup": 0.05, "legal": 0.15}
    most = {}
    for name in REASONS:
        bound = float(np.quantile([values[name] for values in documents], 0.99, method="higher"))
        most[name] = bound + (1 - bound) / 4 if name == "redundancy" else 1.25 * bound + slack.get(name, 0.08)
    return most
