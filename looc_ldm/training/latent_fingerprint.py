"""Fingerprints of what cached latents, runs and reference figures depend on: model, data set and transform."""

from __future__ import annotations

import hashlib
import json
import logging
from typing import TYPE_CHECKING

from looc_ldm.images.image_set import ImageSet, spread
from looc_ldm.images.pixels import read_bytes
from looc_ldm.models.autoencoder import LooCVQModel
from looc_ldm.utils.errors import UnreadableImage

if TYPE_CHECKING:
    from looc_ldm.images.streaming import StreamedSet

logger = logging.getLogger(__name__)

SAMPLED_IMAGES = 256  # images whose stored bytes are compared
PARTS = {"model": "autoencoder", "data": "data set", "transform": "transform"}  # with their names in messages
# The settings that the encoder is built from.
ENCODER_SETTINGS = (
    *("in_channels", "down_block_types", "block_out_channels", "layers_per_block", "act_fn", "latent_channels"),
    *("norm_num_groups", "mid_block_add_attention", "vq_embed_dim", "hidden_channels", "residual_channels"),
)
STORED = "stored images"
DIGEST = "sha256:"  # marks values that are too long to be shown


def cache_fingerprint(model: LooCVQModel, images: ImageSet) -> dict[str, dict]:
    """Return what the latents of a data set depend on, in the parts `model`, `data` and `transform`, as JSON values.

    The model is its encoder: a different codebook or decoder leaves latents valid. The data are the number of images,
    the classes, all labels and the stored bytes of up to 256 images at even distances, wherever the data lies.
    """
    return {"model": _of_model(model), "data": _of_data(images), "transform": _of_transform(images)}


def run_fingerprint(images: ImageSet | StreamedSet, model: LooCVQModel | None = None) -> dict[str, dict]:
    """Return what a run depends on besides its settings: the part `data` and, for stage 2, `model`.

    For streamed images, `data` is the number of shards only.
    """
    streamed = hasattr(images, "num_shards")
    data = {"number of shards": images.num_shards} if streamed else _of_data(images)
    return {"data": data} if model is None else {"data": data, "model": _of_model(model)}


def reference_fingerprint(images: ImageSet) -> dict[str, dict]:
    """Return what figures against these images depend on: `data` and `transform`, and the stored size of each file."""
    sizes = images.source.sizes()
    stored = {} if sizes is None else {"sizes of files": _digest(sizes.astype("<i8").tobytes())}
    transform = {name: value for name, value in _of_transform(images).items() if name != "flip"}  # training only
    return {"data": _of_data(images) | stored, "transform": transform}


def differences(old: dict[str, dict], new: dict[str, dict]) -> list[str]:
    """Return the parts of two fingerprints that differ, each with its differences."""
    found = []
    for part, name in PARTS.items():
        before, after = old.get(part, {}), new.get(part, {})
        changed = [key for key in sorted({**before, **after}) if before.get(key) != after.get(key)]
        if changed:
            shown = ", ".join(_change(key, before.get(key), after.get(key)) for key in changed)
            found.append(f"a different {name} ({shown})")
    return found


def provenance_mismatch(then: dict[str, dict] | None, now: dict[str, dict] | None) -> str | None:
    """Return why a run with the `run_fingerprint` `then` cannot resume with `now`; None if it can.

    Different bytes under the same labels are a warning only: damaged files may have been replaced.
    """
    if not then or not now:
        return None
    if now["data"].get(STORED) != then["data"].get(STORED):
        logger.warning("some training images are not what they were when the run was started")
        now = {**now, "data": {**now["data"], STORED: then["data"].get(STORED)}}
    changed = differences(then, now)
    if not changed:
        return None
    return f"was started with {'; '.join(changed)}: bring that back, or start a new run from its weights (init_from)"


def _change(key: str, old, new) -> str:
    return key if any(str(value).startswith(DIGEST) for value in (old, new)) else f"{key}: {old} -> {new}"


def class_names_digest(classes: list[str]) -> str:
    """Return the fingerprint of the names of classes, in their order."""
    return _digest(json.dumps(classes).encode())


def _digest(content: bytes) -> str:
    return DIGEST + hashlib.sha256(content).hexdigest()


def _of_model(model: LooCVQModel) -> dict:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    settings = {name: model.config[name] for name in ENCODER_SETTINGS if name in model.config}
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    return {"encoder weights": DIGEST + digest.hexdigest(), **settings}


def _of_data(images: ImageSet) -> dict:
    stored = hashlib.sha256()
    for index in spread(len(images), SAMPLED_IMAGES).tolist():
        image = images.source.read(index)
        try:
            content = read_bytes(image.content, image.name)
        except UnreadableImage:  # one that is left out of the cache, too
            content = b""
        stored.update(hashlib.sha256(content).digest())
    return {
        "number of images": len(images),
        "names of classes": class_names_digest(images.classes),
        "labels": _digest(images.labels().astype("<i8").tobytes()),
        STORED: DIGEST + stored.hexdigest(),
    }


def _of_transform(images: ImageSet) -> dict:
    config = images.config
    transform = {"resolution": config.resolution, "fit": config.fit, "flip": config.flip, "mode": images.mode}
    # A cache that was made without classes also holds the images without a label.
    return transform | ({"labels": "needed"} if images.needs_labels and (images.labels() < 0).any() else {})
