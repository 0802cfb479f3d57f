"""`looc-ldm quickstart`."""

from __future__ import annotations

from looc_ldm.commands.measures import inception_features
from looc_ldm.commands.options import Quickstart
from looc_ldm.training import quickstart


def run(options: Quickstart) -> None:
    """Train, sample and evaluate in miniature, and print the path of the report."""
    features = inception_features(options) if options.inception_weights else None
    print(f"report: {quickstart.quickstart(options.output, features)}")
