"""Models from the hub: only the files that are needed, only safetensors, and with their checksums verified."""

from __future__ import annotations

import glob
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError

from looc_ldm.errors import ModelError, UserError
from looc_ldm.files import check_folder
from looc_ldm.hub_errors import HTTPError, hub_errors
from looc_ldm.model_facts import read_json

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")

# name.safetensors, name.fp16.safetensors, name.fp16-00001-of-00002.safetensors, name.safetensors.index.fp16.json
_WEIGHTS = re.compile(r"[^.]+?(?:\.(?P<variant>\w+))?(?:-\d{5}-of-\d{5})?\.safetensors")
_INDEX = re.compile(r"[^.]+\.safetensors\.index(?:\.(?P<variant>\w+))?\.json")


def download(
    repo_id: str,
    revision: str | None = None,
    component: str | None = None,
) -> Path:
    """A model of the hub in the cache, downloaded if it is not there; of an unreachable hub, what the cache holds.

    Args:
        repo_id (`str`): "user/name".
        revision (`str`, *optional*): Branch, tag or commit.
        component (`str`, *optional*): Of a pipeline only this component, for instance "vqvae".

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
    """A model of the hub in a folder, or in the cache, every checksum verified. Goes on after an interruption.

    Args:
        repo_id, revision: See `download`.
        output (`Path`, *optional*): Folder that must not exist yet, or be empty; it appears when it is complete. The
            cache if not given.
        variant (`str`, *optional*): Take the weights of this variant ("non_ema", "fp16"), where there are any.
        token (`str`, *optional*): By default what `hf auth login` stored, or HF_TOKEN.

    Returns:
        `Path`: The folder of the model.

    Raises:
        ModelError: See `download`; also an unknown variant.
        UserError: `output` cannot be written to, or is not empty.
    """
    if output is not None:
        target = output.resolve()  # of a link what it leads to: a link cannot be replaced by a folder
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
    _keep_only(partial, files)
    with suppress(OSError):
        target.rmdir()  # an empty one
    os.replace(partial, target)
    return output


def weights_variant(file: str) -> tuple[bool, str | None]:
    """Whether a file holds safetensors weights, or is the index of their shards; and of which variant they are."""
    match = _WEIGHTS.fullmatch(PurePosixPath(file).name) or _INDEX.fullmatch(PurePosixPath(file).name)
    return (True, match["variant"]) if match else (False, None)


def _wanted(
    repo_id: str,
    revision: str | None,
    variant: str | None = None,
    component: str | None = None,
    token: str | None = None,
) -> tuple[str, list[str]]:
    """The commit of a revision, and its files that are needed."""
    info = HfApi().model_info(repo_id, revision=revision, token=token)
    files = [sibling.rfilename for sibling in info.siblings]
    return info.sha, wanted_files(
        repo_id, files, variant, component, cache(lambda: _components(repo_id, info.sha, token))
    )


def _components(repo_id: str, sha: str, token: str | None) -> set[str]:
    """The components that a pipeline's model_index.json lists. Not from the cache, where it would count as verified."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(hf_hub_download(repo_id, "model_index.json", revision=sha, token=token, local_dir=folder))
        index = read_json(file)
    return {name for name, value in index.items() if isinstance(value, list) and not name.startswith("_")}


def wanted_files(
    repo_id: str,
    files: Iterable[str],
    variant: str | None = None,
    component: str | None = None,
    components: Callable[[], set[str]] = set,
) -> list[str]:
    """Those files of a repository that a model needs: one variant of its weights, no pickle, nothing hidden.

    Args:
        components (callable): Gives the folders that a pipeline is loaded from. Asked only about a folder that holds
            pickles and no safetensors, or not the variant: what the pipeline does not load from may be so.

    Raises:
        ModelError: No model, no such variant, or a pickle instead of safetensors.
    """
    files = sorted(file for file in files if not any(part.startswith(".") for part in PurePosixPath(file).parts))
    is_pipeline = "model_index.json" in files
    if not is_pipeline and "config.json" not in files:
        raise ModelError(f"no model in {repo_id}: it holds neither a model_index.json nor a config.json.")
    if is_pipeline and component is not None:
        files = [file for file in files if file == "model_index.json" or file.startswith(f"{component}/")]

    pickles = [file for file in files if file.lower().endswith(PICKLES)]
    wanted, known = [], set()
    for folder in sorted({str(PurePosixPath(file).parent) for file in files}):
        here = [file for file in files if str(PurePosixPath(file).parent) == folder]
        variants = {weights_variant(file)[1] for file in here if weights_variant(file)[0]}
        pickled = [file for file in here if file in pickles]
        chosen = variant if variant in variants else None
        lacking = chosen not in variants and bool(variants or pickled)
        lacking = lacking and (folder in components() if is_pipeline else folder == ".")
        if lacking and not variants:
            raise ModelError(
                f"{repo_id} holds the pickle {pickled[0]} instead of safetensors: loading it could run any code, so it "
                "is refused; ask its author for safetensors."
            )
        known |= variants
        if lacking:
            place = "its weights" if folder == "." else folder
            hint = (
                "`looc-ldm pull --variant` takes one" if variant is None else f"neither {variant!r} nor the plain one"
            )
            raise ModelError(f"{repo_id} has only the variants {_listed(variants)} of {place}: {hint}.")
        needed = ((False, None), (True, chosen))
        wanted += [file for file in here if file not in pickles and weights_variant(file) in needed]
    if variant is not None and variant not in known:
        raise ModelError(f"{repo_id} has no variant {variant!r} of its weights; it has {_listed(known)}.")
    if not known:
        raise ModelError(f"no model in {repo_id}: it holds no safetensors.")
    return wanted


def _listed(variants: set[str | None]) -> str:
    return ", ".join(sorted("the plain one" if variant is None else variant for variant in variants)) or "none"


def _to_cache(repo_id: str, revision: str | None, sha: str, files: list[str], token: str | None = None) -> Path:
    # Asked for by branch or tag, so that the cache knows it by that name when the hub cannot be reached.
    folder = Path(snapshot_download(repo_id, revision=revision, token=token, allow_patterns=_exactly(files)))
    if folder.name != sha:  # the branch has moved on since it was listed
        folder = Path(snapshot_download(repo_id, revision=sha, token=token, allow_patterns=_exactly(files)))
    return folder


def _exactly(files: list[str]) -> list[str]:
    return [glob.escape(file) for file in files]


def _is_out_of_reach(error: BaseException) -> bool:
    """No network, no answer, or none allowed: not a hub that says no."""
    while error is not None:
        if hasattr(error, "response") and error.response is not None:
            return error.response.status_code >= 500
        if isinstance(error, HTTPError | ConnectionError | LocalEntryNotFoundError):
            return True
        error = error.__cause__
    return False


def _cached(repo_id: str, revision: str | None) -> Path | None:
    """The folder of a revision in the cache, whatever of it is there."""
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
    if wrong:
        first = wrong[0]
        raise ModelError(
            f"{first['path']} of {repo_id} is damaged: its {first['algorithm']} is {first['actual'][:12]}..., the hub "
            f"states {first['expected'][:12]}...; it was deleted, download it again."
        )


def _keep_only(folder: Path, files: list[str]) -> None:
    """Delete what the client left in a folder beside the files (its notes, and files of an older revision)."""
    shutil.rmtree(folder / ".cache")
    for file in folder.rglob("*"):
        if file.is_file() and file.relative_to(folder).as_posix() not in files:
            file.unlink()
