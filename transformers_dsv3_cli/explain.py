"""`transformers-dsv3 explain`: which backend serves which part of a checkpoint's model here."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Device, Dtype
from .refusals import as_bad_parameters


def explain(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A folder, a repository id on the Hub, or a GGUF file.")
    ],
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Load a checkpoint and say which backend serves its attention, experts, linear layers and decoding steps.

    Of every other backend it says why it cannot serve, what would have to be installed, or how to choose it.

    \b
    Examples:
      transformers-dsv3 explain ./dsv3-quickstart
      transformers-dsv3 explain ./dsv3-quickstart-q8_0.gguf
      transformers-dsv3 explain moonshotai/Moonlight-16B-A3B --device cuda --dtype bfloat16
      TRANSFORMERS_DSV3_BACKENDS=attention=flash_attention_3_mla transformers-dsv3 explain ./model --device cuda
    """
    from transformers_dsv3.data.local_paths import load_refusal, model_arguments
    from transformers_dsv3.evaluation.loading import check_device, check_dtype

    with as_bad_parameters():
        check_dtype(dtype)
        check_device(device)

    from transformers import AutoConfig, AutoModelForCausalLM

    import transformers_dsv3

    try:
        named = model_arguments(checkpoint)
        config = AutoConfig.from_pretrained(**named)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(load_refusal(checkpoint, error), param_hint="CHECKPOINT") from None
    if config.get_text_config().model_type != "deepseek_v3":
        raise typer.BadParameter(
            f"{checkpoint} is a {config.model_type!r} checkpoint, not 'deepseek_v3'", param_hint="CHECKPOINT"
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(**named, dtype=dtype, device_map=device)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(load_refusal(checkpoint, error), param_hint="CHECKPOINT") from None
    typer.echo(transformers_dsv3.explain(model))
