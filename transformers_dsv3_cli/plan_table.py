"""How `transformers-dsv3 compress --plan` prints a plan."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer


if TYPE_CHECKING:
    from rich.table import Table

    from transformers_dsv3.compression.plan import Choice, Plan


def print_choice(choice: Choice, title: str) -> None:
    """A plan for a target, and whether that is reached."""
    print_plan(choice.plan, title)
    reached = "These are the gentlest settings that reach it."
    missed = "Out of reach: no settings here get there, and these come nearest."
    typer.echo(reached if choice.reached else missed)


def print_plan(plan: Plan, title: str) -> None:
    """The table and what stands below it, by the speed of this machine's memory."""
    from rich.console import Console

    from transformers_dsv3.compression.plan import reading_bandwidth

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a file or a pipe has no width of its own
    console.print(plan_table(plan, title))
    for note in plan_notes(plan, reading_bandwidth()):
        console.print(note, highlight=False, soft_wrap=True)


def plan_table(plan: Plan, title: str) -> Table:
    """Bytes and bits a weight of every part, before and after."""
    from rich.table import Table

    table = Table(title=f"{title}: {plan.settings}")
    table.add_column("part")
    for heading in ("weights", "bf16 file", "weights left", "file", "bits a weight", "share of the file"):
        table.add_column(heading, justify="right")
    before, after = plan.parameters
    for row in plan.rows:
        table.add_row(
            row.part,
            _millions(row.parameters_before),
            _mb(row.bytes_before),
            _millions(row.parameters),
            _mb(row.bytes),
            f"{row.bits:.2f}",
            f"{row.bytes / plan.file_bytes:.1%}",
        )
    table.add_section()
    bits = f"{8 * plan.file_bytes / after:.2f}"
    table.add_row("all", _millions(before), _mb(plan.bf16_bytes), _millions(after), _mb(plan.file_bytes), bits, "")
    return table


def plan_notes(plan: Plan, bandwidth: float) -> list[str]:
    """What stands below the table: ratios, memory, and speed where memory is read at `bandwidth` bytes a second."""
    notes = [
        f"{plan.ratio():.2f} times smaller than in bf16, {plan.ratio('fp32'):.2f} than in fp32.",
        f"To run it: {plan.memory_bytes / 2**30:.2f} GiB, of which {plan.cache_bytes / 2**30:.2f} for the latents of "
        f"{plan.context:,} tokens.",
        f"A token reads {plan.bytes_read / 1e9:.2f} GB: at most {plan.tokens_per_second(bandwidth):.3g} tokens a "
        f"second here, where memory is read at {bandwidth / 1e9:.1f} GB/s.",
    ]
    if plan.experts < plan.experts_before:
        notes.append(f"Of {plan.experts_before} routed experts a layer {plan.experts} are left.")
    return notes


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M"


def _mb(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
