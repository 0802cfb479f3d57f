"""FID and KID of two sets of images, by torch-fidelity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset

LAYERS = ("64", "192", "768", "2048")
KID_SUBSET_SIZE = 1000
SEED = 2020  # of the subsets of KID; torch-fidelity's default, so that its command line gives the same figure


@dataclass(frozen=True)
class InceptionFeatures:
    """Which features of the FID Inception network images are compared by.

    Figures at different layers live on different scales: only `"2048"` is the FID of published tables.

    Args:
        layer (`str`, defaults to `"2048"`): `"64"`, `"192"`, `"768"` or `"2048"`, the number of features.
        weights (`Path`, *optional*): A torch-fidelity state dict (`.pth`) of the network. With it nothing is ever
            downloaded; without it torch-fidelity downloads its own once (95 MB).

    Raises:
        ValueError: Another layer.
        FileNotFoundError: `weights` is not a file.
    """

    layer: str = "2048"
    weights: Path | None = None

    def __post_init__(self):
        if self.layer not in LAYERS:
            raise ValueError(f"layer must be one of {', '.join(LAYERS)}, got {self.layer!r}.")
        if self.weights is not None and not Path(self.weights).is_file():
            raise FileNotFoundError(f"No Inception weights at {self.weights}.")

    @property
    def weights_path(self) -> str | None:
        """The path as torch-fidelity takes it."""
        return None if self.weights is None else str(self.weights)

    def check(self) -> None:
        """Fail now rather than after hours of sampling. Downloads the network if no `weights` were given.

        Raises:
            ValueError: The file is not a state dict of the FID Inception network, holds more than tensors, or does not
                hold `layer` (its features are not finite).
            ConnectionError: The network could not be downloaded.
        """
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        source = self.weights if self.weights is not None else "The downloaded file"
        try:
            if self.weights is not None:
                # torch-fidelity unpickles whatever the file holds; this load refuses anything but tensors.
                torch.load(self.weights, map_location="cpu", weights_only=True)
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", [self.layer], feature_extractor_weights_path=self.weights_path, verbose=False
            )
        except OSError as error:
            if self.weights is not None:
                raise
            raise ConnectionError(f"The Inception weights could not be downloaded ({error}); give a path.") from error
        except Exception as error:  # whatever a pickle of something else, or no pickle at all, leads to
            raise ValueError(f"{source} is not a state dict of torch-fidelity's Inception network.") from error
        with torch.no_grad():
            (features,) = network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
        if not features.isfinite().all():
            raise ValueError(f"{source} does not hold layer {self.layer}: its features are not finite.")


def fid_and_kid(
    first: Iterable[torch.Tensor],
    second: Iterable[torch.Tensor],
    features: InceptionFeatures,
    second_cache: Path | None = None,
) -> dict[str, float | int | str]:
    """Fréchet and kernel Inception distance of two sets of images.

    FID falls with the number of images although the distribution stays the same, so figures compare only at equal
    counts; KID does not. Runs on the GPU where there is one; the same images give the same figures.

    Args:
        first, second: Images as uint8 tensors of shape `(C, H, W)`, C = 1 (repeated to 3) or 3, of one shape in each
            set. A sequence (a tensor `(N, C, H, W)` is one, a lazy data set another) is read image by image, any
            other iterable is held in memory.
        features (`InceptionFeatures`): The network and its layer, which every key carries.
        second_cache (`Path`, *optional*): Folder that keeps the features of `second` for further calls. It is the
            caller's to give a folder per set of images: it is not looked at what they are.

    Returns:
        `dict`: `protocol` ("clean"); `images_first`, `images_second`; and for instance `fid@2048`, `kid@2048` (mean
        over 100 subsets of min(1000, both counts) images) and `kid_std@2048`. FID is 0 for equal sets, up to
        rounding; KID is unbiased and may be slightly negative.

    Raises:
        ValueError: Fewer than 2 images in a set, an image of another type or shape, or weights that do not fit (see
            `InceptionFeatures.check`).
    """
    import torch_fidelity

    sets = [_ImageSet(name, images) for name, images in (("first", first), ("second", second))]
    features.check()
    figures = torch_fidelity.calculate_metrics(
        input1=sets[0],
        input2=sets[1],
        fid=True,
        kid=True,
        feature_layer_fid=features.layer,
        feature_layer_kid=features.layer,
        feature_extractor_weights_path=features.weights_path,
        kid_subset_size=min(KID_SUBSET_SIZE, *map(len, sets)),
        rng_seed=SEED,
        cuda=torch.cuda.is_available(),
        cache=second_cache is not None,
        cache_root=None if second_cache is None else str(second_cache),
        input2_cache_name=None if second_cache is None else "second",
        save_cpu_ram=True,  # no worker processes: they would copy a set that is in memory, and hide its errors
        verbose=False,
    )
    named = {
        f"fid@{features.layer}": figures[torch_fidelity.KEY_METRIC_FID],
        f"kid@{features.layer}": figures[torch_fidelity.KEY_METRIC_KID_MEAN],
        f"kid_std@{features.layer}": figures[torch_fidelity.KEY_METRIC_KID_STD],
    }
    for name, figure in named.items():
        if not math.isfinite(figure):
            raise ValueError(f"{name} is {figure}: the features of these images are not finite.")
    return {"protocol": "clean", "images_first": len(sets[0]), "images_second": len(sets[1]), **named}


class _ImageSet(Dataset):
    """A set of images as torch-fidelity reads it: RGB, and an error in one line for what it cannot be."""

    def __init__(self, name: str, images: Iterable[torch.Tensor]):
        lazy = isinstance(images, Sequence) or (hasattr(images, "__getitem__") and hasattr(images, "__len__"))
        self.images = images if lazy else list(images)
        self.name = name
        if len(self.images) < 2:
            raise ValueError(f"FID and KID need at least 2 images in the {name} set, got {len(self.images)}.")
        self.shape = tuple(self.images[0].shape)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = self.images[index]
        if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3):
            raise ValueError(
                "images must be uint8 tensors of shape (1 or 3, height, width), "
                f"got {image.dtype} of shape {tuple(image.shape)} in the {self.name} set."
            )
        if tuple(image.shape) != self.shape:
            raise ValueError(
                f"images of the {self.name} set must have one shape, got {self.shape} and {tuple(image.shape)}."
            )
        return image.expand(3, -1, -1)
