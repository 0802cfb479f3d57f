"""Download models from the hub: only the files that are needed, only safetensors, with their checksums verified."""

from __future__ import annotations

import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path, PurePosixPath

from diffusers.pipelines.pipeline_loading_utils import variant_compatible_siblings
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError

from looc_ldm.utils.errors import ModelError, UserError
from looc_ldm.utils.files import check_folder, read_json
from looc_ldm.utils.hub_errors import HTTPError, hub_errors

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def download(repo_id: str, revision: str | None = None, component: str | None = None) -> Path:
    """Download a model into the cache, unless it is there; if the hub is unreachable, take what the cache holds.

    Args:
        repo_id (`str`): "user/name".
        revision (`str`, *optional*): Branch, tag or commit.
        component (`str`, *optional*): The only component of a pipeline that is needed, for instance "vqvae".

    Returns:
        `Path`: The folder of the model.

    Raises:
        ModelError: No such repository or revision, no access, no model in it, a pickle instead of
            safetensors, or a file that does not have the checksum that the hub states.
    """
    with hub_errors(repo_id, revision):
        try:
            sha, files = _wanted(repo_id, revision, component=component)
        except Exception as error:
            folder = _cached(repo_id, revision) if _is_out_of_reach(error) else None
            if folder is None:
                raise
            return folder
        new = [file for file in files if not isinstance(try_to_load_from_cache(repo_id, file, revision=sha), str)]
        folder = _to_cache(repo_id, revision, sha, files)
        _verify(repo_id, sha, new, cache_dir=constants.HF_HUB_CACHE)
    return folder


def pull(
    repo_id: str,
    output: Path | None = None,
    revision: str | None = None,
    variant: str | None = None,
    token: str | None = None,
) -> Path:
    """Download a model into a folder, or the cache, and verify every checksum. Goes on after an interruption.

    Args:
        repo_id, revision: See `download`.
        output (`Path`, *optional*): Folder that must not exist yet, or be empty; it appears when it is complete. The
            cache if not given.
        variant (`str`, *optional*): Take the weights of this variant ("non_ema", "fp16") where there are any.
        token (`str`, *optional*): By default what `hf auth login` stored, or HF_TOKEN.

    Returns:
        `Path`: The folder of the model.

    Raises:
        ModelError: See `download`; also an unknown variant.
        UserError: `output` cannot be written to, or is not empty.
    """
    if output is not None:
        target = output.resolve()  # a link cannot be replaced by a folder: write where it leads
        check_folder(target)
        if target.is_dir() and any(target.iterdir()):
            raise UserError(f"--output {str(output)!r} is not empty: give another folder, or delete it.")
    with hub_errors(repo_id, revision):
        sha, files = _wanted(repo_id, revision, variant, token=token)
        if output is None:
            folder = _to_cache(repo_id, revision, sha, files, token)
            _verify(repo_id, sha, files, token, cache_dir=constants.HF_HUB_CACHE)
            return folder
        partial = target.with_name(f".{target.name}.partial")
        snapshot_download(repo_id, revision=sha, token=token, allow_patterns=_exactly(files), local_dir=partial)
        _verify(repo_id, sha, files, token, local_dir=partial)
    shutil.rmtree(partial / ".cache")  # the client's notes
    for file in partial.rglob("*"):
        if file.is_file() and file.relative_to(partial).as_posix() not in files:
            file.unlink()  # left by an interrupted download of an older revision
    with suppress(OSError):
        target.rmdir()  # an empty one
    os.replace(partial, target)
    return output


def _wanted(
    repo_id: str,
    revision: str | None,
    variant: str | None = None,
    component: str | None = None,
    token: str | None = None,
) -> tuple[str, list[str]]:
    """Return the commit of a revision, and those of its files that a model needs.

    Raises:
        ModelError: No model, no such variant, or a pickle instead of safetensors.
    """
    info = HfApi().model_info(repo_id, revision=revision, token=token)
    files = [sibling.rfilename for sibling in info.siblings]
    is_pipeline = "model_index.json" in files
    if not is_pipeline and "config.json" not in files:
        raise ModelError(f"no model in {repo_id}: it holds neither a model_index.json nor a config.json.")
    if is_pipeline and component is not None:
        files = [file for file in files if file == "model_index.json" or file.startswith(f"{component}/")]
    try:
        wanted, unusable = wanted_files(files, variant)
    except ValueError:
        raise ModelError(f"{repo_id} has no variant {variant!r} of its weights.") from None
    if unusable and is_pipeline:
        unusable = {name: unusable[name] for name in unusable.keys() & _components(repo_id, info.sha, token)}
    elif unusable:
        unusable = {name: file for name, file in unusable.items() if name == "."}
    for folder, file in sorted(unusable.items()):
        place = "it" if folder == "." else folder
        raise ModelError(
            f"{repo_id} has {file}, but {place} has no safetensors to load: pickles can run any code and are refused; "
            "`looc-ldm pull --variant` takes a variant."
        )
    if not any(file.endswith(".safetensors") for file in wanted):
        raise ModelError(f"no model in {repo_id}: it holds no safetensors.")
    return info.sha, wanted


def wanted_files(files: Iterable[str], variant: str | None = None) -> tuple[list[str], dict[str, str]]:
    """Choose the files that a model needs: one variant of its weights, no pickle, nothing hidden.

    Returns:
        The files, and by folder a file of weights that cannot be taken where no other can: a pickle, or a variant.

    Raises:
        ValueError: No file has the variant.
    """
    files = sorted(file for file in files if not any(part.startswith(".") for part in PurePosixPath(file).parts))
    pickles = {file for file in files if file.lower().endswith(PICKLES)}
    weights = {file for file in files if file.endswith(".safetensors") or ".safetensors.index." in file}
    chosen, _ = variant_compatible_siblings(weights, variant and re.escape(variant))
    usable = {str(PurePosixPath(file).parent) for file in chosen}
    unusable = {str(PurePosixPath(file).parent): file for file in files if file in pickles | weights}
    unusable = {folder: file for folder, file in unusable.items() if folder not in usable}
    return [file for file in files if file in chosen or file not in pickles | weights], unusable


def _components(repo_id: str, sha: str, token: str | None) -> set[str]:
    """Return the components in a pipeline's model_index.json. Not by the cache, where it would count as verified."""
    with tempfile.TemporaryDirectory() as folder:
        index = read_json(
            Path(hf_hub_download(repo_id, "model_index.json", revision=sha, token=token, local_dir=folder))
        )
    return {name for name, value in index.items() if isinstance(value, list) and not name.startswith("_")}


def _to_cache(repo_id: str, revision: str | None, sha: str, files: list[str], token: str | None = None) -> Path:
    # By branch or tag, so that the cache knows it by that name when the hub cannot be reached.
    folder = Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=_exactly(files)))
    if folder.name != sha:  # the branch has moved on since it was listed
        folder = Path(snapshot_download(repo_id, revision=sha, token=token, allow_patterns=_exactly(files)))
    return folder


def _exactly(files: list[str]) -> list[str]:
    return [glob.escape(file) for file in files]


def _is_out_of_reach(error: Exception) -> bool:
    """Whether there is no network, no answer or none allowed, in contrast to a hub that refuses."""
    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code >= 500
    return isinstance(error, HTTPError | ConnectionError | LocalEntryNotFoundError)


def _cached(repo_id: str, revision: str | None) -> Path | None:
    """Return the folder of a revision in the cache, complete or not."""
    for name in ("model_index.json", "config.json"):
        file = try_to_load_from_cache(repo_id, name, revision=revision)
        if isinstance(file, str):
            return Path(file).parent
    return None


def _verify(repo_id: str, sha: str, files: list[str], token: str | None = None, **place) -> None:
    """Compare files with the checksums that the hub states: its client compares only their sizes.

    Raises:
        ModelError: A file differs; it is deleted, so that the next download fetches it again.
    """
    if not files:
        return
    verification = HfApi().verify_repo_checksums(repo_id, revision=sha, token=token, **place)
    wrong = [mismatch for mismatch in verification.mismatches if mismatch["path"] in files]
    for mismatch in wrong:
        file = Path(verification.verified_path) / mismatch["path"]
        file.resolve().unlink()
        file.unlink(missing_ok=True)
    for first in wrong:
        raise ModelError(
            f"{first['path']} of {repo_id} is damaged: its {first['algorithm']} is {first['actual'][:12]}..., the hub "
            f"states {first['expected'][:12]}...; it was deleted, download it again."
        )
