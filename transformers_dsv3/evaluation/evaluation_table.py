"""What a person reads of an evaluation's record, in a terminal and on a model card."""

from __future__ import annotations

from typing import Any

from .evaluation_record import EvaluationRecord
from .machine import BUSY
from .routing import RoutingReport


def figures_of(record: EvaluationRecord) -> list[tuple[str, str, str]]:
    """Rows of plain text: what was measured, its figure, and what to see it beside."""
    return [*_text(record), *_routing(record), *_speed(record), *_tasks(record), *_human_eval(record)]


def _text(record: EvaluationRecord) -> list[tuple[str, str, str]]:
    if (text := record.text) is None:
        return []
    others = ", ".join(f"{name} {text[f'{name}_bits_per_byte']:.3f}" for name in ("zlib", "lzma"))
    counts = f"{text['tokens']:,} tokens in windows of {text['window']}"
    return [
        ("bits per byte", f"{text['bits_per_byte']:.4f}", f"{others}; {text['source']}"),
        ("perplexity of a token", _number(text["perplexity"]), counts),
    ]


def _routing(record: EvaluationRecord) -> list[tuple[str, str, str]]:
    if record.routing is None:
        return []
    report = RoutingReport.from_dict(record.routing)
    mean = report.statistics.mean()
    beside = f"mean over largest load; load entropy {mean['load_entropy']:.3f}, {mean['dead_experts']:.0f} dead"
    rows = [("utilisation of experts", f"{mean['utilisation']:.1%}", beside)]
    if report.mtp is not None:
        for depth, agreement in enumerate(report.mtp.agreement):
            rows.append((f"MTP acceptance of token {depth + 2}", f"{agreement:.1%}", "given the true tokens before"))
    return rows


def _speed(record: EvaluationRecord) -> list[tuple[str, str, str]]:
    if (speed := record.speed) is None:
        return []
    where = f"{record.hardware['device']}, {speed['threads']} threads"
    load, cores = record.hardware.get("load_average"), record.hardware.get("cores")
    if load is not None and cores and load > BUSY * cores:
        where += f"; other programs were running, load average {load:.2f} on {cores} cores"
    rows = [
        ("prefill tokens/s", _number(speed["prefill_tokens_per_second"]), where),
        ("greedy decode tokens/s", _number(speed["greedy_tokens_per_second"]), where),
    ]
    if "mtp_acceptance_rate" in speed:
        beside = f"{speed['greedy_mtp_tokens_per_second']:,.1f} tokens/s with use_mtp=True"
        rows.append(("MTP drafts accepted, greedy", f"{speed['mtp_acceptance_rate']:.0%}", beside))
    return [*rows, ("cache bytes a token", f"{speed['cache_bytes_per_token']:,.0f}", "all layers")]


def outer_tasks(record: EvaluationRecord) -> dict[str, Any]:
    """The tasks that are shown: none that another one sums up, as mmlu does 57. The record has them all."""
    tasks = record.tasks or {}
    inner = {member for task in tasks.values() if task["metrics"] for member in task["subtasks"]}
    return {name: task for name, task in tasks.items() if name not in inner}


def _tasks(record: EvaluationRecord) -> list[tuple[str, str, str]]:
    rows = []
    for name, task in outer_tasks(record).items():
        beside = f"{task['n']} documents, {task['num_fewshot']} examples"
        beside += "; prompts longer than the context were cut" if task["truncated"] else ""
        for metric, figure in task["metrics"].items():
            rows.append((f"{name}: {metric.removesuffix(',none')}", _with_error(figure), beside))
    return rows


def _human_eval(record: EvaluationRecord) -> list[tuple[str, str, str]]:
    if (solved := record.human_eval) is None:
        return []
    endings = ", ".join(f"{count} {outcome}" for outcome, count in solved["outcomes"].items())
    return [(f"HumanEval: pass@{k}", _with_error(figure), endings) for k, figure in solved["pass@k"].items()]


def _with_error(figure: dict[str, float | None]) -> str:
    if figure["value"] is None:
        return "none"
    return f"{figure['value']:.4f}" + ("" if figure["stderr"] is None else f" ± {figure['stderr']:.4f}")


def _number(value: float | None) -> str:
    if value is None:  # too large for a number
        return "none"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
