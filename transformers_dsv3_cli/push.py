"""`transformers-dsv3 push`: a checkpoint or an adapter to the Hub."""

from __future__ import annotations

from typing import Annotated

import typer


def push(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A folder: a model with its tokenizer and card, or an adapter.")
    ],
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="NAMESPACE/NAME, or NAME under the account that is logged in.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to, made if needed. Default: main.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    message: Annotated[str | None, typer.Option(help="Title of the commit. Default: Upload model.")] = None,
    base_model: Annotated[
        str | None, typer.Option(metavar="REPO_ID", help="For an adapter: its base model's name on the Hub.")
    ] = None,
    include_code: Annotated[
        bool,
        typer.Option(
            "--include-code",
            help="Add a small file by which trust_remote_code=True picks this package's classes.",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the folder and list what would be pushed; ask nothing of the Hub.")
    ] = False,
) -> None:
    """Upload a checkpoint, or an adapter, with its tokenizer and card to the Hugging Face Hub, in one commit.

    The checkpoint is checked first: every shard of the index is there and whole, and the weights fit the config.
    Optimizer states, pickled files and whatever is no part of a model repository stay behind. An upload that is cut
    off leaves the repository as it was; run the same command again, and it sends what has not arrived yet.

    The access token is that of `hf auth login`, or of the environment variable HF_TOKEN.

    \b
    Examples:
      transformers-dsv3 push ./dsv3-quickstart my-model --dry-run
      transformers-dsv3 push ./dsv3-quickstart my-model --private
      transformers-dsv3 push ./lora-adapter me/my-adapter --base-model me/my-model
      transformers-dsv3 push ./dsv3-quickstart lab/model --create-pr --message "Longer training"
    """
    from huggingface_hub import get_token

    from transformers_dsv3.hub.hub_errors import HubError
    from transformers_dsv3.hub.model_folder import CheckpointError, read_model_folder
    from transformers_dsv3.hub.push import SAFE_TO_REPEAT, prepare, push_to_hub

    try:
        if dry_run:
            folder = read_model_folder(checkpoint, get_token())
            prepare(folder, base_model, include_code)
            for name, size in sorted(folder.files.items()):
                typer.echo(f"{_size(size):>10}  {name}")
            for name, why in sorted(folder.left_out.items()):
                typer.echo(f"{'stays here':>10}  {name}: {why}")
            for remark in folder.remarks:
                typer.echo(f"Note: {remark}", err=True)
            return
        commit = push_to_hub(
            checkpoint,
            repo_id,
            base_model=base_model,
            private=private or None,
            revision=revision,
            create_pr=create_pr,
            commit_message=message,
            include_code=include_code,
        )
    except (CheckpointError, HubError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo(f"\nStopped. {SAFE_TO_REPEAT}.", err=True)
        raise typer.Exit(130) from None
    typer.echo(commit.pr_url or commit.commit_url)


def _size(size: float) -> str:
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
