"""`transformers-dsv3 compress`: a checkpoint to 8 to 2 bits a weight and fewer experts, calibrated on a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .plan_table import print_choice, print_plan
from .refusals import as_bad_parameters


if TYPE_CHECKING:
    from transformers_dsv3.compression.compression_record import CompressionRecord


def compress(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A folder, in bf16, fp32, fp16 or FP8. With --plan also a config.json, or the name of a published "
            "model.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to make for the compressed checkpoint.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print what it would give, from the configuration alone.")
    ] = False,
    target_ratio: Annotated[
        float | None,
        typer.Option(help="Times smaller to become, by the gentlest bits and share of experts that do it."),
    ] = None,
    fit: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="The same for memory to run it in, 4k tokens of context: 12GiB, …"),
    ] = None,
    ratio_from: Annotated[
        str | None, typer.Option(help="What --target-ratio counts from: bf16 or fp32. Default: bf16.")
    ] = None,
    bits: Annotated[
        int | None, typer.Option(help="Of a weight of linear layers: 8, 4, or 16, which leaves them. Default: 4.")
    ] = None,
    experts_bits: Annotated[
        int | None, typer.Option(help="Of a weight of routed experts: 8, 4, 3 or 2. Default: as --bits.")
    ] = None,
    head_bits: Annotated[
        int | None,
        typer.Option(help="Of a weight of the embedding and the output head: 8, 4, or 16, as vLLM needs. Default: 8."),
    ] = None,
    prune: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Of the routed experts of each layer to remove, before: 0.5, …"),
    ] = None,
    prune_by: Annotated[
        str, typer.Option(help="What they are chosen by on the text: reap, frequency or random.")
    ] = "reap",
    heal: Annotated[
        int,
        typer.Option(metavar="STEPS", help="Of training what is left on the text, with the whole model as teacher."),
    ] = 0,
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

    One layer is in memory at a time, and of its experts one; activations are on disk. Only --prune and --heal have the
    whole model in memory. Stopped in whatever way, the same command goes on where it was: until it has ended, what is
    finished is in a hidden folder beside the output. The result has compressed-tensors' packed weights, and a record
    of every expert's tokens and method.

    \b
    Examples:
      transformers-dsv3 compress ./dsv3-quickstart --output ./dsv3-4bit
      transformers-dsv3 compress ./dsv3-quickstart --output ./dsv3-3bit --experts-bits 3 --text ~/notes
      transformers-dsv3 compress moonlight-16b-a3b --plan --target-ratio 7.6
      transformers-dsv3 compress ./dsv3-quickstart --output ./dsv3-half --experts-bits 3 --prune 0.5 --heal 200
      transformers-dsv3 compress ./DeepSeek-V3 --output ./V3-4bit --memory 64GiB --window 2048
    """
    from transformers_dsv3.compression.compress import compress as run
    from transformers_dsv3.compression.plan import gentlest, model_config, settings_that_reach
    from transformers_dsv3.compression.plan import plan as planned
    from transformers_dsv3.compression.settings import CompressionSettings, parse_memory
    from transformers_dsv3.option_error import OptionError

    with as_bad_parameters():
        chosen = {"bits": bits, "experts_bits": experts_bits, "head_bits": head_bits, "prune": prune}
        chosen = {name: value for name, value in chosen.items() if value is not None}
        has_target = target_ratio is not None or fit is not None
        if has_target and chosen:
            option = "--target-ratio" if target_ratio is not None else "--fit"
            raise OptionError(option, f"chooses --{next(iter(chosen)).replace('_', '-')}: give one of them")
        if ratio_from is not None and target_ratio is None:
            raise OptionError("--ratio-from", "says what --target-ratio counts from: give that too")
        others = {"method": method, "tokens": tokens, "window": window, "min_tokens": min_tokens, "seed": seed}
        settings = CompressionSettings(**chosen, **others, prune_by=prune_by, heal=heal)  # type: ignore[arg-type]
        limit = None if memory is None else parse_memory(memory)
        target = (target_ratio, None if fit is None else parse_memory(fit, "--fit"), ratio_from or "bf16")
        if plan:
            config = model_config(checkpoint)
            if has_target:
                print_choice(gentlest(config, *target), str(checkpoint))
            else:
                print_plan(planned(config, settings), str(checkpoint))
            return
        if output is None:
            raise OptionError("--output", "is needed, a folder to make; or --plan, which makes none")
        if has_target:
            settings = settings_that_reach(model_config(checkpoint), settings, *target)
            typer.echo(f"Chosen: {settings}")
        try:
            record = run(checkpoint, output, settings, text=text, memory=limit, progress=True)
        except KeyboardInterrupt:
            typer.echo("\nStopped. The same command goes on where it was.", err=True)
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
