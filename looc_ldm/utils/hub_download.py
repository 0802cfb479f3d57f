"""Download models from the hub: only needed files, only safetensors, with verified checksums."""

from __future__ import annotations

import glob
import os
import re
import shutil
from pathlib import Path, PurePosixPath

from diffusers.pipelines.pipeline_loading_utils import variant_compatible_siblings
from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache

from looc_ldm.utils.errors import ModelError, UserError
from looc_ldm.utils.files import NAME_BYTES, check_folder, folder_when_complete, is_relative_name
from looc_ldm.utils.hub_errors import HTTPError, hub_errors

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def download(repo_id: str, component: str | None = None) -> Path:
    """Download a model into the cache, unless it is there; if the hub is unreachable, take what the cache holds.

    Args:
        repo_id (`str`): "user/name".
        component (`str`, *optional*): The only component of a pipeline that is needed, for instance "vqvae".

    Returns:
        `Path`: The folder of the model.

    Raises:
        ModelError: No such repository, no access, no model in it, a pickle instead of safetensors, or a
            file with a different checksum than the hub states.
    """
    with hub_errors(repo_id):
        try:
            return _fetch(repo_id, None, component=component)[0]
        except (HTTPError, ConnectionError) as error:
            answer = getattr(error, "response", None)
            if answer is None or answer.status_code >= 500:  # no network, HF_HUB_OFFLINE, or a hub that is down
                for name in ("model_index.json", "config.json"):
                    file = try_to_load_from_cache(repo_id, name)
                    if isinstance(file, str):
                        return Path(file).parent
            raise


def pull(
    repo_id: str,
    output: Path | None = None,
    revision: str | None = None,
    variant: str | None = None,
    token: str | None = None,
) -> Path:
    """Download a model into the cache, and copy it into a folder if one is given; return the folder.

    Args:
        repo_id (`str`): "user/name".
        revision (`str`, *optional*): Branch, tag or commit.
        output (`Path`, *optional*): Folder that must not exist yet, or be empty; it appears when it is complete.
        variant (`str`, *optional*): Take the weights of this variant ("non_ema", "fp16") if there are any.
        token (`str`, *optional*): By default what `hf auth login` stored, or HF_TOKEN.

    Raises:
        ModelError: See `download`; also an unknown revision or variant.
        UserError: `output` cannot be written to, or is not empty.
    """
    if output is not None:
        check_folder(output)
        if output.is_dir() and any(output.iterdir()):
            raise UserError(f"--output {str(output)!r} is not empty: give another folder, or delete it.")
    with hub_errors(repo_id):
        folder, files = _fetch(repo_id, revision, variant, token=token)
    if output is None:
        return folder
    with folder_when_complete(
        output.resolve()
    ) as partial:  # a link cannot be replaced by a folder: write to its target
        for file in files:
            (partial / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / file, partial / file)
    return output


def _fetch(
    repo_id: str,
    revision: str | None,
    variant: str | None = None,
    component: str | None = None,
    token: str | None = None,
) -> tuple[Path, list[str]]:
    """Download what a model needs into the cache, and verify it. Return the folder and the files."""
    info = HfApi().model_info(repo_id, revision=revision, token=token)
    names = [sibling.rfilename for sibling in info.siblings]
    if "model_index.json" in names and component is not None:
        names = [name for name in names if name == "model_index.json" or name.startswith(f"{component}/")]
    files = wanted_files(repo_id, names, variant)
    # Not by commit: without the hub, the cache finds a branch or tag only by its name.
    patterns = [glob.escape(file) for file in files]
    folder = Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=patterns))
    _verify(repo_id, folder, files, token)
    return folder, files


def wanted_files(repo_id: str, files: list[str], variant: str | None = None) -> list[str]:
    """Choose the files of a repository that a model needs: one variant of its weights, no pickle, nothing hidden.

    Raises:
        ModelError: No model, no such variant, a component without safetensors, or a file name that cannot be used.
    """
    if not {"model_index.json", "config.json"} & set(files):
        raise ModelError(f"no model in {repo_id}: it holds neither a model_index.json nor a config.json.")
    for file in files:
        if not is_relative_name(file) or any(len(os.fsencode(part)) > NAME_BYTES for part in PurePosixPath(file).parts):
            raise ModelError(f"{repo_id} is refused: {file[:100]!r} is no usable name of a file.")
    files = sorted(file for file in files if not any(part.startswith(".") for part in PurePosixPath(file).parts))
    pickles = {file for file in files if file.lower().endswith(PICKLES)}
    weights = {file for file in files if file.endswith(".safetensors") or ".safetensors.index." in file}
    try:
        chosen, _ = variant_compatible_siblings(weights, variant and re.escape(variant))
    except ValueError:
        raise ModelError(f"{repo_id} has no variant {variant!r} of its weights.") from None
    usable = {PurePosixPath(file).parent for file in chosen}
    for file in sorted((pickles | weights) - set(chosen)):
        folder = PurePosixPath(file).parent
        if str(folder / "config.json") in files and folder not in usable:
            raise ModelError(
                f"{repo_id} has {file}, but no safetensors beside it to load. Pickles are refused, because they can "
                "run any code. If the weights have a variant, such as fp16, name it: `looc-ldm pull --variant fp16`."
            )
    if not usable:
        raise ModelError(f"no model in {repo_id}: it holds no safetensors.")
    return [file for file in files if file in chosen or file not in pickles | weights]


def _verify(repo_id: str, folder: Path, files: list[str], token: str | None) -> None:
    """Compare files in the cache with the checksums that the hub states: its client compares only their sizes.

    Raises:
        ModelError: A file differs; it is deleted, so that the next download fetches it again.
    """
    verification = HfApi().verify_repo_checksums(
        repo_id, revision=folder.name, token=token, cache_dir=constants.HF_HUB_CACHE
    )
    wrong = [mismatch for mismatch in verification.mismatches if mismatch["path"] in files]
    for mismatch in wrong:
        (folder / mismatch["path"]).resolve().unlink()
        (folder / mismatch["path"]).unlink(missing_ok=True)  # without symbolic links, that was the file itself
    for first in wrong:
        raise ModelError(
            f"{first['path']} of {repo_id} is damaged: its {first['algorithm']} is {first['actual'][:12]}..., the hub "
            f"states {first['expected'][:12]}...; it was deleted, download it again."
        )
