"""Networks whose features compare sets of images: Inception, VGG16, DINOv2 and CLIP.

Each is a small frozen dataclass that states network, layer and weights, and has

- `name`: the suffix of the figures, for instance `fid@2048`;
- `dim`: the number of features;
- `identity()`: network, weights and their SHA-256, ready for JSON; equal identities give equal features;
- `load(device)`: loads the network, downloading it if no weights were given, and returns a function of uint8 images
  `(B, 1 or 3, H, W)` in 0..255 (grey ones count as RGB). It gives `{"features": (B, dim)}`, float32 on that device, and
  `"logits"` if the dataclass says so. It computes in float32 under any autocast. `load` raises FileNotFoundError (no
  such file), ValueError (a different network, or a pickle of more than tensors) or ConnectionError (no download), with
  one line that says how to give the weights.

torch-fidelity, torchvision and transformers are imported when a network is first needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from looc_ldm.images.pixels import to_pil
from looc_ldm.metrics.networks import as_rgb, downloaded_weights, file_sha256, in_float32
from looc_ldm.metrics.vision_transformers import CLIPFeatures, DINOv2Features

LAYERS = ("64", "192", "768", "2048")
INCEPTION_SIZE = 299  # pixels, of the image that the network sees


@dataclass(frozen=True)
class InceptionFeatures:
    """Features of the FID Inception network.

    Figures at different layers live on different scales: only `"2048"` is the FID of published tables.

    Args:
        layer (`str`, defaults to `"2048"`): `"64"`, `"192"`, `"768"` or `"2048"`, the number of features.
        weights (`Path`, *optional*): A torch-fidelity state dict (`.pth`) of the network. With it nothing is ever
            downloaded; without it torch-fidelity downloads its own once (95 MB).
        logits (`bool`): Also give the 1,008 logits without the last bias, which the Inception score is computed from.
        pil_resize (`int`, *optional*): Resize images to a square of this side with Pillow's bilinear filter, and from
            there to the network's 299 pixels as pytorch-fid does, instead of torch-fidelity's resize. The authors'
            script uses 229.

    Raises:
        ValueError: An unknown layer.
    """

    layer: str = "2048"
    weights: Path | None = None
    logits: bool = False
    pil_resize: int | None = None

    def __post_init__(self):
        if self.layer not in LAYERS:
            raise ValueError(f"layer must be one of {', '.join(map(repr, LAYERS))}, got {self.layer!r}.")

    @property
    def name(self) -> str:
        return self.layer

    @property
    def dim(self) -> int:
        return int(self.layer)

    def identity(self) -> dict[str, str | int | bool | None]:
        """Return the facts that identify the features, for results and stored statistics.

        They are the network, its layer, whether logits are taken, the resize, and the weights' file and SHA-256. The
        weights are downloaded if they are missing.
        """
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

        file = Path(self.weights or downloaded_weights(URL_INCEPTION_V3, lambda: self.load("cpu")))
        return {
            "network": "inception-v3-compat",
            "layer": self.layer,
            "logits": self.logits,
            "pil_resize": self.pil_resize,
            "weights": str(file),
            "sha256": file_sha256(file),
        }

    def load(self, device: torch.device | str) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
        """Return the function of images to "features" `(B, dim)` and, if `logits`, "logits" `(B, 1008)`.

        Raises:
            FileNotFoundError, ValueError: There are no such weights, or they lack `layer` or the logits.
        """
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        layers = [self.layer, "logits_unbiased"] if self.logits else [self.layer]
        names = ("features", "logits")[: len(layers)]
        network = _torch_fidelity_network(
            FeatureExtractorInceptionV3, "inception-v3-compat", layers, self.weights, "Inception"
        ).to(device)

        @torch.no_grad()
        def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
            images = as_rgb(images)
            with in_float32(device):
                if self.pil_resize is None:
                    found = network(images.to(device))
                else:
                    prepared = _prepare_as_pytorch_fid(images, self.pil_resize).to(device)
                    # The first convolution gets these instead of the images that torch-fidelity has prepared.
                    with network.Conv2d_1a_3x3.register_forward_pre_hook(lambda *_: (prepared,)):
                        found = network(images.to(device))
                return dict(zip(names, found, strict=True))

        source = self.weights if self.weights is not None else "The downloaded file"
        for name, values in features(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).items():
            if not values.isfinite().all():
                missing = f"layer {self.layer}: its features" if name == "features" else "the logits: they"
                raise ValueError(f"{source} does not hold {missing} are not finite.")
        return features


@dataclass(frozen=True)
class VGG16Features:
    """The second fully connected layer of VGG16, after its ReLU: the features of improved precision and recall.

    Args:
        weights (`Path`, *optional*): torchvision's state dict (`.pth`) of the whole network. With it nothing is ever
            downloaded; without it torchvision downloads its own once (528 MB).
    """

    weights: Path | None = None

    name: ClassVar[str] = "vgg16"
    dim: ClassVar[int] = 4096

    def identity(self) -> dict[str, str]:
        """Return network, layer, weights and their SHA-256. Downloads the network if need be."""
        from torchvision.models import VGG16_Weights

        file = Path(self.weights or downloaded_weights(VGG16_Weights.IMAGENET1K_V1.url, lambda: self.load("cpu")))
        return {"network": "vgg16", "layer": "fc2_relu", "weights": str(file), "sha256": file_sha256(file)}

    def load(self, device: torch.device | str) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
        """Return the function of images to "features" `(B, 4096)`."""
        from torch_fidelity.feature_extractor_vgg16 import FeatureExtractorVGG16

        network = _torch_fidelity_network(FeatureExtractorVGG16, "vgg16", ["fc2_relu"], self.weights, "VGG16")
        network = network.to(device)

        @torch.no_grad()
        def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
            with in_float32(device):
                return {"features": network(as_rgb(images).to(device))[0]}

        return features


Extractor = InceptionFeatures | VGG16Features | DINOv2Features | CLIPFeatures


def _torch_fidelity_network(
    kind: type[nn.Module], name: str, layers: list[str], weights: Path | None, title: str
) -> nn.Module:
    if weights is not None and not Path(weights).is_file():
        raise FileNotFoundError(f"No {title} weights at {weights}.")
    try:
        if weights is not None:
            # torch-fidelity unpickles whatever the file holds; this load refuses anything but tensors.
            torch.load(weights, map_location="cpu", weights_only=True)
        path = None if weights is None else str(weights)
        return kind(name, layers, feature_extractor_weights_path=path, verbose=False)
    except OSError as error:
        if weights is not None:
            raise
        raise ConnectionError(f"The {title} weights could not be downloaded ({error}); give a path.") from error
    except Exception as error:  # pickles of other things, and files that are no pickles, fail in many ways
        source = weights if weights is not None else "The downloaded file"
        raise ValueError(f"{source} is not a state dict of torch-fidelity's {title} network.") from error


def _prepare_as_pytorch_fid(images: torch.Tensor, side: int) -> torch.Tensor:
    """Resize uint8 `(B, 3, H, W)` by Pillow to `side`, then as pytorch-fid to float `(B, 3, 299, 299)` in [-1, 1].

    torch-fidelity's resize uses different pixel centres, and it normalizes by (x - 128) / 128.
    """
    resized = [to_pil(image).resize((side, side), Image.Resampling.BILINEAR) for image in images]
    x = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255
    return F.interpolate(x, (INCEPTION_SIZE,) * 2, mode="bilinear", align_corners=False) * 2 - 1
