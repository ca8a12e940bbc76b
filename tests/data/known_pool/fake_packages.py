"""Packages of a pool, made up: files that its sources' patterns find, with words of a few languages."""

import gzip
import random

from transformers_dsv3.data.known_pool.sources import JUNK_PACKAGES, SOURCES, STANDARD_LIBRARY


LETTERS = {
    "ja": "あいうえおかきくけこ",
    "ru": "абвгдежзик",
    "ko": "가나다라마바사아자차",
    "zh": "的一是了我不人在他有",
}


def text_of(rng, words, n_lines=25):
    return "".join(" ".join(rng.choices(words, k=10)) + ".\n" for _ in range(n_lines))


def make_packages(folder, n_files=24):
    for source in SOURCES:
        if source.package == STANDARD_LIBRARY:
            continue
        rng = random.Random(f"{source.package} {source.pattern}")
        letters = LETTERS.get(source.language, "abcdefghijklmnopqrstuvwxyz")
        words = ["".join(rng.choices(letters, k=rng.randint(3, 8))) for _ in range(400)]
        for number in range(n_files):
            name = source.pattern.replace("**/", f"{number}/", 1).replace("**/", "").replace("[a-s]*", "admin")
            path = folder / source.package / name.replace("*", f"text{number}")
            path.parent.mkdir(parents=True, exist_ok=True)
            text = text_of(rng, words)
            if path.suffix == ".page":
                paragraphs = "".join(f"<p>{line}</p>" for line in text.splitlines())
                text = f'<page xmlns="http://projectmallard.org/1.0/"><title>{words[0]}</title>{paragraphs}</page>'
            data = text.encode("utf-8")
            path.write_bytes(gzip.compress(data) if path.suffix in (".gz", ".dz") else data)
    rng = random.Random(0)
    for package in JUNK_PACKAGES:
        (folder / package).mkdir()
    for number in range(8):
        code = "".join(f"function f{i}(a){{return a.b{rng.randint(0, 999)}||a}}" for i in range(400)).replace(" ", "_")
        (folder / JUNK_PACKAGES[0] / f"{number}.js").write_text(code)
        tags = "".join(f'<div class="c{rng.randint(0, 99)}"><a href="/{i}">{i}</a></div>' for i in range(400))
        (folder / JUNK_PACKAGES[1] / f"{number}.html").write_text(tags)
        (folder / JUNK_PACKAGES[2] / f"{number}.png").write_bytes(rng.randbytes(3_000))
    (folder / JUNK_PACKAGES[3] / "copyright").write_text(
        "Permission is hereby granted, free of charge.\n\nNo warranty."
    )
