"""`transformers-dsv3 serve`: an OpenAI-compatible server and a page, for many at once."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from .options import Device, Dtype
from .refusals import as_bad_parameters


NEEDED = ("starlette", "uvicorn", "sse_starlette", "prometheus_client", "llguidance")


def serve(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A folder, a .gguf file, or a repository id on the Hub.")
    ],
    host: Annotated[str, typer.Option(help="Where it listens: 127.0.0.1 is this machine alone, 0.0.0.0 all.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    bits: Annotated[
        int | None, typer.Option(metavar="4|8", help="Round the weights to so many bits when they are loaded.")
    ] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER",
            help="A PEFT adapter, which clients ask for by `model: NAME`; may be given several times.",
        ),
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="What clients call the model. Default: CHECKPOINT.")
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A Jinja template, in place of the checkpoint's own.")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY",
            envvar="TRANSFORMERS_DSV3_API_KEY",
            show_envvar=True,
            help="Asked of every request as `Authorization: Bearer KEY`; may be given several times. Better given by "
            "the environment: arguments are seen by everyone on a machine.",
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="ORIGIN", help="A site whose pages may ask, as https://chat.example; * is all of them."),
    ] = None,
    cache_gib: Annotated[
        float | None,
        typer.Option(metavar="GIB", help="Memory for latents of texts. Default: a quarter of what is free."),
    ] = None,
    max_sequence: Annotated[
        int | None, typer.Option(help="Tokens of a prompt and its text. Default: the model's own limit.")
    ] = None,
    max_running: Annotated[int, typer.Option(help="Texts that are made at a time.")] = 128,
    max_waiting: Annotated[int, typer.Option(help="Texts that may wait; what comes beyond gets 429.")] = 1000,
    max_batch_tokens: Annotated[int, typer.Option(help="Tokens that a step computes, at most.")] = 512,
    tpot_ms: Annotated[
        float | None,
        typer.Option(
            metavar="MS", help="Milliseconds between two tokens of a text that others' prompts may not exceed."
        ),
    ] = None,
    max_body_mib: Annotated[float, typer.Option(metavar="MIB", help="Of one request.")] = 8.0,
    body_seconds: Annotated[float, typer.Option(help="In which a request has to arrive.")] = 30.0,
    request_seconds: Annotated[float, typer.Option(help="In which an answer has to be done.")] = 3600.0,
    max_pictures: Annotated[
        int, typer.Option(help="Pictures and videos of one request, those of earlier turns included; 0 takes none.")
    ] = 16,
    max_picture_mib: Annotated[float, typer.Option(metavar="MIB", help="Of a picture or a video, as a file.")] = 8.0,
    max_megapixels: Annotated[
        float, typer.Option(help="Of all pictures of a request, and of the frames taken of its videos.")
    ] = 64.0,
    max_frames: Annotated[int, typer.Option(help="Frames that are taken of a video, at equal distances.")] = 8,
    allow_media_from: Annotated[
        list[str] | None,
        typer.Option(
            metavar="HOST",
            help="A host from which pictures are fetched that requests name by address, as images.example; * is every "
            "host. From private addresses nothing is. Default: none, pictures come within requests.",
        ),
    ] = None,
    drain_seconds: Annotated[
        float, typer.Option(help="After SIGTERM or Ctrl+C, for answers that have begun; a second one ends at once.")
    ] = 30.0,
    device: Device = None,
    dtype: Dtype = "auto",
) -> None:
    """Serve a checkpoint to many at once: OpenAI's endpoints, and a page to talk to it.

    \b
      /v1/chat/completions, /v1/completions    whole or streamed; JSON schemas, tools, log-probabilities; pictures
      /v1/models, /tokenize, /detokenize       what is served; text to tokens and back
      /v1/routing                              which experts a text goes to
      /health, /ready, /metrics                for whoever watches; Prometheus' format
      /                                        a page to talk to the model

    Requests are decoded together, each with its own settings. Quantised checkpoints (compressed-tensors, GGUF) are
    served as they are; where there is a vision tower, pictures and videos are read. What is wrong with the options is
    said before anything is loaded.

    \b
    Examples:
      transformers-dsv3 serve ./dsv3-quickstart
      transformers-dsv3 serve ./dsv3-quickstart --bits 8 --port 8001
      transformers-dsv3 serve ./model-q4_0.gguf --host 0.0.0.0 --max-running 32
      transformers-dsv3 serve ./base --adapter poet=./poet-lora --adapter clerk=./clerk-lora
      transformers-dsv3 serve ./joined --max-pictures 4 --allow-media-from images.example
      curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
        -d '{"prompt": "def main(", "max_tokens": 32}'
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        typer.echo(
            f"The server needs {', '.join(NEEDED)}; {', '.join(missing)} is not installed. Install them with\n"
            "  pip install 'transformers-dsv3[serve]'",
            err=True,
        )
        raise typer.Exit(1)

    from .server import EngineOptions, ServerOptions, run_server

    with as_bad_parameters():
        run_server(
            checkpoint,
            ServerOptions(
                host=host,
                port=port,
                model_name=model_name,
                chat_template=chat_template,
                api_keys=tuple(api_key or ()),
                allow_origins=tuple(allow_origin or ()),
                max_body_mib=max_body_mib,
                body_seconds=body_seconds,
                request_seconds=request_seconds,
                drain_seconds=drain_seconds,
                max_pictures=max_pictures,
                max_picture_mib=max_picture_mib,
                max_megapixels=max_megapixels,
                max_frames=max_frames,
                media_hosts=tuple(allow_media_from or ()),
            ),
            EngineOptions(
                bits=bits,
                adapters=tuple(adapter or ()),
                cache_gib=cache_gib,
                max_sequence=max_sequence,
                max_running=max_running,
                max_waiting=max_waiting,
                max_batch_tokens=max_batch_tokens,
                tpot_ms=tpot_ms,
                device=device,
                dtype=dtype,
            ),
            say=typer.echo,
        )
