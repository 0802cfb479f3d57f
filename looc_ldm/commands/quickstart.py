"""`looc-ldm quickstart`."""

from __future__ import annotations

from functools import partial

from looc_ldm.commands.measures import inception_features
from looc_ldm.commands.options import Quickstart
from looc_ldm.training import quickstart
from looc_ldm.training.log import show_log_lines


def run(options: Quickstart) -> None:
    """Train, sample and evaluate in miniature, and print the path of the report."""
    show_log_lines()
    features = inception_features(options) if options.inception_weights else None
    print(f"report: {quickstart.quickstart(options.output, features, partial(print, flush=True))}")
