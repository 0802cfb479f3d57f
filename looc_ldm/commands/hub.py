"""`looc-ldm push` and `looc-ldm pull`: models to the model hub and from it."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path


def add_parsers(commands) -> None:
    """Add `push` and `pull` to the commands of `looc-ldm`."""
    push = commands.add_parser(
        "push",
        help="upload a model with its model card to the hub",
        description="Upload a pipeline or autoencoder with a model card made from what was measured. Interrupted, the "
        "same command goes on. Needs a token that may write: `hf auth login`, HF_TOKEN or --token.",
    )
    push.add_argument("folder", metavar="FOLDER", type=Path, help="pipeline/ or model/ of a run, or a saved model")
    push.add_argument("repo_id", metavar="USER/NAME", help="repository; made if it is not there")
    push.add_argument("--private", action="store_true", default=None, help="a repository that is made is private")
    push.add_argument("--revision", metavar="BRANCH", help="branch to push to; made if it is not there (default: main)")
    push.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    push.add_argument("--license", help="of the weights, as the hub writes it: mit, cc-by-4.0 (default: asked for)")
    push.add_argument(
        "--metrics",
        metavar="FILE",
        type=Path,
        nargs="+",
        default=[],
        help="figures for the card, that `looc-ldm evaluate ... --output FILE` wrote (default: those of the training)",
    )
    push.add_argument("--samples", metavar="IMAGE", type=Path, help="picture for the card (default: newest preview)")
    push.add_argument("--token", help="of the hub (default: the one of `hf auth login`, or HF_TOKEN)")
    push.set_defaults(command=_push)

    pull = commands.add_parser(
        "pull",
        help="download a model from the hub, and verify it",
        description="Download what a model needs, without other variants of its weights, and compare every file with "
        "the checksum that the hub states.",
    )
    pull.add_argument("repo_id", metavar="USER/NAME", help="repository")
    pull.add_argument("--output", metavar="FOLDER", type=Path, help="new folder (default: the cache of downloads)")
    pull.add_argument("--revision", help="branch, tag or commit (default: main)")
    pull.add_argument("--variant", help="of the weights: non_ema, fp16, ... (default: the plain ones)")
    pull.add_argument("--token", help="of the hub (default: the one of `hf auth login`, or HF_TOKEN)")
    pull.set_defaults(command=_pull)


def _push(options: argparse.Namespace) -> None:
    from looc_ldm.hub import push

    logging.getLogger("huggingface_hub").propagate = False  # it prints its warnings itself
    license = options.license
    if license is None and sys.stdin.isatty():
        license = input("licence of the weights (mit, cc-by-4.0, ...; empty: not stated): ").strip() or None
    address = push(
        options.folder,
        options.repo_id,
        private=options.private,
        revision=options.revision,
        create_pr=options.create_pr,
        token=options.token,
        license=license,
        metrics=options.metrics,
        samples=options.samples,
    )
    print(address)


def _pull(options: argparse.Namespace) -> None:
    from looc_ldm.hub_download import pull

    print(pull(options.repo_id, options.output, options.revision, options.variant, options.token))
