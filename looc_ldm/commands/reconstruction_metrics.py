"""Which figures of reconstructions a command measures: its options, and what they stand for once weights are checked.

What several commands share (`evaluate reconstruction`, `analyze`, `compare`).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from looc_ldm.arguments import add_feature_options, add_protocol_option
from looc_ldm.errors import UserError

OF_PIXELS = ("psnr", "ssim", "l1")  # need no weights
OF_LPIPS = {"lpips_vgg": "vgg", "lpips_alex": "alex"}  # with the network of the package lpips
OF_FEATURES = ("rfid", "kid")
METRICS = (*OF_PIXELS, *OF_LPIPS, *OF_FEATURES)


def add_reconstruction_metric_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `reconstruction_measures` reads."""
    group = parser.add_argument_group(
        "what is measured",
        "The codebook (use, perplexity, dead codes, entropy), the rate and the parameters always are. Figures whose "
        "weights are not there are left out, and named, unless --metrics asks for them: then the weights are "
        "downloaded, which is tried before anything is computed.",
    )
    group.add_argument(
        "--metrics",
        nargs="+",
        metavar="NAME",
        choices=(*METRICS, "all"),
        help=f"{', '.join(METRICS)}, or all (default: {' '.join(OF_PIXELS)} and those whose weights are given)",
    )
    add_protocol_option(group)
    add_feature_options(group, without="rfid and kid are left out")
    for name, network in OF_LPIPS.items():
        group.add_argument(
            f"--lpips-{network}-weights",
            type=Path,
            metavar="FILE",
            help=f"torchvision's {network} network, .safetensors or .pth (default: none; {name} is left out)",
        )


@dataclass
class ReconstructionMeasures:
    """Figures to measure, with their networks.

    Attributes:
        metrics (`list[str]`): Their names, of `METRICS`.
        protocol (`str`): "clean" or "paper".
        features (`InceptionFeatures`, *optional*): For rFID and KID.
        lpips (`dict[str, nn.Module]`): Networks of LPIPS by the name of the figure.
        weights (`dict[str, dict]`): Which weights these networks have, for the record.
        not_measured (`list[str]`): A line each for figures that are left out, which says how to have them.
    """

    metrics: list[str]
    protocol: str = "clean"
    features: object | None = None
    lpips: dict = field(default_factory=dict)
    weights: dict[str, dict] = field(default_factory=dict)
    not_measured: list[str] = field(default_factory=list)

    @property
    def seeds(self) -> dict[str, int]:
        """Of random numbers that figures depend on, for the record."""
        from looc_ldm.metrics.fidelity import SEED

        return {"kid": SEED} if "kid" in self.metrics else {}

    def evaluate(self, model, batches: Iterable, content_size: tuple[int, int] | None, accelerator=None) -> dict:
        """The figures of a model; see `looc_ldm.metrics.evaluate_reconstruction`.

        Args:
            model (`LooCVQModel`): The autoencoder, on its device.
            batches: Float images `(B, C, H, W)` in [-1, 1]; of several processes, process r has batches r, r + R, ...
            content_size: Height and width of the images inside their padding, if they are padded.
            accelerator (`Accelerator`, *optional*): The processes. With it this is a collective.

        Raises:
            UserError: Images that cannot be measured.
        """
        from looc_ldm.commands.shared import as_user_errors
        from looc_ldm.metrics import evaluate_reconstruction

        with as_user_errors(ValueError):
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


def reconstruction_measures(options: argparse.Namespace) -> ReconstructionMeasures:
    """What the options of `add_reconstruction_metric_options` ask for, with every network loaded once, as a check.

    Raises:
        UserError: Weights that are missing, of another network or cannot be downloaded, or that nothing needs.
    """
    from looc_ldm.commands.networks import checked
    from looc_ldm.metrics.lpips import load_lpips, lpips_identity
    from looc_ldm.metrics.protocols import get_protocol

    protocol = get_protocol(options.protocol)
    given = _given_weights(options)
    if options.metrics is None:
        chosen = [name for name in METRICS if name in OF_PIXELS or given[name] is not None]
    else:
        chosen = [name for name in METRICS if name in options.metrics or "all" in options.metrics]
    _refuse_unused(options, chosen)
    measures = ReconstructionMeasures(chosen, protocol.name, not_measured=_left_out(chosen, options.metrics is None))
    if set(chosen) & set(OF_FEATURES):
        from looc_ldm.metrics import InceptionFeatures

        with checked("--inception-weights"):
            features = InceptionFeatures(
                options.feature_layer, options.inception_weights, pil_resize=protocol.pil_resize
            )
            features.check()
        measures.features = features
        measures.weights["inception"] = features.identity()
    for name, network in OF_LPIPS.items():
        if name in chosen:
            with checked(f"--lpips-{network}-weights"):
                measures.lpips[name] = load_lpips(network, given[name]).eval()
            measures.weights[name] = lpips_identity(network, given[name])
    return measures


def _given_weights(options: argparse.Namespace) -> dict[str, Path | None]:
    lpips = {name: getattr(options, f"{name}_weights") for name in OF_LPIPS}
    return dict.fromkeys(OF_PIXELS) | lpips | dict.fromkeys(OF_FEATURES, options.inception_weights)


def _refuse_unused(options: argparse.Namespace, chosen: list[str]) -> None:
    needed = {f"--lpips-{network}-weights": (name,) for name, network in OF_LPIPS.items()}
    needed["--inception-weights"] = OF_FEATURES
    for option, names in needed.items():
        if getattr(options, option[2:].replace("-", "_")) is not None and not set(names) & set(chosen):
            raise UserError(f"{option} is given, but --metrics does not name {' or '.join(names)}, which need it.")


def _left_out(chosen: list[str], by_default: bool) -> list[str]:
    """Only where nothing was asked for: who names metrics knows what is left out."""
    if not by_default:
        return []
    lines = []
    for names, option in (
        (["lpips_vgg"], "--lpips-vgg-weights"),
        (["lpips_alex"], "--lpips-alex-weights"),
        (list(OF_FEATURES), "--inception-weights"),
    ):
        if not set(names) & set(chosen):
            lines.append(
                f"not measured: {', '.join(names)} (give {option} FILE, or --metrics {' '.join(names)} to download it)"
            )
    return lines
