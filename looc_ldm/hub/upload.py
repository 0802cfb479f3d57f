"""Push models to the hub, with the code that diffusers needs to load them from there.

    looc-ldm push FOLDER user/name           pipe.push_to_hub("user/name")           push(folder, "user/name")

A saved pipeline says in `model_index.json` that its class is in its own `pipeline.py`, and has a `looc_ldm.py` beside
each of our components; these files only import the installed `looc_ldm`. `DiffusionPipeline.from_pretrained` runs them
with `trust_remote_code=True`. `LooCLDMPipeline.from_pretrained` needs neither them nor trust.
"""

from __future__ import annotations

import inspect
import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

import yaml
from huggingface_hub import CommitOperationAdd, HfApi
from safetensors import SafetensorError, safe_open

from looc_ldm import _HOME_OF
from looc_ldm.hub.card import is_ours, model_card, picture_name
from looc_ldm.hub.facts import shareable
from looc_ldm.models.registration import CODE, CODE_FILE, COMPONENTS, with_modules
from looc_ldm.utils.errors import ModelError, UserError, one_line
from looc_ldm.utils.files import read_json, replace_text
from looc_ldm.utils.hub_download import PICKLES
from looc_ldm.utils.hub_errors import hub_errors

PIPELINE_FILE = "pipeline.py"
CONFIGS = ("model_index.json", "config.json", "scheduler_config.json")
NOT_PUSHED = ("checkpoints", "logs", "latents", "previews", "__pycache__")  # folders
PUSHED = (".safetensors", ".json", ".md", ".png", ".jpg", ".jpeg", ".webp", ".txt")

logger = logging.getLogger(__name__)

_SHIM = '''"""For `trust_remote_code=True`: the pipeline of the installed looc_ldm."""

from {module} import {name}

__all__ = ["{name}"]
'''


class HubMixin:
    """Mixin that saves, loads and pushes pipelines that diffusers does not know. Put it before `DiffusionPipeline`."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """Load a pipeline from a folder or hub id, with the arguments of `DiffusionPipeline.from_pretrained`.

        Raises:
            OSError: Nothing is there, or weights that are not safetensors (`use_safetensors=False` allows pickles,
                which can run any code).
        """
        kwargs.setdefault("use_safetensors", True)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _dict_from_json_file(cls, json_file, **kwargs):
        # diffusers reads `model_index.json` through this. A class that is known needs none of the repository's code.
        index = with_modules(super()._dict_from_json_file(json_file, **kwargs))
        if isinstance(index.get("_class_name"), list):
            index["_class_name"] = index["_class_name"][1]
        return index

    def to_json_file(self, json_file_path) -> None:
        """Write `model_index.json`, which names the class in the repository's own code."""
        index = json.loads(self.to_json_string())
        if type(self).__module__ != "__main__":
            index["_class_name"] = [Path(PIPELINE_FILE).stem, type(self).__name__]
        replace_text(Path(json_file_path), _json(index))

    def save_pretrained(self, save_directory, *args, push_to_hub: bool = False, **kwargs) -> None:
        """Save a folder that every way of loading takes: `DiffusionPipeline.save_pretrained`, and the code it names.

        With `push_to_hub=True` the folder is pushed, with the arguments of `push` (`repo_id` is by default the name of
        the folder).
        """
        names = inspect.signature(push).parameters.keys() & kwargs.keys() if push_to_hub else ()
        pushing = {name: kwargs.pop(name) for name in names}
        super().save_pretrained(save_directory, *args, **kwargs)
        folder = Path(save_directory)
        if type(self).__module__ != "__main__":
            for file, code in remote_code(read_json(folder / "model_index.json"), type(self).__module__).items():
                replace_text(folder / file, code)
        if push_to_hub:
            push(folder, **{"repo_id": folder.resolve().name, **pushing})

    def push_to_hub(self, repo_id: str, commit_message: str | None = None, **kwargs) -> str:
        """Upload the pipeline as it is, with a model card; see `push` for its arguments, result and errors.

        Takes `variant` and `max_shard_size`, too. The card states only the figures in `metrics`: the weights may have
        changed since the training. With a `variant`, a card that the repository has is left alone.

        Raises:
            ValueError: `safe_serialization=False`: pickles are not pushed.
        """
        if not kwargs.pop("safe_serialization", True):
            raise ValueError("safe_serialization must be True: pickles, which can run any code, are not pushed.")
        saving = {name: kwargs.pop(name) for name in ("variant", "max_shard_size") if name in kwargs}
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **saving)
            keep_card = saving.get("variant") is not None
            message = commit_message or f"Upload {type(self).__name__}"
            return push(folder, repo_id, commit_message=message, keep_card=keep_card, **kwargs)


def push(
    folder: Path | str,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    commit_message: str = "Upload with looc-ldm",
    license: str | None = None,
    metrics: Sequence[Path | str] = (),
    samples: Path | str | None = None,
    keep_card: bool = False,
) -> str:
    """Upload a model folder in one commit; the repository and the branch are made if they are not there.

    To resume an interrupted upload, call it again: weights that arrived are not transferred again. The repository does
    not change until everything is uploaded. Other files in the repository stay.

    Args:
        folder (`Path`): A saved pipeline or `LooCVQModel`, such as `pipeline/` or `model/` of a training run.
        repo_id (`str`): "user/name", or "name" for a repository of the token's user.
        private (`bool`, *optional*): Whether a new repository is private; by default what its owner has set.
        revision (`str`, *optional*): Branch to push to.
        create_pr (`bool`): Open a pull request instead of committing.
        token (`str`, *optional*): By default what `hf auth login` stored, or HF_TOKEN.
        license, metrics, samples: For the model card; see `hub.card.write_card`. A README.md in the folder that
            looc-ldm did not write is pushed instead.
        keep_card (`bool`): Leave a card that the repository already has.

    Returns:
        `str`: Address of the commit, or of the pull request.

    Raises:
        ModelError: The folder holds no model, a pickle or damaged weights, or the hub refuses.
        UserError: A file for the card cannot be used.
    """
    folder = Path(folder)
    if create_pr and revision not in (None, "main"):
        raise UserError(f"--create-pr opens a pull request against main: it cannot go with --revision {revision}.")
    card_options = {"metrics": metrics, "samples": samples, "license": license}
    contents = repository_files(folder, repo_id, **card_options)
    api = HfApi(token=token)
    with hub_errors(repo_id):
        full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if full_id != repo_id:  # the card names it
            repo_id = full_id
            contents = repository_files(folder, repo_id, **card_options)
        if private and not api.repo_info(repo_id).private:
            raise ModelError(f"{repo_id} already exists and is public: nothing was uploaded; make it private first.")
        if revision is not None and revision != "main" and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        if keep_card and api.file_exists(repo_id, "README.md", revision=revision):
            del contents["README.md"]
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(path, content) for path, content in contents.items()],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    return commit.pr_url or commit.commit_url


def repository_files(folder: Path, repo_id: str, **card_options) -> dict[str, Path | bytes]:
    """Return what to upload from a folder: local files, or new contents as bytes, by path in the repository.

    Raises:
        ModelError, UserError: See `push`.
    """
    card, picture = model_card(folder, repo_id, **card_options)  # refuses a folder without a model
    contents = _records_and_code(folder)
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        path = file.relative_to(folder)
        if path.as_posix() in contents or file.name == CODE_FILE:  # made again
            continue
        if any(part.startswith(".") or part in NOT_PUSHED for part in path.parts):
            continue
        if file.suffix.lower() in PICKLES:
            raise ModelError(
                f"{str(file)!r} is a pickle: loading it can run any code, so it is not uploaded. Save the model as "
                "safetensors (save_pretrained does), or delete the file."
            )
        if file.suffix.lower() not in PUSHED and file.name not in ("LICENSE", PIPELINE_FILE):
            logger.warning("not pushed: %s", file)
            continue
        if file.suffix == ".safetensors":
            _check_weights(file)
        contents[path.as_posix()] = _config(file, folder) if path.name in CONFIGS else file
    if not any(path.endswith(".safetensors") for path in contents):
        raise ModelError(f"no weights in {str(folder)!r}: it holds no safetensors.")

    readme = folder / "README.md"
    if is_ours(readme):
        contents["README.md"] = card.encode()
        if picture is not None:
            contents[picture_name(picture)] = picture
    elif any(card_options.values()):
        raise UserError(
            f"--metrics, --samples and --license are for the model card, but {str(readme)!r} was not written by "
            "looc-ldm and is not changed. Delete it to push a new card."
        )
    return contents


def remote_code(index: dict, module: str | None = None) -> dict[str, str]:
    """Return the code that a repository with this `model_index.json` needs, by path.

    `module` is the module of the pipeline's class, if looc_ldm does not define the class.
    """
    shims = {
        f"{name}/looc_ldm.py": CODE
        for name, value in index.items()
        if isinstance(value, list) and value[0] == "looc_ldm"
    }
    name = index["_class_name"]
    name = name[1] if isinstance(name, list) else name
    if name in _HOME_OF or module is not None:
        shims[PIPELINE_FILE] = _SHIM.format(module="looc_ldm" if name in _HOME_OF else module, name=name)
    return shims


def _records_and_code(folder: Path) -> dict[str, bytes]:
    """Return records of the training, and the code that loads the model, by path in the repository."""
    if (folder / "model_index.json").is_file():
        index = read_json(folder / "model_index.json")
        left_out = [name for name, kind in index.items() if kind == [None, None] and name != "class_embedding"]
        if left_out:
            raise ModelError(
                f"{str(folder)!r} holds no {left_out[0]}: diffusers does not save a model with adapters. Merge them "
                "(merge_and_unload()), and save the pipeline again."
            )
        texts = remote_code(index)
    else:
        texts = {"looc_ldm.py": CODE}
    if (folder / "training.json").is_file():
        training = shareable(read_json(folder / "training.json"))
        texts["training.json"] = _json(training, sort_keys=False)
        if "settings" in training:
            texts["config.yaml"] = yaml.safe_dump(training["settings"], sort_keys=False)
    return {path: text.encode() for path, text in texts.items()}


def _config(file: Path, folder: Path) -> bytes:
    """Return a config that names its code, but not the folder it came from, which diffusers writes into it."""
    config = read_json(file)
    config.pop("_name_or_path", None)
    name = config.get("_class_name")
    if file == folder / "model_index.json" and isinstance(name, str) and name in _HOME_OF:
        config["_class_name"] = [Path(PIPELINE_FILE).stem, name]  # saved before pipelines named their code
    elif name in COMPONENTS:
        config["auto_map"] = {"AutoModel": f"looc_ldm.{name}"}  # for `AutoModel.from_pretrained`
    return _json(config).encode()


def _json(value: dict, sort_keys: bool = True) -> str:
    return json.dumps(value, indent=2, sort_keys=sort_keys) + "\n"


def _check_weights(file: Path) -> None:
    """Refuse a file that was cut off: its header states the size."""
    try:
        with safe_open(file, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{str(file)!r} is damaged, and not uploaded: {one_line(error)[:200]}") from None
