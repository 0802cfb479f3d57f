"""`looc-ldm train photos`."""

from __future__ import annotations

from functools import partial

from looc_ldm.commands.measures import inception_features
from looc_ldm.training.log import show_log_lines
from looc_ldm.training.photos.train import train_photos
from looc_ldm.utils.arguments import TrainPhotos


def run(options: TrainPhotos) -> None:
    """Train on a folder of photographs, and print the path of the report."""
    show_log_lines()
    features = inception_features(options) if options.inception_weights else None
    print(f"report: {train_photos(options, features, partial(print, flush=True))}")
