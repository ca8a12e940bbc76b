"""The pool in files: seed, pool and held-out text, each document with its kind and source."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...files import write_json, write_whole
from .junk import KINDS, Junk
from .sources import SOURCES, Source, documents


PARTS = 8  # files of the pool
OVERLAP = 12  # words in a row that no document of the pool shares with held-out text


def make_pool(
    packages: Path,
    folder: Path,
    scale: float = 1.0,
    sources: Sequence[Source] = SOURCES,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Write `seed/DOMAIN/N.txt`, `held_out/DOMAIN.jsonl` and `pool/N.jsonl`, and last `pool.json`, which counts them.

    Documents of the pool that share 12 words in a row with held-out text are left out. The same packages give the same
    bytes.

    Args:
        packages: folder of [`download`].
        folder: where to write.
        scale: of all amounts.
        progress: told what is being made.

    Returns:
        What `pool.json` has: bytes and documents by kind, and a fingerprint of the pool.
    """
    if (folder / "pool.json").exists():
        return dict(json.loads((folder / "pool.json").read_text(encoding="utf-8")))
    say = progress or (lambda _: None)
    clean: dict[str, list[str]] = {}
    rest: dict[str, list[str]] = {}
    held_out: dict[str, list[dict[str, Any]]] = {}
    rows: list[dict[str, str]] = []
    seed: dict[str, list[str]] = {}
    for source in sources:
        say(source.package)
        wanted = {"held_out": source.held_out, "seed": source.seed, "pool": source.pool, "rest": 2 * source.pool}
        for part, found in _parts(documents(packages, source), wanted, scale).items():
            if part == "held_out":
                name = f"{source.domain} {source.language} {source.package}"
                told = {"set": name, "in_seed": source.seed > 0}
                held_out.setdefault(source.domain, []).extend({"text": text, **told} for _, text in found)
            elif part == "seed":
                seed.setdefault(source.domain, []).extend(text for _, text in found)
            elif part == "rest":
                rest.setdefault(source.domain, []).extend(text for _, text in found)
            else:
                clean.setdefault(source.domain, []).extend(text for _, text in found)
                rows += [{"text": text, "kind": source.domain, "source": name} for name, text in found]
    junk = Junk(packages, clean, rest)
    for kind, megabytes in KINDS.items():
        say(kind)
        made = junk.documents(kind, megabytes * 1e6 * scale)
        rows += [{"text": text, "kind": kind, "source": f"{kind} {number}"} for number, text in enumerate(made)]
    forbidden = {run for of in held_out.values() for row in of for run in _runs(row["text"])}
    rows = [row for row in rows if forbidden.isdisjoint(_runs(row["text"]))]
    random.Random(0).shuffle(rows)

    for domain, texts in seed.items():
        (folder / "seed" / domain).mkdir(parents=True, exist_ok=True)
        for number, text in enumerate(texts):
            write_whole(folder / "seed" / domain / f"{number}.txt", text.encode("utf-8"))
    for domain, of in held_out.items():
        _write_lines(folder / "held_out" / f"{domain}.jsonl", of)
    for number in range(PARTS):
        _write_lines(folder / "pool" / f"{number}.jsonl", rows[number::PARTS])
    counts: dict[str, dict[str, int]] = {}
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row["text"].encode("utf-8"))
        of_kind = counts.setdefault(row["kind"], {"documents": 0, "bytes": 0})
        of_kind["documents"] += 1
        of_kind["bytes"] += len(row["text"].encode("utf-8"))
    told = {"kinds": counts, "clean": sorted(clean), "fingerprint": digest.hexdigest(), "scale": scale}
    write_json(folder / "pool.json", told)
    return told


def _parts(found: Any, wanted: dict[str, float], scale: float) -> dict[str, list[tuple[str, str]]]:
    """Documents, file after file, to each part as many as it wants; no two parts have pieces of one file but where a
    source has a single one."""
    parts: dict[str, list[tuple[str, str]]] = {}
    names = [name for name in wanted if wanted[name]]
    size, last = 0, ""
    for name, text in found:
        path = name.partition("#")[0]
        while (
            names
            and size >= wanted[names[0]] * 1e6 * scale
            and (path != last or size >= 1.5e6 * wanted[names[0]] * scale)
        ):
            names.pop(0)
            size = 0
        if not names:
            break
        parts.setdefault(names[0], []).append((name, text))
        size += len(text.encode("utf-8"))
        last = path
    return parts


def _runs(text: str) -> set[int]:
    words = re.findall(r"\w+", text.lower())
    return {hash(tuple(words[i : i + OVERLAP])) for i in range(len(words) - OVERLAP + 1)}


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows).encode("utf-8"))
