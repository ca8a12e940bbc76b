"""Ten kinds of junk and near duplicates, as crawls have them, made of real files where packages have such."""

from __future__ import annotations

import base64
import random
import re
import string
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

from .sources import pieces


# MB of each kind beside 24 MB of clean text
KINDS = {
    "near duplicate": 13.0,
    "licence": 14.0,
    "minified": 10.5,
    "log": 7.5,
    "html": 7.5,
    "table": 7.5,
    "shuffled": 7.5,
    "base64": 7.0,
    "markov": 5.5,
    "lock file": 5.5,
    "mojibake": 3.0,
}
_LEVELS = ("INFO", "DEBUG", "WARNING", "ERROR")


class Junk:
    """Makes junk.

    Args:
        folder: of the packages.
        clean: documents of the pool, by domain.
        rest: other text of these sources.
        seed: of what is drawn.
    """

    def __init__(self, folder: Path, clean: dict[str, list[str]], rest: dict[str, list[str]], seed: int = 0):
        self.folder, self.clean, self.rest = folder, clean, rest
        self.rng = random.Random(seed)
        self.words = sorted(set(re.findall(r"[a-z]{3,12}", " ".join(clean["prose"][:200]))))

    def documents(self, kind: str, n_bytes: float) -> Iterator[str]:
        """Documents of a kind, so many bytes of them, or as many as there are."""
        make: dict[str, Callable[[], Iterator[str]]] = {
            "near duplicate": self.near_duplicates,
            "licence": self.licences,
            "minified": lambda: self.of_files("**/*.js", lambda text: max(map(len, text.splitlines() or [""])) > 2000),
            "log": self.logs,
            "html": lambda: self.of_files("**/*.html", lambda text: True),
            "table": self.tables,
            "shuffled": self.shuffled,
            "base64": self.base64,
            "markov": self.markov,
            "lock file": self.lock_files,
            "mojibake": self.mojibake,
        }
        self.rng.seed(kind)
        for text in make[kind]():
            n_bytes -= len(text.encode("utf-8"))
            if n_bytes < 0:
                return
            yield text

    def of_files(self, pattern: str, fits: Callable[[str], bool]) -> Iterator[str]:
        """Pieces of 2 to 16 kB of the packages' files."""
        paths = sorted(path for path in self.folder.glob(pattern) if path.is_file())
        self.rng.shuffle(paths)
        for path in paths:
            text = path.read_text(encoding="utf-8", errors="replace")
            if fits(text):
                start = 0
                while start < len(text):
                    end = start + self.rng.randint(2_000, 16_000)
                    yield text[start:end]
                    start = end

    def near_duplicates(self) -> Iterator[str]:
        """Documents of the pool, up to three times each, with 0.5 to 6 % of their words replaced."""
        every = [text for texts in self.clean.values() for text in texts]
        while True:
            text = self.rng.choice(every)
            for _ in range(self.rng.randint(1, 3)):
                words = text.split(" ")
                for place in self.rng.sample(range(len(words)), int(len(words) * self.rng.uniform(0.005, 0.06))):
                    words[place] = self.rng.choice(self.words)
                yield " ".join(words)

    def licences(self) -> Iterator[str]:
        """Licences and notices of the packages, paragraphs left out and other holders named."""
        texts = [
            path.read_text(encoding="utf-8", errors="replace") for path in sorted(self.folder.glob("**/copyright"))
        ]
        licences = Path("/usr/share/common-licenses")
        texts += [path.read_text(encoding="utf-8") for path in sorted(licences.glob("*")) if not path.is_symlink()]
        while texts:
            for piece in pieces(self.rng.choice(texts)):
                kept = [part for part in piece.split("\n\n") if self.rng.random() < 0.7]
                holder = " ".join(self.rng.sample(self.words, 2)).title()
                yield f"Copyright (c) {self.rng.randint(1990, 2026)} {holder}\n\n" + "\n\n".join(kept)

    def logs(self) -> Iterator[str]:
        """Logs in a format a file, their messages about words of the pool."""
        while True:
            says = [" ".join(self.rng.sample(self.words, self.rng.randint(2, 6))) for _ in range(12)]
            module = ".".join(self.rng.sample(self.words, 2))
            clock = datetime(2026, 11, 1) + timedelta(seconds=self.rng.randint(0, 10**6))
            lines = []
            for _ in range(self.rng.randint(40, 160)):
                clock += timedelta(seconds=self.rng.randint(0, 30))
                value = f"{self.rng.choice(self.words)}={self.rng.randint(0, 10**5)}"
                lines.append(f"{clock} {self.rng.choice(_LEVELS)} {module}: {self.rng.choice(says)} {value}")
            yield "\n".join(lines) + "\n"

    def tables(self) -> Iterator[str]:
        """Columns of figures under names, as CSV or with tabs."""
        while True:
            names, between = self.rng.sample(self.words, self.rng.randint(3, 9)), self.rng.choice(",\t;|")
            scale = 10.0 ** self.rng.randint(0, 6)
            rows = (
                between.join(f"{self.rng.random() * scale:.{self.rng.randint(0, 4)}f}" for _ in names)
                for _ in range(self.rng.randint(60, 250))
            )
            yield between.join(names) + "\n" + "\n".join(rows) + "\n"

    def shuffled(self) -> Iterator[str]:
        """Other text of the clean sources, its words in any order."""
        for texts in self.rest.values():
            for text in texts:
                words = text.split()
                self.rng.shuffle(words)
                yield " ".join(words)

    def base64(self) -> Iterator[str]:
        """Pictures as mail and notebooks carry them."""
        for picture in dict.fromkeys(path.read_bytes() for path in sorted(self.folder.glob("**/*.png"))):
            yield base64.encodebytes(picture[:12_000]).decode()
        while True:
            yield base64.encodebytes(self.rng.randbytes(self.rng.randint(1_000, 12_000))).decode()

    def markov(self) -> Iterator[str]:
        """Prose by a chain of words: each follows the one before it somewhere in the pool."""
        following = defaultdict(list)
        words = " ".join(self.clean["prose"]).split()
        for one, other in zip(words, words[1:]):
            following[one].append(other)
        while True:
            said = [self.rng.choice(words)]
            for _ in range(self.rng.randint(200, 1_500)):
                said.append(self.rng.choice(following[said[-1]] or words))
            yield " ".join(said)

    def lock_files(self) -> Iterator[str]:
        """What package managers write down: names, versions, hashes."""
        letters = string.hexdigits.lower()
        while True:
            rows = []
            for name in self.rng.sample(self.words, self.rng.randint(10, 60)):
                version = ".".join(str(self.rng.randint(0, 30)) for _ in range(3))
                digest = "".join(self.rng.choices(letters, k=64))
                needs = "".join(f' "{other}",\n' for other in self.rng.sample(self.words, self.rng.randint(0, 4)))
                rows.append(
                    f'[[package]]\nname = "{name}"\nversion = "{version}"\nsource = "registry+https://{name}.example/"\n'
                    f'checksum = "{digest}"\ndependencies = [\n{needs}]\n'
                )
            yield "\n".join(rows)

    def mojibake(self) -> Iterator[str]:
        """Other text in languages that are not ASCII, read in the wrong encoding."""
        for text in self.rest.get("languages", ()):
            if len(text.encode("utf-8")) > 1.02 * len(text):
                yield text.encode("utf-8").decode("latin-1")
