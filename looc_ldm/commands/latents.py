"""`looc-ldm cache-latents`: encode a data set once, for stage 2."""

from __future__ import annotations

import argparse

from looc_ldm.arguments import add_cache_options


def add_parsers(commands) -> None:
    """Add `cache-latents` to the commands of `looc-ldm`."""
    parser = commands.add_parser(
        "cache-latents",
        help="encode a data set once, for stage 2",
        description="Encode a data set once, for stage 2. Interrupted, the same command goes on. By several processes: "
        "accelerate launch -m looc_ldm.training.latents, with the same options.",
    )
    add_cache_options(parser)
    parser.set_defaults(command=_cache_latents)


def _cache_latents(options: argparse.Namespace) -> None:
    from looc_ldm.training.latents import cache_data_set

    cache_data_set(options)
