"""`transformers-dsv3 routing`: how evenly a checkpoint uses its experts on a text."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .refusals import as_bad_parameters


if TYPE_CHECKING:
    from transformers_dsv3.evaluation.routing import RoutingReport


def routing(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A folder, or a repository id on the Hub.")],
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="A UTF-8 text file, or a folder with some; may be given several times. Take text that the model was "
            "not trained on. Default: the files of Python's own library that `quickstart` holds out.",
        ),
    ] = None,
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
    device: Annotated[str | None, typer.Option(help="Where to load it: cpu, cuda, … Default: cpu.")] = None,
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.")] = "auto",
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
      transformers-dsv3 routing moonshotai/Moonlight-16B-A3B --device cuda --dtype bfloat16 --window 4096
    """
    from transformers_dsv3.evaluation.loading import device_problem
    from transformers_dsv3.evaluation.routing_request import load_config, measure, read_texts, tokens_of
    from transformers_dsv3.training.whole_files import write_whole

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise typer.BadParameter(f"{dtype!r} is none of auto, float32, bfloat16, float16", param_hint="--dtype")
    if window < 2:
        raise typer.BadParameter(f"{window} is not at least 2", param_hint="--window")
    if max_tokens < window:
        raise typer.BadParameter(f"{max_tokens} is less than one window of {window}", param_hint="--max-tokens")
    if plot is not None and plot.suffix.lower() != ".png":
        raise typer.BadParameter(f"{plot} does not end in .png", param_hint="--plot")
    for option, path in (("--plot", plot), ("--json", json)):
        if path is not None and (problem := file_problem(path)) is not None:
            raise typer.BadParameter(problem, param_hint=option)
    problem = None if device is None else device_problem(device)
    if problem is not None:
        raise typer.BadParameter(problem, param_hint="--device")
    if plot is not None:
        from transformers_dsv3.evaluation.speed.report import plot_problem

        if (problem := plot_problem()) is not None:
            raise typer.BadParameter(problem, param_hint="--plot")

    named = {"CHECKPOINT": checkpoint, **({"--beside": beside} if beside is not None else {})}
    with as_bad_parameters():
        configs = {option: load_config(option, name, window) for option, name in named.items()}
        source, texts = read_texts(text)
        streams = {
            option: tokens_of(option, name, texts, window, configs[option].vocab_size)
            for option, name in named.items()
        }
        reports = [
            (name, measure(option, name, streams[option], window, max_tokens, device, dtype))
            for option, name in named.items()
        ]
    for name, report in reports:
        show(name, report, source)
    if json is not None:
        record = {"text": source, "dtype": dtype, "device": device or "cpu"}
        checkpoints = [{"checkpoint": name, **report.to_dict()} for name, report in reports]
        write_whole(json, (json_format.dumps({**record, "checkpoints": checkpoints}, indent=1) + "\n").encode())
    if plot is not None:
        from transformers_dsv3.evaluation.routing_plot import heat_map

        titles = [Path(name).name or name for name, _ in reports]
        if len(set(titles)) < len(titles):
            titles = [name for name, _ in reports]
        write_whole(plot, heat_map([(title, report) for title, (_, report) in zip(titles, reports)]))
        typer.echo(f"The heat map is in {plot}.")


def file_problem(path: Path) -> str | None:
    """Why `path` cannot be written, in one line; None where it can."""
    from transformers_dsv3.training.whole_files import unwritable

    folder = path.absolute().parent
    if path.is_dir():
        return f"{path} is a folder, not a file"
    if not folder.is_dir():
        return f"there is no folder {folder}"
    return unwritable(folder)


def show(checkpoint: str, report: RoutingReport, source: str) -> None:
    """Print the table of layers and what belongs below it."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a file or a pipe has no width of its own
    table = Table(
        *("layer", "utilisation", "MaxVio", "entropy", "dead", "above half fair", "busiest experts (load / mean)"),
        title=f"{checkpoint}: {report.n_experts} experts, {report.experts_per_token} a token",
    )
    for layer in report.layers:
        loads = layer.relative_load
        busiest = ", ".join(f"{expert} ({loads[expert]:.2g})" for expert in layer.busiest_experts[:4])
        table.add_row(str(layer.layer), *figures(vars(layer)), busiest)
    table.add_section()
    table.add_row("mean", *figures(report.statistics.mean()), "dead: of all layers")
    console.print(table)
    windows = f"windows of {report.window}"
    console.print(f"{report.tokens:,} tokens of {source}, in {windows}.", highlight=False, soft_wrap=True)
    console.print(f"Loss {report.loss:.3f} nats a token.", highlight=False, soft_wrap=True)
    if report.mtp is not None:
        deeper = "".join(
            f", layer {depth + 1} {share:.1%}" for depth, share in enumerate(report.mtp.agreement) if depth
        )
        console.print(
            f"MTP: second-token acceptance {report.mtp.second_token_acceptance:.1%}{deeper}; "
            f"loss {report.mtp.mean_loss:.3f} nats a token. MTP layers' own experts are not counted.",
            highlight=False,
            soft_wrap=True,
        )


def figures(values: dict[str, Any]) -> tuple[str, ...]:
    """The columns that a layer and the mean over layers share."""
    return (
        f"{values['utilisation']:.3f}",
        f"{values['max_violation']:.2f}",
        f"{values['load_entropy']:.3f}",
        f"{values['dead_experts']:.0f}",
        f"{values['above_half_fair']:.0%}",
    )
