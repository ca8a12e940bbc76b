"""`transformers-dsv3 serve`: Transformers' own server, with the plugin registered."""

from __future__ import annotations

import typer


def serve(context: typer.Context) -> None:
    """Start Transformers' own OpenAI-compatible server with the plugin registered.

    `deepseek_v3` checkpoints are served by the plugin's classes, others by Transformers' own. Endpoints:
    /v1/completions, /v1/chat/completions, /v1/responses, /v1/models, /health.

    The arguments are those of the installed `transformers serve`. Behind a checkpoint, --help lists them all; the
    first that people need:

    \b
      --host, --port                     where it listens
      --device, --dtype                  where the model is loaded, and how
      --attn-implementation              by name, as for from_pretrained
      --continuous-batching              paged attention, for many requests at once

    \b
    Examples:
      transformers-dsv3 serve ./dsv3-quickstart --port 8000
      transformers-dsv3 serve ./dsv3-quickstart --help
      curl http://localhost:8000/v1/completions -H "Content-Type: application/json" \\
        -d '{"model": "./dsv3-quickstart", "prompt": "def main(", "max_tokens": 32}'
    """
    from transformers.utils.import_utils import is_serve_available

    if not is_serve_available():
        typer.echo(
            "The server needs fastapi, uvicorn, openai and pydantic, which are not all installed. Install them with\n"
            "  pip install 'transformers-dsv3[serve]'",
            err=True,
        )
        raise typer.Exit(1)

    from .server import server_command

    server_command(context.args, help_text=serve.__doc__ or "")
