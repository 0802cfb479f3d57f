"""Which figures of generated images a command measures: its options, and their networks once weights are checked."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from looc_ldm.arguments import add_feature_options, add_protocol_option
from looc_ldm.commands.networks import checked
from looc_ldm.errors import UserError

# Those of looc_ldm.metrics.generation, which is not imported for their names alone; METRIC@NETWORK, or only METRIC
# where there is one usual network.
METRICS = (
    "fid",
    "kid",
    "is",
    "precision_recall",
    "class_fid",
    "fd@dinov2",
    "kd@dinov2",
    "precision_recall@dinov2",
    "precision_recall@vgg",
    "cmmd",
)
OPTION_OF = {"inception": "--inception-weights", "dinov2": "--dinov2", "clip": "--clip", "vgg": "--vgg-weights"}


def add_generation_metric_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `generation_measures` reads."""
    group = parser.add_argument_group(
        "what is measured",
        "fid, kid, is (Inception score), precision_recall and class_fid (FID within each class, averaged) by Inception "
        "features; fd@dinov2 (FD-DINOv2), kd@dinov2 and precision_recall@dinov2 by DINOv2; precision_recall@vgg as "
        "torch-fidelity has it; cmmd by CLIP. Figures of one network come from one pass over the images.",
    )
    group.add_argument(
        "--metrics",
        nargs="+",
        metavar="NAME",
        choices=METRICS,
        default=["fid", "kid"],
        help=f"{', '.join(METRICS)} (default: fid kid)",
    )
    add_protocol_option(group)
    networks = parser.add_argument_group(
        "networks",
        "Weights that are not given are downloaded, which is tried before anything is drawn or measured.",
    )
    add_feature_options(networks, without="it is downloaded")
    networks.add_argument(
        "--dinov2", metavar="ID_OR_FOLDER", help="a DINOv2 of transformers (default: facebook/dinov2-large)"
    )
    networks.add_argument(
        "--clip",
        metavar="ID_OR_FOLDER",
        help="a CLIP of transformers (default: openai/clip-vit-large-patch14-336)",
    )
    networks.add_argument(
        "--vgg-weights", type=Path, metavar="FILE", help="torchvision's VGG16, .pth (default: it is downloaded)"
    )


@dataclass
class GenerationMeasures:
    """Figures to measure, with their networks.

    Attributes:
        metrics (`list[str]`): Of `METRICS`.
        protocol: As `looc_ldm.metrics.protocols.get_protocol` gives it.
        extractors (`dict[str, Extractor]`): By "inception", "dinov2", "clip" and "vgg", those that are needed.
    """

    metrics: list[str]
    protocol: object
    extractors: dict

    @property
    def weights(self) -> dict[str, dict]:
        """Which weights the networks have, for the record."""
        return {name: extractor.identity() for name, extractor in self.extractors.items()}


def generation_measures(options: argparse.Namespace) -> GenerationMeasures:
    """What the options of `add_generation_metric_options` ask for, with every network loaded once, as a check.

    Raises:
        UserError: Weights that are missing, of another network or cannot be downloaded, or that nothing needs.
    """
    from looc_ldm.metrics.generation import check_metrics, networks_needed
    from looc_ldm.metrics.protocols import get_protocol

    metrics, protocol = check_metrics(options.metrics), get_protocol(options.protocol)
    needed = networks_needed(metrics)
    for network, option in OPTION_OF.items():
        if getattr(options, option[2:].replace("-", "_")) is not None and network not in needed:
            raise UserError(f"{option} is given, but no figure of --metrics {' '.join(metrics)} needs it.")
    extractors = {}
    for network in needed:
        with checked(OPTION_OF[network]):
            extractors[network] = _extractor(network, options, "is" in metrics, protocol.pil_resize)
            extractors[network].check()
    return GenerationMeasures(metrics, protocol, extractors)


def _extractor(network: str, options: argparse.Namespace, logits: bool, pil_resize: int | None):
    from looc_ldm.metrics import CLIPFeatures, DINOv2Features, InceptionFeatures, VGG16Features

    if network == "inception":
        return InceptionFeatures(options.feature_layer, options.inception_weights, logits, pil_resize)
    if network == "dinov2":
        return DINOv2Features(options.dinov2) if options.dinov2 else DINOv2Features()
    if network == "clip":
        return CLIPFeatures(options.clip) if options.clip else CLIPFeatures()
    return VGG16Features(options.vgg_weights)
