"""Compare generated images with real ones: FID, KID, Inception score, precision and recall, copies, and others.

All figures of one network come from one pass of the images through it. Images are read in batches and discarded.
Some figures need all features in memory. `METRICS` is the only list of the figures.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch

from looc_ldm.metrics.class_fid import class_averaged_fid
from looc_ldm.metrics.collect import FeatureCollector, Features
from looc_ldm.metrics.extractors import Extractor, InceptionFeatures
from looc_ldm.metrics.fidelity import NEIGHBORS, SPLITS, cmmd, inception_score, kid, precision_recall
from looc_ldm.metrics.frechet import frechet_distance
from looc_ldm.metrics.memorization import memorization
from looc_ldm.metrics.shares import at_a_time, places

if TYPE_CHECKING:
    from accelerate import Accelerator

BATCH = 50  # images of a batch that is made of single ones
CLOSEST = 12  # pairs of a sample and a training image in the details of `memorization`

Network = Callable[[torch.Tensor], dict[str, torch.Tensor]]  # returned by Extractor.load
Figures = dict[str, float | int | dict]


@dataclass(frozen=True)
class Metric:
    """A measure of generated images."""

    network: str  # name of the network of its features
    figures: tuple[str, ...]  # names of its figures, with {} for the suffix of the network
    # Maps generated features, reference features, names of the classes and features of the training images to one
    # value per figure.
    measure: Callable[[Features, Features | None, Mapping[int, str] | None, Features | None], tuple]
    vectors: bool = False  # whether it needs the features themselves, not only their moments
    logits: bool = False  # whether it needs the logits of the generated images, and no reference
    least: int = 2  # smallest number of images on each side


def _frechet(generated: Features, reference: Features, *_) -> tuple[float]:
    return (frechet_distance(generated.moments, reference.moments),)


def _class_fid(generated: Features, reference: Features, classes: Mapping[int, str] | None, _) -> tuple:
    sides = (generated.vectors, generated.labels, reference.vectors, reference.labels)
    detail = asdict(class_averaged_fid(*sides, classes))
    return detail.pop("mean"), len(detail["per_class"]), detail


def _between_vectors(measure: Callable[[torch.Tensor, torch.Tensor], tuple[float, ...]]) -> Callable:
    return lambda generated, reference, *_: measure(generated.vectors, reference.vectors)


def _memorization(generated: Features, reference: Features, _, training: Features) -> tuple:
    found = memorization(generated.vectors, reference.vectors, training.vectors)
    closest = found.distances.argsort(stable=True)[:CLOSEST].tolist()
    detail = {
        "threshold": found.threshold,
        "training_images": len(training.vectors),
        "held_out_images": len(reference.vectors) - found.duplicates,
        "duplicates": found.duplicates,
        "closest": [
            {"sample": i, "training_image": found.nearest[i].item(), "distance": found.distances[i].item()}
            for i in closest
        ],
    }
    return found.copies, found.copies_held_out, detail


_precision_recall = {"measure": _between_vectors(precision_recall), "vectors": True, "least": NEIGHBORS + 1}
METRICS = {
    "fid": Metric("inception", ("fid@{}",), _frechet),
    "kid": Metric("inception", ("kid@{}", "kid_std@{}"), _between_vectors(kid), vectors=True),
    "is": Metric("inception", ("is", "is_std"), lambda x, *_: inception_score(x.logits), logits=True, least=SPLITS),
    "precision_recall": Metric("inception", ("precision@{}", "recall@{}"), **_precision_recall),
    "class_fid": Metric("inception", ("class_fid@{}", "class_fid_classes", "class_fid"), _class_fid, True),
    "memorization": Metric("inception", ("copies@{}", "copies_held_out@{}", "memorization"), _memorization, True),
    "fd@dinov2": Metric("dinov2", ("fd@{}",), _frechet),
    "kd@dinov2": Metric("dinov2", ("kd@{}", "kd_std@{}"), _between_vectors(kid), vectors=True),
    "precision_recall@dinov2": Metric("dinov2", ("precision@{}", "recall@{}"), **_precision_recall),
    "precision_recall@vgg": Metric("vgg", ("precision@{}", "recall@{}"), **_precision_recall),
    "cmmd": Metric("clip", ("cmmd@{}",), _between_vectors(lambda first, second: (cmmd(first, second),)), vectors=True),
}
DEFAULT_METRICS = ("fid", "kid")


def check_metrics(names: Collection[str]) -> list[str]:
    """Return the names without duplicates, in the order of `METRICS`. Raises ValueError for an unknown or no name."""
    for name in names:
        if name not in METRICS:
            raise ValueError(f"metrics must be some of {', '.join(METRICS)}, got {name!r}.")
    if not names:
        raise ValueError(f"name at least one metric of {', '.join(METRICS)}.")
    return [name for name in METRICS if name in names]


def networks_needed(names: Collection[str]) -> list[str]:
    """Return the networks of these metrics, each once."""
    return list(dict.fromkeys(METRICS[name].network for name in names))


def vectors_needed(names: Collection[str], network: str) -> bool:
    """Whether one of these metrics needs all features of that network, not only their moments."""
    return any(METRICS[name].vectors for name in names if METRICS[name].network == network)


@torch.no_grad()
def collect_features(
    batches: Iterable[torch.Tensor],
    networks: Mapping[str, Network],
    keep_vectors: Collection[str] = (),
    accelerator: Accelerator | None = None,
    logits: bool = True,
    device: torch.device | str = "cpu",
) -> dict[str, Features]:
    """Return features of images by each network, in one pass over the images. Collective.

    Args:
        batches: uint8 images `(B, 1 or 3, H, W)`. Process r of R gives the batches r, r + R, ... of all.
        networks: Results of `Extractor.load`, by name.
        keep_vectors: Names of networks whose features are kept, for metrics that need more than moments.
        accelerator (`Accelerator`, *optional*): The processes.
        logits: Whether to keep the logits of networks that give them.
        device: The networks' device. It decides how many images go through a network at a time.

    Returns:
        `dict` of `Features` by name, complete on the main process, in the order of one process.

    Raises:
        ValueError: No images, images of a different type, or features that are not finite.
    """
    size = at_a_time(device)
    collectors = {name: FeatureCollector(keep_vectors=name in keep_vectors) for name in networks}
    for number, batch in enumerate(batches):
        where = places(number, len(batch), accelerator)
        for name, network in networks.items():
            for part, place in zip(batch.split(size), where.split(size), strict=True):
                found = network(part)
                collectors[name].update(found if logits else {"features": found["features"]}, place)
    return {name: collector.collect(accelerator) for name, collector in collectors.items()}


def generation_figures(
    metrics: Collection[str],
    generated: Mapping[str, Features],
    reference: Mapping[str, Features],
    suffixes: Mapping[str, str],
    classes: Mapping[int, str] | None = None,
    training: Mapping[str, Features] | None = None,
) -> Figures:
    """Return figures, ready for JSON, of collected features by network.

    Args:
        metrics: Names in `METRICS`.
        generated, reference: Results of `collect_features` on the main process, with `labels` for class_fid.
        suffixes: `Extractor.name` by network, which names the figures: `fid@2048`.
        classes: Names of the labels.
        training: The same as `reference` for the training images, for memorization.

    Raises:
        ValueError: Too few images on a side, no class with 2 images, or a reference of only training images.
    """
    figures: Figures = {}
    for name in check_metrics(metrics):
        metric = METRICS[name]
        sides = (generated[metric.network], reference.get(metric.network))
        values = metric.measure(*sides, classes, (training or {}).get(metric.network))
        names = [figure.format(suffixes[metric.network]) for figure in metric.figures]
        figures |= dict(zip(names, values, strict=True))
    return figures


def evaluate_generation(
    samples: Iterable[tuple[torch.Tensor, torch.Tensor | None]],
    reference: Iterable[tuple[torch.Tensor, torch.Tensor | None]],
    metrics: Collection[str] = DEFAULT_METRICS,
    networks: Mapping[str, Extractor] | None = None,
    classes: Mapping[int, str] | None = None,
    device: torch.device | str = "cpu",
    training: Iterable[tuple[torch.Tensor, torch.Tensor | None]] | None = None,
) -> Figures:
    """Compare generated images with real ones, on one process.

    `looc-ldm evaluate generation` also draws samples from a model, uses several processes and caches the reference.

    Args:
        samples, reference: Batches of uint8 images `(B, C, H, W)`, C = 1 (which counts as RGB) or 3, with their labels
            `(B,)` or None. They are read once and not kept.
        metrics: Names in `METRICS`.
        networks (`dict`, *optional*): Extractors (`looc_ldm.metrics.extractors`) by "inception", "dinov2", "clip" and
            "vgg", as the metrics need them. Inception, with the standard 2,048 features, if not given.
        classes: Names of the labels, for class_fid.
        device: The networks' device.
        training: Batches of the model's training images, for memorization, whose reference are held-out images.

    Returns:
        `dict`: `protocol` ("clean"), `images_first`, `images_second`, and the figures of `METRICS` with the suffix of
        their network: `fid@2048`, `kid@2048`, `fd@dinov2-large`, `cmmd@clip-vit-large-patch14-336`. The functions of
        `fidelity`, `class_fid` and `memorization` describe them; `class_fid` and `memorization` hold details.

    Raises:
        ValueError: Fewer than 2 images on a side, images of a different type, missing labels or training images, or
            weights of a different network.
    """
    metrics = check_metrics(metrics)
    needed = networks_needed(metrics)
    networks = networks or {"inception": InceptionFeatures(logits="is" in metrics)}
    for name in needed:
        if name not in networks:
            raise ValueError(f"networks must hold {name!r}, which {', '.join(metrics)} need.")
    if "is" in metrics and not networks["inception"].logits:
        raise ValueError("is needs InceptionFeatures(..., logits=True).")
    if "memorization" in metrics and training is None:
        raise ValueError("memorization needs the model's training images: training=...")
    loaded = {name: networks[name].load(device) for name in needed}
    keep = [name for name in needed if vectors_needed(metrics, name)]
    sides = []
    for side, batches in (("first", samples), ("second", reference)):
        labels: list[torch.Tensor | None] = []
        # Appends the labels of each batch, and passes the images on.
        images = (labels.append(batch[1]) or batch[0] for batch in batches)
        features = collect_features(images, loaded, keep, logits=side == "first", device=device)
        if "class_fid" in metrics:
            if any(batch_labels is None for batch_labels in labels):
                raise ValueError(f"class_fid needs labels with every batch of the {side} set.")
            features["inception"].labels = torch.cat(labels)
        sides.append(features)
    known = None
    if "memorization" in metrics:
        inception = {"inception": loaded["inception"]}
        images = (batch[0] for batch in training)
        known = collect_features(images, inception, inception, logits=False, device=device)
    counts = [next(iter(side.values())).moments.count for side in sides]
    return {
        "protocol": "clean",
        "images_first": counts[0],
        "images_second": counts[1],
        **generation_figures(metrics, *sides, {name: networks[name].name for name in needed}, classes, known),
    }


def fid_and_kid(first: Iterable[torch.Tensor], second: Iterable[torch.Tensor], features: InceptionFeatures) -> Figures:
    """Return FID and KID between two sets of images; the same images give the same figures.

    Takes uint8 images `(C, H, W)`, C = 1 (which counts as RGB) or 3, of one shape in each set, and the network. The
    images are read once and not kept. Returns and raises what `evaluate_generation` does.
    """
    return evaluate_generation(_batched(first), _batched(second), networks={"inception": features})


def _batched(images: Iterable[torch.Tensor]) -> Iterator[tuple[torch.Tensor, None]]:
    """Yield unlabelled batches `(B, C, H, W)` of images `(C, H, W)`."""
    iterator = iter(images)
    while batch := list(islice(iterator, BATCH)):
        yield torch.stack(batch), None
