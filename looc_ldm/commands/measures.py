"""Figures that a command measures, with their networks, whose weights are checked before any work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.nn as nn
from accelerate import Accelerator

from looc_ldm.commands.options import GenerationMetricOptions, InceptionOptions, ReconstructionMetricOptions
from looc_ldm.metrics import CLIPFeatures, DINOv2Features, InceptionFeatures, VGG16Features, evaluate_reconstruction
from looc_ldm.metrics.extractors import Extractor
from looc_ldm.metrics.fidelity import SEED
from looc_ldm.metrics.generation import DEFAULT_METRICS, check_metrics, networks_needed
from looc_ldm.metrics.lpips import NETWORKS, load_lpips, lpips_identity
from looc_ldm.metrics.protocols import CleanProtocol, get_protocol
from looc_ldm.metrics.reconstruction import FEATURE_METRICS, PIXEL_METRICS
from looc_ldm.models.autoencoder import LooCVQModel
from looc_ldm.utils.errors import UserError

# The option that gives the weights of a figure's network; None if it needs none.
LPIPS = {f"lpips_{network}": network for network in NETWORKS}
RECONSTRUCTION: dict[str, str | None] = {
    **dict.fromkeys(PIXEL_METRICS),
    **{name: f"{name}_weights" for name in LPIPS},
    **dict.fromkeys(FEATURE_METRICS, "inception_weights"),
}
NETWORK_OPTIONS = {"inception": "inception_weights", "dinov2": "dinov2", "clip": "clip", "vgg": "vgg_weights"}


@dataclass(frozen=True)
class ReconstructionMeasures:
    """Figures of reconstructions to measure, with their networks.

    Attributes:
        metrics: Names of `RECONSTRUCTION`.
        protocol: Name of the way images are prepared.
        features: Network of rFID and KID.
        lpips: Networks of LPIPS by the name of the figure.
        weights: Identity of the networks' weights, for the record.
        not_measured: One line per option that would give the weights of figures that are left out.
    """

    metrics: list[str]
    protocol: str
    features: InceptionFeatures | None
    lpips: dict[str, nn.Module]
    weights: dict[str, dict]
    not_measured: list[str]

    @property
    def seeds(self) -> dict[str, int]:
        """Seeds that figures depend on, for the record."""
        return {"kid": SEED} if "kid" in self.metrics else {}

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

    @property
    def weights(self) -> dict[str, dict]:
        """Identity of the networks' weights, for the record."""
        return {name: extractor.identity() for name, extractor in self.extractors.items()}


def reconstruction_measures(options: ReconstructionMetricOptions) -> ReconstructionMeasures:
    """Return the measures that the options name, with every network loaded once, as a check.

    Raises:
        UserError: Weights that are missing, of a different network, or cannot be downloaded.
    """
    protocol = get_protocol(options.protocol)
    asked = options.metrics or ()
    for name in asked:
        if name not in (*RECONSTRUCTION, "all"):
            raise UserError(f"--metrics must be of {', '.join(RECONSTRUCTION)}, or all, got {name!r}.")
    metrics, left_out = [], {}
    for name, option in RECONSTRUCTION.items():
        has_weights = option is None or getattr(options, option) is not None
        if name in asked or "all" in asked or (not asked and has_weights):
            metrics.append(name)
        elif not asked:
            left_out.setdefault(option, []).append(name)
    not_measured = [
        f"not measured: {', '.join(names)} (give {_flag(option)} FILE, or --metrics {' '.join(names)} to download it)"
        for option, names in left_out.items()
    ]
    features, lpips, weights = None, {}, {}
    if set(metrics) & set(FEATURE_METRICS):
        features = inception_features(options, pil_resize=protocol.pil_resize)
        weights["inception"] = features.identity()
    for name in [name for name in LPIPS if name in metrics]:
        file = getattr(options, RECONSTRUCTION[name])
        with _naming(RECONSTRUCTION[name]):
            lpips[name] = load_lpips(LPIPS[name], file)
        weights[name] = lpips_identity(LPIPS[name], file)
    return ReconstructionMeasures(metrics, options.protocol, features, lpips, weights, not_measured)


def generation_measures(options: GenerationMetricOptions) -> GenerationMeasures:
    """Return the measures that the options name, with every network loaded once, as a check.

    Raises:
        UserError: Weights that are missing, of a different network, or cannot be downloaded.
    """
    metrics = check_metrics(DEFAULT_METRICS if options.metrics is None else options.metrics)
    protocol = get_protocol(options.protocol)
    makers = {
        "inception": lambda: InceptionFeatures(
            options.feature_layer, options.inception_weights, "is" in metrics, protocol.pil_resize
        ),
        "dinov2": lambda: DINOv2Features(*filter(None, [options.dinov2])),
        "clip": lambda: CLIPFeatures(*filter(None, [options.clip])),
        "vgg": lambda: VGG16Features(options.vgg_weights),
    }
    extractors = {}
    for network in networks_needed(metrics):
        with _naming(NETWORK_OPTIONS[network]):
            extractors[network] = makers[network]()
            extractors[network].check()
    return GenerationMeasures(metrics, protocol, extractors)


def inception_features(options: InceptionOptions, pil_resize: int | None = None) -> InceptionFeatures:
    """Return the network, loaded once, as a check. Raises UserError if that fails."""
    with _naming("inception_weights"):
        features = InceptionFeatures(options.feature_layer, options.inception_weights, pil_resize=pil_resize)
        features.check()
        return features


@contextmanager
def _naming(option: str) -> Iterator[None]:
    """Name the option that gives the weights in errors of loading them."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError) as error:
        raise UserError(f"{_flag(option)}: {error}") from error


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"
