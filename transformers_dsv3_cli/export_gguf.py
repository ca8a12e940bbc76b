"""`transformers-dsv3 export-gguf`: a checkpoint to a GGUF file for llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .refusals import as_bad_parameters


def export_gguf(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="A folder, or a repository id on the Hub.")],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The file to write, such as model-q8_0.gguf.")],
    type: Annotated[
        str,
        typer.Option(help="f32, bf16, q8_0 or q4_0; or one that llama.cpp's llama-quantize makes, such as q4_k_m."),
    ] = "q8_0",
) -> None:
    """Write a checkpoint as a GGUF file, with its tokenizer, chat template and MTP layers.

    llama.cpp's own converter leaves the MTP layers out; with them llama.cpp drafts. The checkpoint may be bf16 or
    fp32, DeepSeek's FP8, or compressed-tensors in 8 bits and fewer, whose whole numbers are kept bit for bit. Memory
    stays small, whatever the model's size. Killed, it leaves FILE.partial; the same command begins anew.

    \b
    Examples:
      transformers-dsv3 export-gguf ./dsv3-quickstart --output dsv3-quickstart-q8_0.gguf
      transformers-dsv3 export-gguf ./dsv3-quickstart --output dsv3-quickstart-q4_0.gguf --type q4_0
      transformers-dsv3 export-gguf moonshotai/Moonlight-16B-A3B --output moonlight.gguf --type q4_k_m
    """
    from transformers_dsv3.compression.gguf.export import export_gguf as export

    try:
        with as_bad_parameters():
            path = export(checkpoint, output, type=type)
    except (OSError, RuntimeError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("\nStopped. Nothing is left; the same command begins anew.", err=True)
        raise typer.Exit(130) from None
    typer.echo(f"{path}: {path.stat().st_size:,} bytes")
