"""`transformers-dsv3 quickstart`: train a small DeepSeek-V3 on real text, save it, and show what it does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .refusals import as_bad_parameters


def quickstart(
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Where the checkpoint goes. A folder of an earlier run is continued.")
    ] = Path("dsv3-quickstart"),
    text: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="A UTF-8 text file, or a folder with some. Default: Python's own library."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Training steps of this command. Default: 1000, three minutes on two cores.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the weights and the order of the data. Default: 0.")] = None,
) -> None:
    """Train a small DeepSeek-V3 (MLA, mixture of experts, MTP) from scratch on real text, in a few minutes.

    It reads the Python standard library's own source (or your text), trains a byte-level BPE and the model on most
    of it, saves an official checkpoint with its tokenizer, loads it back through AutoModelForCausalLM, completes
    three prompts, and measures it on the files it has not seen. Nothing is downloaded.

    Run the same command again to go on: an interrupted run is finished, a finished one is trained further.

    \b
    Examples:
      transformers-dsv3 quickstart
      transformers-dsv3 quickstart --output ./my-notes-model --text ~/notes
      transformers-dsv3 quickstart --steps 3000
    """
    from transformers_dsv3.data.text_files import TextError
    from transformers_dsv3.evaluation.quickstart import run_quickstart
    from transformers_dsv3.training.quickstart_run import QuickstartSettings

    if steps is not None and steps < 1:
        raise typer.BadParameter(f"{steps} is not at least 1", param_hint="--steps")
    if seed is not None and not 0 <= seed < 2**32:
        raise typer.BadParameter(f"{seed} does not lie between 0 and 2**32 - 1", param_hint="--seed")
    try:
        with as_bad_parameters():
            results = run_quickstart(
                output, text=text, steps=steps, seed=seed, settings=QuickstartSettings(), say=typer.echo
            )
    except TextError as error:
        raise typer.BadParameter(str(error), param_hint="--text") from None
    except KeyboardInterrupt:
        typer.echo(
            f"\nStopped. The same command goes on from the last checkpoint; one is saved every "
            f"{QuickstartSettings.save_every} steps.",
            err=True,
        )
        raise typer.Exit(130) from None
    show(results, output)


def show(results: dict[str, Any], output: Path) -> None:
    """Print the completions and the table of figures."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for completion in results["completions"]:
        text = Text(completion["prompt"], style="bold")
        text.append(completion["text"], style="not bold")
        console.print(Panel(text, title="completion", title_align="left"))

    held_out, decode, cache = results["held_out"], results["decode"], results["cache_bytes_per_token"]
    rate = results["training"]["tokens_per_second"]
    table = Table("measured", "figure", "beside it", title=f"{output} after {results['steps']:,} steps")
    table.add_row(
        "held-out bits per byte",
        f"{held_out['bits_per_byte']:.3f}",
        f"zlib -9 {held_out['zlib_bits_per_byte']:.3f}, lzma -9e {held_out['lzma_bits_per_byte']:.3f}, same text",
    )
    table.add_row(
        "parameters",
        f"{results['parameters']['total'] / 1e6:.1f} M",
        f"{results['parameters']['active'] / 1e6:.1f} M active a token",
    )
    routing = results["routing"]["mean"]
    table.add_row(
        "held-out utilisation of experts",
        f"{routing['utilisation']:.0%}",
        f"mean over largest load; load entropy {routing['load_entropy']:.3f}, {routing['dead_experts']:.0f} dead",
    )
    table.add_row(
        "training tokens/s",
        f"{rate:,.0f}" if rate else "no step was left to train",
        f"{results['training']['tokens']:,} tokens in {results['training']['seconds']:.0f} s",
    )
    table.add_row(
        "greedy decode tokens/s",
        f"{decode['greedy_tokens_per_second']:.0f}",
        f"native Transformers {decode['native_greedy_tokens_per_second']:.0f}, same weights",
    )
    if "mtp_acceptance_rate" in decode:
        table.add_row(
            "MTP drafts accepted, greedy",
            f"{decode['mtp_acceptance_rate']:.0%}",
            f"{decode['greedy_mtp_tokens_per_second']:.0f} tokens/s with use_mtp=True; "
            f"sampling {decode['mtp_acceptance_rate_sampled']:.0%}",
        )
    table.add_row(
        "cache bytes a token", f"{cache['plugin']:,.0f}", f"native Transformers {cache['native']:,.0f}, same weights"
    )
    table.add_row("whole command", f"{results['seconds']:.0f} s", "")
    console.print(table)
    console.print(f"An official deepseek_v3 checkpoint is in {output}; run the same command to train it further.")
