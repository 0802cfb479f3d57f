"""Figures that a command measures, with their networks, whose weights are checked before any work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch.nn as nn
from accelerate import Accelerator

from looc_ldm.commands.options import GenerationMetricOptions, InceptionOptions, ReconstructionMetricOptions
from looc_ldm.metrics import CLIPFeatures, DINOv2Features, InceptionFeatures, VGG16Features, evaluate_reconstruction
from looc_ldm.metrics.extractors import Extractor
from looc_ldm.metrics.fidelity import SEED
from looc_ldm.metrics.generation import DEFAULT_METRICS, METRICS, check_metrics, networks_needed
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
GENERATION = {name: NETWORK_OPTIONS[metric.network] for name, metric in METRICS.items()}


@dataclass(frozen=True)
class ReconstructionMeasures:
    """Figures of reconstructions to measure, with their networks.

    Attributes:
        metrics: Names of `RECONSTRUCTION`.
        protocol: The way images are prepared.
        features: Network of rFID and KID.
        lpips: Networks of LPIPS by the name of the figure.
        weights: Which weights these networks have, for the record.
        not_measured: One line per figure that is left out, which says how to have it.
    """

    metrics: list[str]
    protocol: CleanProtocol
    features: InceptionFeatures | None = None
    lpips: dict[str, nn.Module] = field(default_factory=dict)
    weights: dict[str, dict] = field(default_factory=dict)
    not_measured: list[str] = field(default_factory=list)

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
        """Return the figures of a model, as `looc_ldm.metrics.evaluate_reconstruction`. A collective.

        Args:
            model: The autoencoder, on its device.
            batches: Float images `(B, C, H, W)` in [-1, 1]; with R processes, process r has batches r, r + R, ...
            content_size: Height and width of the images inside their padding, if they are padded.
            accelerator: The processes.
        """
        return evaluate_reconstruction(
            model,
            batches,
            content_size,
            self.features,
            {name: network.to(model.device) for name, network in self.lpips.items()},
            protocol=self.protocol.name,
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
        """Which weights the networks have, for the record."""
        return {name: extractor.identity() for name, extractor in self.extractors.items()}


def reconstruction_measures(options: ReconstructionMetricOptions) -> ReconstructionMeasures:
    """Return what the options ask for, with every network loaded once, as a check.

    Raises:
        UserError: Weights that are missing, of another network or cannot be downloaded, or that nothing needs.
    """
    protocol = get_protocol(options.protocol)
    given = {name: option and getattr(options, option) for name, option in RECONSTRUCTION.items()}
    for name in options.metrics or ():
        if name not in (*RECONSTRUCTION, "all"):
            raise UserError(f"--metrics must be of {', '.join(RECONSTRUCTION)}, or all, got {name!r}.")
    if options.metrics is None:
        metrics = [name for name, option in RECONSTRUCTION.items() if option is None or given[name] is not None]
        not_measured = _not_measured(metrics)
    else:
        metrics = [name for name in RECONSTRUCTION if name in options.metrics or "all" in options.metrics]
        not_measured = []
    _refuse_unused(options, RECONSTRUCTION, metrics)
    features, lpips, weights = None, {}, {}
    if set(metrics) & set(FEATURE_METRICS):
        features = inception_features(options, pil_resize=protocol.pil_resize)
        weights["inception"] = features.identity()
    for name in [name for name in LPIPS if name in metrics]:
        with _naming(RECONSTRUCTION[name]):
            lpips[name] = load_lpips(LPIPS[name], given[name])
        weights[name] = lpips_identity(LPIPS[name], given[name])
    return ReconstructionMeasures(metrics, protocol, features, lpips, weights, not_measured)


def generation_measures(options: GenerationMetricOptions) -> GenerationMeasures:
    """Return what the options ask for, with every network loaded once, as a check.

    Raises:
        UserError: Weights that are missing, of another network or cannot be downloaded, or that nothing needs.
    """
    metrics = check_metrics(DEFAULT_METRICS if options.metrics is None else options.metrics)
    protocol = get_protocol(options.protocol)
    _refuse_unused(options, GENERATION, metrics)
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
    """Return the network, loaded once, as a check. Raises UserError as `reconstruction_measures`."""
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


def _refuse_unused(options: InceptionOptions, table: Mapping[str, str | None], metrics: list[str]) -> None:
    for option in filter(None, dict.fromkeys(table.values())):
        names = [name for name in table if table[name] == option]
        if getattr(options, option) is not None and not set(names) & set(metrics):
            raise UserError(
                f"{_flag(option)} is given, but --metrics does not name {' or '.join(names)}, which need it."
            )


def _not_measured(metrics: list[str]) -> list[str]:
    lines = []
    for option in filter(None, dict.fromkeys(RECONSTRUCTION.values())):
        names = [name for name, needed in RECONSTRUCTION.items() if needed == option and name not in metrics]
        if names:
            lines.append(
                f"not measured: {', '.join(names)} (give {_flag(option)} FILE, or --metrics {' '.join(names)} to "
                "download it)"
            )
    return lines
