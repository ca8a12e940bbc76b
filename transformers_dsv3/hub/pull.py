"""Downloads from the Hugging Face Hub whose every byte is checked.

`huggingface_hub` compares the size of what it downloads over HTTP, not the hash, and a flipped byte in a weight is no
error that loading could see. Here each file's hash is compared with the repository's.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import filter_repo_objects, validate_repo_id
from transformers.utils import logging

from ..evaluation.checkpoint_folder import ADAPTER_CONFIG, CONFIG
from ..models.dsv3.checkpoint_files_dsv3 import CheckpointError, listing, read_checkpoint, resolve_checkpoint
from .hub_errors import HTTPError, HubError, reason
from .model_folder import PICKLED
from .patience import bounded_silence, may_pass


logger = logging.get_logger(__name__)

_ATTEMPTS = 2  # at a file that arrives wrong
_PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0)  # after connections that fail, s
_TIMEOUT = 30.0  # of the first question to the Hub, s


def pull_from_hub(
    repo_id: str,
    *,
    revision: str | None = None,
    output: str | Path | None = None,
    cache_dir: str | Path | None = None,
    token: str | None = None,
) -> Path:
    """Downloads a model repository and compares every file's hash with the Hub's.

    All files are of one commit. A file that arrived wrong is thrown away and fetched once more; lost connections and a
    Hub that is out of order for a while are waited for. Pickled files are left out. After an interruption the next
    call goes on with the files that are still missing.

    Args:
        repo_id: `namespace/name`.
        revision: branch, tag or commit; `main` if `None`.
        output: a folder to make, which appears when all of it is there and checked. The cache of `from_pretrained` if
            `None`, from which that then loads.
        cache_dir: another cache than the usual one.
        token: an access token; the one of `hf auth login` or of `HF_TOKEN` if `None`.

    Returns:
        The folder with the files.

    Raises:
        FileExistsError: there is something in `output`.
        HubError: there is no such repository or revision, no access, no model in it, no space for it, or the download
            failed. No file of it that is wrong or incomplete is left where it would be loaded.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise HubError(f"{repo_id!r} is no name of a repository (`namespace/name`): {reason(error)}") from None
    if output is None:
        cache = Path(cache_dir or constants.HF_HUB_CACHE)
        return _download(HfApi(token=token), repo_id, revision, {"cache_dir": cache}, near=cache)
    output = Path(output).expanduser().absolute()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} is there already")
    # Under a name that says what it is, and that the next call finds again
    partial = output.with_name(f".{output.name}.partial")
    _download(HfApi(token=token), repo_id, revision, {"local_dir": partial}, near=output.parent)
    shutil.rmtree(partial / ".cache", ignore_errors=True)
    os.replace(partial, output)
    return output


def _download(api: HfApi, repo_id: str, revision: str | None, place: dict[str, Path], near: Path) -> Path:
    """Downloads to a `local_dir` or into a `cache_dir`, checks, and returns the folder. `near` is on its disk."""
    files: dict[str, Any] = {"ignore_patterns": list(PICKLED), **place}
    try:
        with bounded_silence():
            info = api.model_info(repo_id, revision=revision, timeout=_TIMEOUT)
            if not {file.rfilename for file in info.siblings or []} & {CONFIG, ADAPTER_CONFIG}:
                raise HubError(f"{repo_id} is no model: it has neither {CONFIG} nor {ADAPTER_CONFIG}")
            planned = api.snapshot_download(repo_id, revision=info.sha, dry_run=True, **files)
            _check_space(sum(file.file_size or 0 for file in planned if file.will_download), near, repo_id)
            return _download_checked(api, repo_id, revision, str(info.sha), files)
    except (HTTPError, OSError, ValueError) as error:
        raise HubError(
            f"downloading {repo_id} failed: {reason(error)}. Run the same again: files that are there are kept"
        ) from error


def _download_checked(api: HfApi, repo_id: str, revision: str | None, commit: str, files: dict[str, Any]) -> Path:
    in_cache = "cache_dir" in files
    place = {name: files[name] for name in files if name.endswith("_dir")}
    for _ in range(_ATTEMPTS):
        # The cache has to know the branch by its name. Whatever that is now, the folder has the commit's
        folder = _download_patiently(api, repo_id, revision if in_cache else commit, files)
        commit = folder.name if in_cache else commit
        result = api.verify_repo_checksums(repo_id, revision=commit, **place)
        wrong = [mismatch["path"] for mismatch in result.mismatches]
        for name in wrong:
            _throw_away(folder / name)
        wrong += filter_repo_objects(result.missing_paths, ignore_patterns=list(PICKLED))
        if not wrong:
            break
    else:
        raise HubError(
            f"{listing(sorted(wrong))} of {repo_id} did not arrive as the Hub has it, {_ATTEMPTS} times, and is "
            "not kept. Try another network"
        )
    if not in_cache:
        for name in result.extra_paths:  # of another revision, from an earlier call
            (folder / name).unlink()
    _check_whole(folder, repo_id)
    return folder


def _download_patiently(api: HfApi, repo_id: str, revision: str | None, files: dict[str, Any]) -> Path:
    """Downloads what is missing. Failures that may pass are waited for, since huggingface_hub itself waits for few."""
    pauses = iter(_PAUSES)
    while True:
        try:
            return Path(api.snapshot_download(repo_id, revision=revision, **files))
        except (HTTPError, OSError, ValueError) as error:
            pause = next(pauses, None)
            if pause is None or not may_pass(error):
                raise
            logger.warning(f"{repo_id}: {reason(error)}. Trying again in {pause:.0f} s")
            time.sleep(pause)


def _check_space(size: int, near: Path, repo_id: str) -> None:
    while not near.exists():
        near = near.parent
    free = shutil.disk_usage(near).free
    if size > free:
        raise HubError(f"{repo_id} needs {size / 1e9:.1f} GB more, and {near} has {free / 1e9:.1f} GB free")


def _throw_away(file: Path) -> None:
    """Removes a file, and in a cache what it links to."""
    target = file.resolve()
    file.unlink(missing_ok=True)
    target.unlink(missing_ok=True)


def _check_whole(folder: Path, repo_id: str) -> None:
    """What arrived is what the Hub has; that may still be a broken checkpoint."""
    if not (folder / CONFIG).is_file():
        return
    try:
        found = resolve_checkpoint(str(folder))
        if found is not None:
            read_checkpoint(found.files, found.index)
    except CheckpointError as error:
        raise HubError(f"{repo_id} is as it is on the Hub, and broken there: {error}") from None
