"""What cached latents, and runs, were made from: enough to notice another model, data set or transform."""

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

SAMPLED_IMAGES = 256  # whose stored bytes are compared
PARTS = {"model": "autoencoder", "data": "data set", "transform": "transform"}  # with what a message calls them
# Of the autoencoder's config, what the encoder is built from; much of it shows in its weights as well.
ENCODER_SETTINGS = (
    "in_channels",
    "down_block_types",
    "block_out_channels",
    "layers_per_block",
    "act_fn",
    "latent_channels",
    "norm_num_groups",
    "mid_block_add_attention",
    "vq_embed_dim",
    "hidden_channels",
    "residual_channels",
)
STORED = "stored images"  # which may have been damaged then, or now
DIGEST = "sha256:"  # of values too long to be shown


def cache_fingerprint(model: LooCVQModel, images: ImageSet) -> dict[str, dict]:
    """What the latents of a data set depend on, as plain JSON values, in the parts `model`, `data` and `transform`.

    The model is its encoder: another codebook or decoder leaves latents valid. The data are the number of images, the
    classes, all labels and the stored bytes of up to 256 images at even distances; where the data lies does not matter.
    """
    return {"model": _of_model(model), "data": _of_data(images), "transform": _of_transform(images)}


def run_fingerprint(images: ImageSet | StreamedSet, model: LooCVQModel | None = None) -> dict[str, dict]:
    """What a run depends on beside its settings: the parts `data` and, for stage 2, `model` of `cache_fingerprint`.

    Of streamed images it is the number of shards alone.
    """
    streamed = hasattr(images, "num_shards")
    data = {"number of shards": images.num_shards} if streamed else _of_data(images)
    return {"data": data} if model is None else {"data": data, "model": _of_model(model)}


def reference_fingerprint(images: ImageSet) -> dict[str, dict]:
    """What figures against these images depend on: the parts `data` and `transform` of `cache_fingerprint`, and the
    stored sizes of all images where they are files, so that one that is replaced is noticed."""
    sizes = images.source.sizes()
    stored = (
        {} if sizes is None else {"sizes of files": DIGEST + hashlib.sha256(sizes.astype("<i8").tobytes()).hexdigest()}
    )
    transform = {name: value for name, value in _of_transform(images).items() if name != "flip"}  # of training alone
    return {"data": _of_data(images) | stored, "transform": transform}


def differences(old: dict[str, dict], new: dict[str, dict]) -> list[str]:
    """The parts of two fingerprints that differ, each with what differs in it."""
    found = []
    for part, name in PARTS.items():
        before, after = old.get(part, {}), new.get(part, {})
        changed = [key for key in sorted({**before, **after}) if before.get(key) != after.get(key)]
        if changed:
            shown = ", ".join(_change(key, before.get(key), after.get(key)) for key in changed)
            found.append(f"another {name} ({shown})")
    return found


def another_origin(then: dict[str, dict] | None, now: dict[str, dict] | None) -> str | None:
    """In words, why a run made from `then` does not go on with `now`, two `run_fingerprint`s; None if it does.

    Other bytes under the same labels are a warning: damaged files may have been replaced.
    """
    if not then or not now:
        return None
    if now["data"].get(STORED) != then["data"].get(STORED):
        logger.warning("some training images are not what they were when the run was started")
        now = {**now, "data": {**now["data"], STORED: then["data"].get(STORED)}}
    changed = differences(then, now)
    if not changed:
        return None
    return (
        f"is of a run that was started with {'; '.join(changed)}: bring that back, or start another run "
        "(init_from takes weights along)"
    )


def _change(key: str, old, new) -> str:
    if any(str(value).startswith(DIGEST) for value in (old, new)):
        return key
    return f"{key}: {old} -> {new}"


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
    labels = hashlib.sha256(images.labels().astype("<i8").tobytes())
    classes = hashlib.sha256(json.dumps(images.classes).encode())
    stored = hashlib.sha256()
    for index in spread(len(images), SAMPLED_IMAGES).tolist():
        stored.update(hashlib.sha256(_stored_bytes(images, index)).digest())
    return {
        "number of images": len(images),
        "names of classes": DIGEST + classes.hexdigest(),
        "labels": DIGEST + labels.hexdigest(),
        STORED: DIGEST + stored.hexdigest(),
    }


def _stored_bytes(images: ImageSet, index: int) -> bytes:
    stored = images.source.read(index)
    try:
        return read_bytes(stored.content, stored.name)
    except UnreadableImage:  # one that is left out of the cache, too
        return b""


def _of_transform(images: ImageSet) -> dict:
    config = images.config
    transform = {"resolution": config.resolution, "fit": config.fit, "flip": config.flip, "mode": images.mode}
    # A cache that was made without classes also holds the images without a label.
    return transform | ({"labels": "needed"} if images.needs_labels and (images.labels() < 0).any() else {})
