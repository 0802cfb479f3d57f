"""Which settings may differ when a run goes on."""

from __future__ import annotations

from looc_ldm.training.config_parsing import flatten

# Settings that may differ when a run is resumed: the length of the run, and how it is reported.
RESUMABLE = {
    "mixed_precision",  # `auto` may become the value that it stood for; checkpoints are compared by that
    "total_images",
    "log_every_images",
    "preview_every_images",
    "checkpoint_every_images",
    "keep_last",
    "keep_every_images",
    "max_skipped_steps",
    "push_to_hub",
    "push_private",
    "tracker",
    "data.num_workers",
    "data.max_unreadable_share",
    "evaluation.every_images",
    "evaluation.images",
    "evaluation.fid",
    "evaluation.inception_weights",
    "evaluation.feature_layer",
    "preview_steps",
    "preview_guidance_scale",
    "output_dir",
    "latents",  # which are compared with the autoencoder and the data
}
# Settings that say where something lies, which may have moved since.
MOVABLE = {"data.path", "autoencoder", "loss.lpips_weights"}


def differences(old: dict, new: dict) -> list[str]:
    """Return the settings that may not differ when a run is resumed, and do, each as `name: old -> new`."""
    return [change for name, change in _changes(old, new).items() if name not in RESUMABLE | MOVABLE]


def moves(old: dict, new: dict) -> list[str]:
    """Return the settings of places that have changed, each as `name: old -> new`."""
    return [change for name, change in _changes(old, new).items() if name in MOVABLE]


def _changes(old: dict, new: dict) -> dict[str, str]:
    old, new = flatten(old), flatten(new)
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return {name: f"{name}: {old.get(name)!r} -> {new.get(name)!r}" for name in names}
