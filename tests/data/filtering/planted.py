"""A pool of text whose every document is known: clean, junk of some kind, a duplicate, or good text that looks odd."""

import base64
import json
import random
import re
import sysconfig
from pathlib import Path

from transformers_dsv3.data.python_reference import python_reference


# Good text that looks odd, and has to stay
ODD = {
    "haiku": "An old silent pond\nA frog jumps into the pond\nSplash! Silence again.\n",
    "poem": (
        "Tyger Tyger, burning bright,\nIn the forests of the night;\nWhat immortal hand or eye,\nCould frame thy "
        "fearful symmetry?\n\nIn what distant deeps or skies.\nBurnt the fire of thine eyes?\nOn what wings dare he "
        "aspire?\nWhat the hand, dare seize the fire?\n\nAnd what shoulder, & what art,\nCould twist the "
        "sinews of thy heart?\n"
    ),
    "APL": "life ← {⊃1 ⍵ ∨.∧ 3 4 = +/ +⌿ ¯1 0 1 ∘.⊖ ¯1 0 1 ⌽¨ ⊂⍵}\nprimes ← {(~v∊v∘.×v)/v←1↓⍳⍵}\navg ← {(+⌿⍵)÷≢⍵}\n",
    "assembly": (
        "strlen:\n    xor eax, eax\n.next:\n    cmp byte [rdi + rax], 0\n    je .done\n    inc rax\n    jmp .next\n"
        ".done:\n    ret\n"
    ),
    "classic": (
        "道可道，非常道；名可名，非常名。無名天地之始，有名萬物之母。故常無欲，以觀其妙；常有欲，以觀其徼。此兩者同出而異名，"
        "同謂之玄，玄之又玄，眾妙之門。天下皆知美之為美，斯惡已；皆知善之為善，斯不善已。故有無相生，難易相成，長短相較，"
        "高下相傾，音聲相和，前後相隨。\n"
    ),
}
LICENCE = (
    "Permission is hereby granted, free of charge, to any person obtaining a copy of this software, to deal in the "
    "software without restriction, including the right to redistribute it, subject to the conditions of this license. "
    "The above copyright notice and this permission notice shall be included in all copies. The software is provided "
    "without warranty of any kind, and no copyright holder is liable for any claim, damages or other liability. "
)
# What each kind of junk is dropped for: stage and reason, of which there may be two that are as good
DROPPED = {
    "base64": {("entropy", "high entropy")},
    "one letter": {("entropy", "low entropy")},
    "short": {("entropy", "too short")},
    "blank": {("entropy", "empty")},
    "log": {("statistics", "figures")},
    "table": {("entropy", "low entropy"), ("statistics", "figures")},
    "html": {("statistics", "markup")},
    "mojibake": {("statistics", "mojibake")},
    "minified": {("statistics", "long runs without a space")},
    "licence": {("statistics", "legal text and notices")},
    "list": {("entropy", "low entropy"), ("statistics", "repeated words")},
    "repeated": {("statistics", "repeated lines")},
}


def clean_texts():
    """Code and prose, each in an order that is always the same."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(root.glob("*.py")) if 3_000 < path.stat().st_size < 20_000]
    code = [path.read_text(encoding="utf-8") for path in paths]
    corpus = python_reference()
    prose = [document.text for document in (*corpus.train, *corpus.held_out) if 700 < len(document.text) < 12_000]
    rng = random.Random(0)
    rng.shuffle(code)
    rng.shuffle(prose)
    return code, prose


def junk(rng, words):
    """One document of each kind of junk that stands by itself."""
    return {
        "base64": "\n".join(base64.encodebytes(rng.randbytes(2400)).decode().split()),
        "one letter": "a" * 900 + "\n",
        "short": "ok",
        "blank": " \n\t\n " * 9,
        "log": "\n".join(
            f"2026-11-{rng.randint(10, 30)} 12:{rng.randint(10, 59)} worker {i} took {rng.random()}" for i in range(60)
        ),
        "table": "\n".join("\t".join(f"{rng.random():.4f}" for _ in range(8)) for _ in range(40)),
        "html": "".join(
            f'<div class="c{i}"><a href="/p/{rng.choice(words)}">{rng.choice(words)}</a></div>' for i in range(60)
        ),
        "mojibake": "Der gro\u00c3\u0178e B\u00c3\u00a4r \u00e2\u20ac\u017eh\u00c3\u00b6rte\u00e2\u20ac\u0153 es. " * 2
        + " ".join(rng.sample(words, 120)),
        "minified": "".join(
            f"function {a}({b}){{return {b}.{a}||{b}[{a}]}}".replace(" ", "_")
            for a, b in zip(words[:90], words[90:180])
        ),
        "licence": LICENCE + f"For {rng.choice(words)}.",
        "list": " ".join(f"buy the best {word} here today for you now" for word in rng.sample(words, 60)),
        "repeated": "\n".join([f"Home | News | {rng.choice(words)} | Contact us today"] * 30 + rng.sample(words, 60)),
    }


def shingles(text):
    words = re.findall(r"\w+", text.lower())
    return set(zip(*(words[i:] for i in range(5))))


def near(text, jaccard, rng):
    """The text with as many words changed as make about that similarity of its runs of five words."""
    words = text.split(" ")
    places = list(range(len(words)))
    rng.shuffle(places)
    original = shingles(text)
    for changed, place in enumerate(places):
        words[place] = "".join(rng.choices("bcdfghjklmnpqrstvwxz", k=7))  # which no text has
        if changed % 4 == 0:
            other = shingles(" ".join(words))
            if len(original & other) / len(original | other) <= jaccard:
                break
    return " ".join(words)


def make_pool(folder, n_clean=40, copies=2):
    """`seed/DOMAIN/*.txt` and `pool/*.jsonl`, whose rows tell their kind in a column."""
    code, prose = clean_texts()
    rng = random.Random(1)
    for domain, texts in (("code", code[:12]), ("prose", prose[:24])):
        (folder / "seed" / domain).mkdir(parents=True)
        for number, text in enumerate(texts):
            (folder / "seed" / domain / f"{number}.txt").write_text(text, encoding="utf-8")
    (folder / "seed" / "odd").mkdir()
    for name, text in ODD.items():  # some of each kind, not the same
        (folder / "seed" / "odd" / f"{name}.txt").write_text(text[: len(text) // 2] * 2, encoding="utf-8")
    clean = [("clean prose", text) for text in prose[24 : 24 + n_clean]]
    clean += [("clean code", text) for text in code[12 : 12 + n_clean]]
    rows = [*clean, *((f"odd {name}", text) for name, text in ODD.items())]
    words = sorted(set(re.findall(r"[a-z]{4,10}", " ".join(prose[:9]))))
    for copy in range(copies):
        rows += junk(rng, words).items()
        text = clean[copy][1]
        rows.append(("exact", text.replace(" ", "  ")))
        for jaccard in (0.9, 0.5):
            place = 4 + copy if jaccard == 0.9 else 8 + copy
            rows.append((f"near {jaccard}", near(clean[place][1], jaccard, rng)))
    (folder / "pool").mkdir()
    rng.shuffle(rows)
    for part in range(3):
        with open(folder / "pool" / f"{part}.jsonl", "w", encoding="utf-8") as file:
            for number, (kind, text) in enumerate(rows[part::3]):
                file.write(json.dumps({"text": text, "kind": kind, "id": f"{kind} {part}.{number}"}) + "\n")
    return rows
