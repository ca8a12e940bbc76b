"""What each stage of a run that has ended says of one document."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from ...option_error import OptionError
from .inputs import InputFile, Row, read_rows
from .pipeline import REPORT
from .plan import FilterPlan, load_table
from .statistics import ENTROPY_BYTES, REASONS, byte_entropy, exact_hash, statistics_of


def explain_document(output: str | Path, document: str) -> list[tuple[str, str]]:
    """Stage by stage, what it says of a document and by which numbers.

    Args:
        output: the folder of a run that has ended.
        document: a text file, or the `id` of a document of the run.

    Raises:
        OptionError: there is no such run, or no such document in it.
    """
    output = Path(output).expanduser().absolute()
    plan = FilterPlan.load(output)
    if not (output / REPORT).exists():
        raise OptionError("--output", f"{output} has not ended: repeat the command that began it")
    report = json.loads((output / REPORT).read_text(encoding="utf-8"))
    lines: list[tuple[str, str]] = []
    path = Path(document).expanduser()
    if path.is_file():
        skipped: list[str] = []
        found = InputFile(str(path), path.name, path.stat().st_size)
        rows = list(read_rows([found], plan.settings.columns, lambda *what: skipped.append(what[2])))
        if len(rows) != 1:
            raise OptionError("--explain", f"{path}: {skipped[0] if skipped else 'not one document but several'}")
        row = rows[0]
        lines.append(("exact", _exact(plan, row.text)))
    else:
        kept, values = _find(output, document)
        row = Row(values["text"], values["id"], {"file": values["file"], **json.loads(values["metadata"])})
        reason = "kept" if kept else f"dropped by {values['stage']}: {values['reason']} {values['detail']}".rstrip()
        lines.append(("the run", reason))
    return lines + _stages(plan, report, row)


def _stages(plan: FilterPlan, report: dict, row: Row) -> list[tuple[str, str]]:
    from .steps import Judge, language_of

    judge = Judge(plan)
    data = row.text.encode("utf-8")
    domain, language = judge.domain(row, data), language_of(data)
    lines = [("domain, language", f"{domain}, {language}; {judge.tokens(row.text, len(data)):,} tokens")]
    dropped = judge.reason(row, data, domain)
    if judge.seed is not None:
        low, high = judge.seed.bounds.entropy
        told = f"{byte_entropy(data):.2f} bits a byte, {low:.2f} to {high:.2f} are taken"
        lines.append(
            ("entropy", told if len(data) >= ENTROPY_BYTES else f"not asked of less than {ENTROPY_BYTES} bytes")
        )
        most = judge.seed.bounds.most_of(domain)
        values = statistics_of(row.text)
        for name, reason in REASONS.items():
            mark = "dropped: " if values[name] > most[name] else ""
            lines.append(("statistics", f"{mark}{reason} {values[name]:.3f}, at most {most[name]:.3f}"))
    if "contamination" in plan.settings.stages:
        is_in = dropped is not None and dropped[0] == "contamination"
        lines.append(("contamination", f"dropped: {dropped[1]}: {dropped[2]!r}" if is_in and dropped else "no match"))
    if judge.seed is not None and "ngram" in plan.settings.stages:
        bits = next(judge.seed.model.bits_per_byte([data]))
        limits = {group["group"]: group["most_bits_per_byte"] for group in report["groups"]}
        limit = limits.get(f"{domain}/{language}", limits.get(f"{domain}/*"))
        least, past = judge.seed.bits_of(domain, language)
        past = past if limit is None else min(past, limit)
        told = f"{bits:.3f} bits a byte; {least:.3f} at least"
        if past < math.inf:
            told += f" and {past:.3f} at most in {domain}, {language}"
        lines.append(("ngram", f"{'' if least <= bits <= past else 'dropped: '}{told}"))
    return lines


def _exact(plan: FilterPlan, text: str) -> str:
    both = np.frombuffer(exact_hash(text), dtype="<u8")
    for shard in range(len(plan.shards)):
        rows = load_table(plan.path("exact", f"{shard:05d}.npz"))[1]["rows"]
        for at in range(int(np.searchsorted(rows["first"], both[0])), len(rows)):
            if rows["first"][at] != both[0]:
                break
            if rows["second"][at] == both[1]:
                return f"the same text as document {rows['place'][at]} of shard {shard}"
    return "in no shard"


def _find(output: Path, name: str) -> tuple[bool, dict]:
    import pyarrow.parquet as pq

    for kept in (True, False):
        for file in sorted((output / ("kept" if kept else "dropped")).glob("*.parquet")):
            found = pq.read_table(file, filters=[("id", "==", name)]).to_pylist()
            if found:
                return kept, found[0]
    raise OptionError("--explain", f"{name}: no such file, and no document of that id in {output}")
