"""`transformers-dsv3 pull`: a model repository from the Hub, every file compared with the Hub's hash."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def pull(
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="NAMESPACE/NAME.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit. Default: main.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder to make. Default: the cache that from_pretrained reads."),
    ] = None,
) -> None:
    """Download a model repository from the Hugging Face Hub and compare every file's hash with the Hub's.

    `from_pretrained` downloads by itself, and compares sizes only when it does so over plain HTTP. A file that arrived
    wrong is thrown away and fetched again. Stopped or cut off, the same command goes on with the missing files.

    The access token for private repositories is that of `hf auth login`, or of the environment variable HF_TOKEN.

    \b
    Examples:
      transformers-dsv3 pull moonshotai/Moonlight-16B-A3B
      transformers-dsv3 pull me/my-model --revision v2 --output ./my-model
    """
    from transformers_dsv3.hub.hub_errors import HubError
    from transformers_dsv3.hub.pull import pull_from_hub

    try:
        folder = pull_from_hub(repo_id, revision=revision, output=output)
    except (HubError, FileExistsError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo("\nStopped. The same command goes on with the files that are missing.", err=True)
        raise typer.Exit(130) from None
    typer.echo(folder)
