"""`transformers-dsv3 compress`: a checkpoint to 8, 4 or 3 bits a weight, calibrated on a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .refusals import as_bad_parameters


if TYPE_CHECKING:
    from transformers_dsv3.compression.compression_record import CompressionRecord


def compress(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A folder, in bf16, fp32, fp16 or FP8.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder to make for the compressed checkpoint.")],
    bits: Annotated[int, typer.Option(help="Of a weight of linear layers: 8 or 4.")] = 4,
    experts_bits: Annotated[
        int | None, typer.Option(help="Of a weight of routed experts: 8, 4 or 3. Default: as --bits.")
    ] = None,
    head_bits: Annotated[int, typer.Option(help="Of a weight of the embedding and the output head: 8 or 4.")] = 8,
    method: Annotated[
        str, typer.Option(help="gptq, which needs text, or nearest, which rounds each weight on its own.")
    ] = "gptq",
    text: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="A UTF-8 text file, or a folder with some, to calibrate on; may be given several times. Default: "
            "the files of Python's own library that `quickstart` trains on.",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Of the text, in windows drawn from all over it.")] = 131_072,
    window: Annotated[int, typer.Option(help="Tokens of context; windows do not overlap.")] = 256,
    min_tokens: Annotated[
        int, typer.Option(help="Experts that fewer tokens are routed to are calibrated on the whole layer's.")
    ] = 256,
    seed: Annotated[int, typer.Option(help="By which windows are drawn.")] = 0,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Bytes to use at most: 8GiB, 500MB, … Default: half of all.")
    ] = None,
) -> None:
    """Compress a checkpoint to few bits a weight, in groups of 32, and write it as one that other programs open too.

    Attention, dense networks, shared and routed experts, embedding and head are rounded, those of MTP layers too;
    norms, routers and kv_b_proj stay as they are. Each matrix is rounded by GPTQ, so that its outputs on the text
    change least: routed experts on the tokens that come to them, those with too few on the tokens of the whole layer.

    One layer is in memory at a time, and of its experts one; activations are on disk. Stopped in whatever way, the
    same command goes on at the layer where it was: until it has ended, finished layers are in a hidden folder beside
    the output. The result has compressed-tensors' packed weights, and a record of every expert's tokens and method.

    \b
    Examples:
      transformers-dsv3 compress ./dsv3-quickstart --output ./dsv3-4bit
      transformers-dsv3 compress ./dsv3-quickstart --output ./dsv3-3bit --experts-bits 3 --text ~/notes
      transformers-dsv3 compress ./DeepSeek-V3 --output ./V3-4bit --memory 64GiB --window 2048
    """
    from transformers_dsv3.compression.compress import compress as run
    from transformers_dsv3.compression.settings import CompressionSettings, parse_memory

    with as_bad_parameters():
        settings = CompressionSettings(bits, experts_bits, head_bits, method, tokens, window, min_tokens, seed)
        limit = None if memory is None else parse_memory(memory)
        try:
            record = run(checkpoint, output, settings, text=text, memory=limit, progress=True)
        except KeyboardInterrupt:
            typer.echo("\nStopped. The same command goes on at the layer where it was.", err=True)
            raise typer.Exit(130) from None
    show(record, output)


def show(record: CompressionRecord, output: Path) -> None:
    """Print sizes, and how many tokens each layer's experts saw."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a file or a pipe has no width of its own
    layers = [layer for layer in record.layers if layer.tokens_per_expert]
    if layers:
        table = Table(
            "layer", "tokens an expert: least", "median", "most", "experts not calibrated on their own tokens"
        )
        for layer in layers:
            counts = sorted(layer.tokens_per_expert)
            shown = [f"{n:,}" for n in (counts[0], counts[len(counts) // 2], counts[-1])]
            table.add_row(str(layer.layer), *shown, _listing(layer.uncalibrated))
        console.print(table)
    before, after = (f"{size / 1e6:,.1f} MB" for size in (record.bytes_before, record.bytes_after))
    console.print(
        f"{before} became {after}, {record.ratio:.2f} times less: {record.bits_per_weight:.2f} bits a weight, "
        f"{record.ratio_from_bf16:.2f} times less than bf16 and {record.ratio_from_fp32:.2f} than fp32.\n"
        f"The checkpoint is in {output}; compression_record.json there has every expert's tokens and method.",
        highlight=False,
        soft_wrap=True,
    )


def _listing(experts: list[int]) -> str:
    shown = ", ".join(map(str, experts[:12]))
    return shown if len(experts) <= 12 else f"{shown}, and {len(experts) - 12} more"
