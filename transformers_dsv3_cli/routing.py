"""`transformers-dsv3 routing`: how evenly a checkpoint uses its experts on a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import Device, Dtype, Text
from .refusals import as_bad_parameters


if TYPE_CHECKING:
    from transformers_dsv3.evaluation.routing import RoutingReport


def routing(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A folder, a repository id on the Hub, or a GGUF file.")
    ],
    text: Text = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="PATH.png", help="Draw the load of each expert of each layer.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Write every count and figure, of each expert too.")
    ] = None,
    beside: Annotated[
        str | None,
        typer.Option(metavar="CHECKPOINT", help="A second checkpoint, on the same text: without balancing, say."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Of a longer text, so many tokens are taken, in windows evenly spaced over it.")
    ] = 65_536,
    window: Annotated[int, typer.Option(help="Tokens of context; windows do not overlap.")] = 256,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Run a checkpoint over a text and report how evenly each layer's tokens spread over its experts.

    \b
    For each mixture-of-experts layer:
      utilisation      mean over largest load: 1 is even, 1 / experts when one expert takes every token
      MaxVio           (largest - mean) / mean load: 0 is even; what balancing brings down
      entropy          of the shares of the load, over that of equal shares: 1 is even
      dead             experts that no token chose
      above half fair  share of the experts with more than half of the mean load

    It also gives the loss on that text and, for a checkpoint with MTP layers, their loss and how often the token that
    they foresee is the one that the model then chooses (second-token acceptance). MTP layers' own experts are not
    counted, since those layers run only in training and drafting.

    The heat map's colours are load over mean load, on the same scale in every picture: blue is less, red more, black
    none.

    \b
    Examples:
      transformers-dsv3 routing ./dsv3-quickstart --plot routing.png
      transformers-dsv3 routing ./balanced --beside ./unbalanced --text ~/held-out --plot both.png --json both.json
      transformers-dsv3 routing ./dsv3-quickstart --beside ./dsv3-quickstart-q4_0.gguf
      transformers-dsv3 routing moonshotai/Moonlight-16B-A3B --device cuda --dtype bfloat16 --window 4096
    """
    from transformers_dsv3.evaluation.routing_comparison import check_options, compare_routing

    with as_bad_parameters():
        check_options(window, max_tokens, device, dtype, plot, json)
        named = {"CHECKPOINT": checkpoint, **({"--beside": beside} if beside is not None else {})}
        comparison = compare_routing(named, text, window=window, max_tokens=max_tokens, device=device, dtype=dtype)
    for name, report in comparison.reports:
        show(name, report, comparison.source)
    if json is not None:
        comparison.write_json(json)
    if plot is not None:
        comparison.write_plot(plot)
        typer.echo(f"The heat map is in {plot}.")


def show(checkpoint: str, report: RoutingReport, source: str) -> None:
    """Print the table of layers and what belongs below it."""
    from rich.console import Console
    from rich.table import Table

    from transformers_dsv3.evaluation.routing_comparison import HEADINGS, notes, table_rows

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a file or a pipe has no width of its own
    table = Table(*HEADINGS, title=f"{checkpoint}: {report.n_experts} experts, {report.experts_per_token} a token")
    *layers, mean = table_rows(report)
    for row in layers:
        table.add_row(*row)
    table.add_section()
    table.add_row(*mean)
    console.print(table)
    for line in notes(report, source):
        console.print(line, highlight=False, soft_wrap=True)
