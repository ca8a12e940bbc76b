"""Uploads of checkpoints and adapters to the Hugging Face Hub.

Everything that can be known beforehand is checked first. Then all large files are uploaded, which nobody sees yet,
and one commit puts the whole into place: readers find the repository as it was or as it will be, never in between. An
upload that is cut off leaves the repository as it was; the next one does not send again what has arrived.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
)
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash
from safetensors import SafetensorError
from transformers.utils import logging

from ..evaluation.checkpoint_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG
from .code_file import AUTO_MAP, CODE, CODE_FILE
from .hub_errors import HTTPError, HubError, reason
from .model_folder import CARD, ModelFolder, read_model_folder, set_base_model
from .patience import bounded_silence


logger = logging.get_logger(__name__)

# The answer to the commit itself may have been lost
SAFE_TO_REPEAT = (
    "A push is one commit: the repository has all of it or is as it was. Run the same again: files that have arrived "
    "are not sent a second time"
)


def push_to_hub(
    model: Any,
    repo_id: str,
    *,
    tokenizer: Any = None,
    card: Any = None,
    base_model: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    include_code: bool = False,
    token: str | None = None,
) -> CommitInfo:
    """Uploads a model or an adapter with its tokenizer and card to the Hub, in one commit.

    The repository is made if it is not there. What it has of other weights is deleted in the same commit, since
    Transformers reads a single file before an index of shards, and an adapter beside a model with it. Optimizer
    states, pickled files and whatever is no part of a model repository stay behind.

    Args:
        model: a folder that `save_pretrained` wrote, or a model or PEFT model, which is saved to a temporary folder.
        repo_id: `name` or `namespace/name`.
        tokenizer: saved beside a model object; a folder has its own.
        card: the README.md beside a model object: a `huggingface_hub.ModelCard`, as `model_card` makes one from
            records, or the path of a file, whose folder `figures` goes with it; a folder has its own.
        base_model: the name on the Hub that the adapter's config gets for its base model.
        private: whether a new repository is private; the account's default if `None`. An existing repository that is
            public is refused if this is `True`.
        revision: the branch to commit to, made if it is not there; `main` if `None`.
        create_pr: whether to open a pull request instead, for which nothing but read access is needed.
        commit_message: title of the commit, and of the pull request.
        include_code: whether to add a small file by which `trust_remote_code=True` picks this package's classes.
        token: an access token; the one of `hf auth login` or of `HF_TOKEN` if `None`.

    Returns:
        The commit, `oid` its hash and `commit_url` its address; the last one there is if nothing had changed.

    Raises:
        CheckpointError: a folder that is no checkpoint, or a broken one. Nothing was asked of the Hub.
        HubError: no or an invalid token, no access, an unfit name or revision, no space for a model object's files, or
            an upload that failed. The repository has all of the push or is as it was.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(model, (str, Path)):
            if tokenizer is not None or card is not None:
                raise ValueError("`tokenizer` and `card` go with a model object; a folder has its own")
            path = Path(model)
        else:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="push-")))
            _save(model, tokenizer, card, path)
        folder = read_model_folder(path, token or get_token())
        prepare(folder, base_model, include_code)
        for remark in folder.remarks:
            logger.warning(f"{path}: {remark}")
        return _push(folder, repo_id, private, revision, create_pr, commit_message, token)


def prepare(folder: ModelFolder, base_model: str | None = None, include_code: bool = False) -> None:
    """Makes those changes to a folder's files for the repository that `push_to_hub` was asked for.

    Raises:
        CheckpointError: they do not go with this folder.
    """
    set_base_model(folder, base_model)
    if include_code:
        folder.require_model("include_code")
        folder.write_json(CONFIG, {**folder.read_json(CONFIG), "auto_map": AUTO_MAP})
        folder.replaced[CODE_FILE] = CODE.encode()
        folder.files[CODE_FILE] = len(folder.replaced[CODE_FILE])


def _save(model: Any, tokenizer: Any, card: Any, path: Path) -> None:
    try:
        _save_files(model, tokenizer, card, path)
    except (OSError, SafetensorError) as error:
        raise HubError(
            f"cannot save the model in {path} to upload it from there: {reason(error)}. TMPDIR names another disk. "
            "Nothing was uploaded"
        ) from error


def _save_files(model: Any, tokenizer: Any, card: Any, path: Path) -> None:
    model.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    if card is None:
        # PEFT writes one without content of its own
        (path / CARD).unlink(missing_ok=True)
    elif isinstance(card, (str, Path)):
        shutil.copyfile(card, path / CARD)
        figures = Path(card).parent / "figures"
        if figures.is_dir():
            shutil.copytree(figures, path / "figures")
    else:
        card.save(path / CARD)


@dataclass(frozen=True)
class _Target:
    """The repository as it is before the push."""

    repo_id: str
    exists: bool
    head: str | None = None
    files: dict[str, RepoFile] = field(default_factory=dict)
    branch_exists: bool = True


def _push(
    folder: ModelFolder,
    repo_id: str,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    commit_message: str | None,
    token: str | None,
) -> CommitInfo:
    api = HfApi(token=token, library_name="transformers_dsv3")
    with bounded_silence():
        target = _check_target(api, repo_id, private, revision, create_pr)
        operations = [
            CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder.replaced.get(name, str(folder.path / name)))
            for name in folder.files
        ]
        stale = [CommitOperationDelete(path_in_repo=name) for name in _superseded(folder, set(target.files))]
        try:
            if not target.exists:
                api.create_repo(target.repo_id, private=private)
            if not target.branch_exists:
                assert revision is not None
                api.create_branch(target.repo_id, branch=revision)
            commit = api.create_commit(
                target.repo_id,
                [*stale, *operations],
                commit_message=commit_message or f"Upload {'adapter' if folder.is_adapter else 'model'}",
                revision=revision,
                create_pr=create_pr,
                parent_commit=target.head,
            )
        except (HTTPError, OSError, RuntimeError, ValueError) as error:
            raise HubError(f"pushing to {target.repo_id} failed: {reason(error)}. {SAFE_TO_REPEAT}") from error
        try:
            _check_arrival(api, target.repo_id, commit.oid, operations)
        except (HTTPError, OSError, ValueError) as error:
            raise HubError(f"{commit.commit_url} is there, but could not be compared: {reason(error)}") from error
        return commit


def _check_target(api: HfApi, repo_id: str, private: bool | None, revision: str | None, create_pr: bool) -> _Target:
    """Who may write what where, before anything is uploaded. Raises `HubError`."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is no name of a repository (`namespace/name`): {reason(error)}") from None
    try:
        account = api.whoami()
        if "/" not in repo_id:
            repo_id = f"{account['name']}/{repo_id}"
        try:
            api.auth_check(repo_id, write=not create_pr)
        except RepositoryNotFoundError:
            return _check_new(api, repo_id, account, revision, create_pr)
        info = api.model_info(repo_id)
        if private and not info.private:
            raise HubError(
                f"{repo_id} exists and is public, and --private (private=True) was asked for. Make it private in its "
                "settings, or choose another name"
            )
        branch = revision or "main"
        refs = api.list_repo_refs(repo_id, include_pull_requests=True)
        branches = {ref.name: ref.target_commit for ref in refs.branches}
        branches |= {ref.ref: ref.target_commit for ref in refs.pull_requests or []}
        if branch not in branches and (branch in {ref.name for ref in refs.tags} or _is_commit(branch)):
            raise HubError(f"{branch!r} is a tag or a commit of {repo_id}, and those do not change: name a branch")
        if create_pr and branch not in branches:
            raise HubError(f"{repo_id} has no branch {branch!r} to open a pull request for")
        head = branches.get(branch, info.sha)
        tree = api.list_repo_tree(repo_id, revision=head, recursive=True)
        files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
        return _Target(repo_id, True, head, files, branch_exists=branch in branches)
    except (HTTPError, OSError, ValueError) as error:
        raise HubError(f"cannot push to {repo_id}: {reason(error)}. Nothing was uploaded") from error


def _check_new(api: HfApi, repo_id: str, account: dict[str, Any], revision: str | None, create_pr: bool) -> _Target:
    """The same for a repository that is not there."""
    if create_pr:
        raise HubError(f"cannot open a pull request: there is no repository {repo_id}, or no access to it")
    namespaces = {account["name"], *(org["name"] for org in account.get("orgs", []))}
    namespace = repo_id.split("/")[0]
    if namespace not in namespaces:
        raise HubError(
            f"cannot make {repo_id}: the token is {account['name']}'s, and gives no access to {namespace!r}"
        )
    role = account.get("auth", {}).get("accessToken", {}).get("role")
    if role == "read":
        raise HubError(
            f"cannot make {repo_id}: the token can only read. Make one that can write. Nothing was uploaded"
        )
    for other in ("dataset", "space"):
        if api.repo_exists(repo_id, repo_type=other):
            raise HubError(
                f"{repo_id} is a {other}, not a model. Choose another name; if you do want a model of the same name, "
                f"make it first with `hf repos create {repo_id}`"
            )
    return _Target(repo_id, False, branch_exists=revision in (None, "main"))


def _superseded(folder: ModelFolder, there: set[str]) -> list[str]:
    """Files of the repository that would be read in place of the new ones, or with them."""
    old = set()
    if not folder.is_adapter:
        old |= {name for name in there if _is_weights(name)}
        old |= {ADAPTER_CONFIG, ADAPTER_WEIGHTS, "adapter_model.bin", CODE_FILE} & there
    return sorted(old - set(folder.files))


def _is_weights(name: str) -> bool:
    return "/" not in name and (
        name in ("model.safetensors", "model.safetensors.index.json")
        or (name.startswith("model-") and name.endswith(".safetensors") and "-of-" in name)
    )


def _is_commit(revision: str) -> bool:
    return len(revision) == 40 and set(revision) <= set("0123456789abcdef")


def _check_arrival(api: HfApi, repo_id: str, commit: str, operations: list[CommitOperationAdd]) -> None:
    """Compares the hashes of what the repository has now with those of what was sent."""
    tree = api.list_repo_tree(repo_id, revision=commit, recursive=True)
    there = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    for operation in operations:
        entry = there.get(operation.path_in_repo)
        if entry is None:
            raise HubError(f"{operation.path_in_repo} is not in commit {commit} of {repo_id}")
        if entry.lfs is not None:
            same = entry.lfs.sha256 == operation.upload_info.sha256.hex()
        else:
            with operation.as_file() as file:
                same = entry.blob_id == git_hash(file.read())
        if not same:
            raise HubError(f"{operation.path_in_repo} in commit {commit} of {repo_id} is not the file that was sent")
