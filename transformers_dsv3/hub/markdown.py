"""The little Markdown that cards are made of. Text of records is shown as it is, never read as Markdown or HTML."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence


def plain(text: object) -> str:
    """One line of text in which nothing is markup."""
    line = " ".join(str(text).split())
    return re.sub(r"([\\`*_|\[\]])", r"\\\1", html.escape(line, quote=False))


def code(text: object) -> str:
    """Text in a line of its own or a cell, in the type of code."""
    line = " ".join(str(text).split())
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    blank = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{blank}{line}{blank}{ticks}".replace("|", r"\|")


def block(text: str, language: str = "") -> str:
    """A fenced block, whatever the text holds."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def table(rows: Iterable[Sequence[str]], head: Sequence[str] = ("", "")) -> str:
    """A table of cells that are Markdown already; empty where there are no rows."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if not lines:
        return ""
    return "\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *lines])


def document(parts: Iterable[str]) -> str:
    """Blocks with a blank line in between; empty ones are left out."""
    return "\n\n".join(part for part in parts if part) + "\n"


def count(number: int, one: str, several: str | None = None) -> str:
    """`1 layer`, `3 layers`."""
    return f"{number:,} {one if number == 1 else several or one + 's'}"


def figure(value: float | None, digits: int = 4) -> str:
    """A number as it is read; `not known` for None."""
    if value is None:
        return "not known"
    if abs(value) >= 10 ** (digits - 1) or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}"


def share(value: float | None) -> str:
    return "not known" if value is None else f"{value:.1%}"


def data_size(n_bytes: int) -> str:
    """`41.1 MB`, in powers of ten."""
    if n_bytes < 1000:
        return count(n_bytes, "byte")
    size = float(n_bytes)
    for unit in ("kB", "MB", "GB", "TB"):
        size /= 1000
        if size < 999.5 or unit == "TB":
            break
    return f"{size:.3g} {unit}"


def duration(seconds: float) -> str:
    """`2 min 47 s`, `3 h 05 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02} min"
