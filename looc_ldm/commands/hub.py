"""`looc-ldm push` and `looc-ldm pull`: upload models to the hub, and download them."""

from __future__ import annotations

import logging
import sys

from looc_ldm.commands.options import Pull, Push
from looc_ldm.hub import upload as hub
from looc_ldm.utils import hub_download


def push(options: Push) -> None:
    """Upload a model with its card and print its address; with --dry-run print the files and the card instead."""
    logging.getLogger("huggingface_hub").propagate = False  # it prints its own warnings
    license = options.license
    if license is None and sys.stdin.isatty():
        license = input("License of the weights, for example mit or cc-by-4.0 (empty to state none): ").strip() or None
    card = {"license": license, "metrics": options.metrics or [], "samples": options.samples}
    if options.dry_run:
        contents = hub.repository_files(options.folder, options.repo_id, **card)
        for path, content in sorted(contents.items()):
            size = len(content) if isinstance(content, bytes) else content.stat().st_size
            print(f"{size:>15,} bytes  {path}", file=sys.stderr)
        readme = contents["README.md"]
        print(readme.decode() if isinstance(readme, bytes) else readme.read_text())
        return
    address = hub.push(
        options.folder,
        options.repo_id,
        private=options.private or None,
        revision=options.revision,
        create_pr=options.create_pr,
        token=options.token,
        **card,
    )
    print(address)


def pull(options: Pull) -> None:
    """Download a model and print its folder."""
    print(hub_download.pull(options.repo_id, options.output, options.revision, options.variant, options.token))
