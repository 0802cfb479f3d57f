"""Figures that a command measures, with their networks.

Weights are loaded once before any work, so that missing or damaged ones stop the command early.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import torch.nn as nn
from accelerate import Accelerator

from looc_ldm.commands.options import GenerationMetricOptions, InceptionOptions, ReconstructionMetricOptions
from looc_ldm.commands.record import bias_note
from looc_ldm.metrics import CLIPFeatures, DINOv2Features, InceptionFeatures, VGG16Features, evaluate_reconstruction
from looc_ldm.metrics.extractors import Extractor
from looc_ldm.metrics.fidelity import SEED
from looc_ldm.metrics.generation import DEFAULT_METRICS, check_metrics, networks_needed
from looc_ldm.metrics.lpips import load_lpips, lpips_identity
from looc_ldm.metrics.protocols import CleanProtocol, get_protocol
from looc_ldm.metrics.reconstruction import FEATURE_METRICS, PIXEL_METRICS
from looc_ldm.models.autoencoder import LooCVQModel
from looc_ldm.utils.errors import UserError

T = TypeVar("T")

LPIPS = {"lpips_vgg": "vgg", "lpips_alex": "alex"}
# The network of each figure of reconstructions; None if it needs none.
RECONSTRUCTION = {
    **dict.fromkeys(PIXEL_METRICS),
    **{name: name for name in LPIPS},
    **dict.fromkeys(FEATURE_METRICS, "inception"),
}
# The option that gives the weights of each network.
WEIGHTS = {name: f"{name}_weights" for name in ("inception", *LPIPS, "vgg")} | {"dinov2": "dinov2", "clip": "clip"}


@dataclass(frozen=True)
class ReconstructionMeasures:
    """Figures of reconstructions to measure, with their networks."""

    metrics: list[str]  # names in `RECONSTRUCTION`
    protocol: str
    features: InceptionFeatures | None  # for rFID and KID
    lpips: dict[str, nn.Module]  # by the name of the figure
    weights: dict[str, dict]  # identity of the networks' weights, for the record
    not_measured: list[str]  # one line per option that would give missing weights

    @property
    def seeds(self) -> dict[str, int]:
        """Seeds that figures depend on, for the record."""
        return {"kid": SEED} if "kid" in self.metrics else {}

    def notes(self, images: int) -> list[str]:
        """Return lines on figures that are left out, or biased because there are few images."""
        if "rfid" not in self.metrics:
            return self.not_measured
        return self.not_measured + bias_note(images, self.features.dim, f"rfid@{self.features.name}")

    def evaluate(
        self,
        model: LooCVQModel,
        batches: Iterable,
        content_size: tuple[int, int] | None,
        accelerator: Accelerator | None = None,
    ) -> dict:
        """Return the figures of a model: `looc_ldm.metrics.evaluate_reconstruction`. Collective."""
        return evaluate_reconstruction(
            model,
            batches,
            content_size,
            self.features,
            {name: network.to(model.device) for name, network in self.lpips.items()},
            protocol=self.protocol,
            metrics=[name for name in self.metrics if name not in self.lpips],
            accelerator=accelerator,
        )


@dataclass(frozen=True)
class GenerationMeasures:
    """Figures of samples to measure, with their networks by "inception", "dinov2", "clip" and "vgg"."""

    metrics: list[str]
    protocol: CleanProtocol
    extractors: dict[str, Extractor]


def reconstruction_measures(options: ReconstructionMetricOptions) -> ReconstructionMeasures:
    """Return the measures that the options name.

    Raises:
        UserError: Weights that are missing, of a different network, or cannot be downloaded.
    """
    protocol = get_protocol(options.protocol)
    asked = options.metrics or ()
    for name in asked:
        if name not in (*RECONSTRUCTION, "all"):
            raise UserError(f"--metrics must be some of {', '.join(RECONSTRUCTION)}, or all, got {name!r}.")
    files = {name: getattr(options, WEIGHTS[name]) for name in ("inception", *LPIPS)}
    metrics, left_out = [], {}
    for name, network in RECONSTRUCTION.items():
        if name in asked or "all" in asked or (not asked and (network is None or files[network])):
            metrics.append(name)
        elif not asked:
            left_out.setdefault(network, []).append(name)
    not_measured = [
        f"not measured: {', '.join(names)} (give {_flag(network)} FILE, or --metrics {' '.join(names)} to download it)"
        for network, names in left_out.items()
    ]
    features, lpips, weights = None, {}, {}
    for network in dict.fromkeys(RECONSTRUCTION[name] for name in metrics):
        if network == "inception":
            features = inception_features(options, pil_resize=protocol.pil_resize)
            weights[network] = features.identity()
        elif network is not None:
            lpips[network] = _load(network, lambda name=network: load_lpips(LPIPS[name], files[name]))
            weights[network] = lpips_identity(LPIPS[network], files[network])
    return ReconstructionMeasures(metrics, options.protocol, features, lpips, weights, not_measured)


def generation_measures(options: GenerationMetricOptions) -> GenerationMeasures:
    """Return the measures that the options name.

    Raises:
        UserError: Weights that are missing, of a different network, or cannot be downloaded.
    """
    metrics = check_metrics(DEFAULT_METRICS if options.metrics is None else options.metrics)
    protocol = get_protocol(options.protocol)
    makers = {
        "inception": lambda: inception_features(options, "is" in metrics, protocol.pil_resize),
        "dinov2": lambda: DINOv2Features(*filter(None, [options.dinov2])),
        "clip": lambda: CLIPFeatures(*filter(None, [options.clip])),
        "vgg": lambda: VGG16Features(options.vgg_weights),
    }
    return GenerationMeasures(metrics, protocol, {name: _load(name, makers[name]) for name in networks_needed(metrics)})


def inception_features(
    options: InceptionOptions, logits: bool = False, pil_resize: int | None = None
) -> InceptionFeatures:
    """Return the Inception network that the options name."""
    return _load(
        "inception", lambda: InceptionFeatures(options.feature_layer, options.inception_weights, logits, pil_resize)
    )


def _load(network: str, make: Callable[[], T]) -> T:
    """Build a network and check that its weights load. Errors name the option that gives the file of weights."""
    try:
        made = make()
        if not isinstance(made, nn.Module):  # LPIPS is loaded already
            made.load("cpu")
        return made
    except UserError:
        raise
    except (ValueError, OSError) as error:
        raise UserError(f"{_flag(network)}: {error}") from error


def _flag(network: str) -> str:
    return f"--{WEIGHTS[network].replace('_', '-')}"
