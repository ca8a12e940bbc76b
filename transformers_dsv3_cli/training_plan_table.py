"""How `transformers-dsv3 plan` prints what it was asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from rich.console import Console

    from transformers_dsv3.training.plan.idle import IdleRow
    from transformers_dsv3.training.plan.published import Bill, Comparison
    from transformers_dsv3.training.plan.splits import Plan
    from transformers_dsv3.training.plan.trace import Replay


def print_plans(plans: Sequence[Plan], title: str, tokens: float, price_per_hour: float) -> None:
    """The table of splits, and the fastest one's memory, time and busy ranks."""
    from rich.table import Table

    console = _console()
    first = plans[0]
    table = Table(title=f"{title} on {first.split.gpus:,} {first.gpu.name}, {tokens / 1e9:,.0f} B tokens")
    table.add_column("split")
    for heading in (
        "memory, GB",
        "a step, s",
        "idle",
        "tokens/s a GPU",
        "TFLOP/s",
        "use",
        "days",
        "GPU hours",
        "dollars",
    ):
        table.add_column(heading, justify="right")
    for plan in plans:
        hours = plan.gpu_hours(tokens)
        table.add_row(
            str(plan.split),
            f"{plan.memory_bytes / 1e9:.1f}",
            f"{plan.seconds:.3g}",
            f"{plan.idle:.1%}",
            f"{plan.tokens_per_second:,.0f}",
            f"{plan.flops / 1e12:,.0f}",
            f"{plan.utilisation:.0%}",
            f"{plan.days(tokens):,.1f}",
            f"{hours:,.0f}",
            f"{hours * price_per_hour:,.0f}",
        )
    console.print(table)
    notes = []
    if not first.fits:
        notes.append(f"Nothing fits into the {first.gpu.room / 1e9:.1f} GB that tensors may take; this comes nearest.")
    memory = ", ".join(f"{part} {size / 1e9:.1f}" for part, size in first.memory.items())
    notes.append(f"The first one's fullest GPU, GB: {memory}.")
    parts = sorted(first.parts.items(), key=lambda part: -part[1])
    shares = ", ".join(f"{part} {value / first.seconds:.1%}" for part, value in parts if value)
    notes.append(f"Its step: {shares}.")
    if first.pipeline is not None:
        notes.append(f"Its ranks work, of the pipeline's time: {' '.join(f'{share:.0%}' for share in first.busy)}.")
    notes.append(f"{first.tokens_per_second * first.split.gpus * 86400 / 1e9:,.1f} B tokens a day on all GPUs.")
    notes.append("Use: the model's operations over the rate that the GPU's matrix products reach.")
    _say(notes)


def print_idle(rows: Sequence[IdleRow], title: str) -> None:
    """Idle shares by size, schedule and cut, and the article's figures of equal stages."""
    from rich.table import Table

    from transformers_dsv3.training.plan.idle import ARTICLE, equal_stages

    table = Table(title=f"{title}: share of the ranks' time in which they wait, by simulation")
    for heading in (
        "ranks",
        "microbatches",
        "1F1B, equally many layers",
        "1F1B by cost",
        "ZBV, whole layers",
        "ZBV by cost, halves",
        "DualPipeV by cost, halves",
        "ZBV at most",
        "of equal stages",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        shares = (row.whole, row.by_cost, row.zbv_layers, row.zbv, row.dualpipev)
        table.add_row(
            str(row.ranks),
            str(row.microbatches),
            *("" if share is None else f"{share:.1%}" for share in shares),
            f"{row.target:.0%} {'reached' if row.zbv <= row.target else 'missed'}",
            f"{row.floor:.1%}",
        )
    _console().print(table)
    _say(
        f"The article's {said:.0%}: {schedule} of equal stages on {ranks} ranks with {microbatches} microbatches, "
        f"{equal_stages(schedule, ranks, microbatches):.1%}."
        for schedule, ranks, microbatches, said in ARTICLE
    )


def print_published(comparisons: Sequence[Comparison], bills: Sequence[Bill], price_per_hour: float) -> None:
    """Predicted beside published, and the bill."""
    from rich.table import Table

    from transformers_dsv3.training.plan.published import ARTICLE_UTILISATION

    console = _console()
    table = Table(title="Tokens a second of one GPU")
    for heading in ("run", "GPUs", "split"):
        table.add_column(heading)
    for heading in ("published", "predicted", "difference", "busy", "use"):
        table.add_column(heading, justify="right")
    for comparison in comparisons:
        run, plan = comparison.run, comparison.plan
        table.add_row(
            run.name,
            f"{run.split.gpus:,} {run.gpu}",
            str(run.split),
            f"{run.tokens_per_second:,.0f}",
            f"{plan.tokens_per_second:,.0f}",
            f"{comparison.difference:+.1%}",
            f"{min(plan.busy):.0%} to {max(plan.busy):.0%}",
            f"{plan.utilisation:.0%}",
        )
    console.print(table)
    bill = Table(title=f"DeepSeek-V3, all of its training, {price_per_hour:g} dollars an hour")
    bill.add_column("")
    for heading in ("GPUs", "hours, M", "days", "dollars, M"):
        bill.add_column(heading, justify="right")
    for row in bills:
        dollars = row.dollars(price_per_hour) / 1e6
        bill.add_row(row.name, f"{row.gpus:,}", f"{row.hours / 1e6:.3f}", f"{row.days:.1f}", f"{dollars:.3f}")
    console.print(bill)
    _say(
        [
            "Busy: of each rank of the pipeline, least to most. Use: the model's operations over the rate that matrix "
            f"products are taken to reach, beside which the article has {ARTICLE_UTILISATION:.0%}.",
            *sorted({f"{comparison.run.name}: {comparison.run.source}." for comparison in comparisons}),
        ]
    )


def print_replay(step: Replay) -> None:
    """Measured beside simulated."""
    from rich.table import Table

    table = Table(title=f"{len(step.measured.spans)} ranks")
    table.add_column("")
    for heading in ("measured", "simulated"):
        table.add_column(heading, justify="right")
    pair = (step.measured, step.simulated)
    table.add_row("span, s", *(f"{timeline.seconds:.4g}" for timeline in pair))
    table.add_row("idle", *(f"{timeline.idle:.1%}" for timeline in pair))
    for rank in range(len(step.measured.spans)):
        table.add_row(f"rank {rank} works", *(f"{timeline.busy[rank]:.1%}" for timeline in pair))
    _console().print(table)
    _say([f"The simulated span is {step.difference:+.1%} off."])


def _say(lines: Iterable[str]) -> None:
    console = _console()
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)


def _console() -> Console:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=160)  # a file or a pipe has no width of its own
