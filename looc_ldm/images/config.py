"""`DataConfig`: which images, and how they become square."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jsonargparse.typing import ClosedUnitInterval, NonNegativeInt, PositiveInt, restricted_number_type

AtLeastTwo = restricted_number_type("AtLeastTwo", int, (">=", 2))
Fit = Literal["crop", "random_crop", "adm", "pad"]


@dataclass
class DataConfig:
    """Source of the images, and how they are brought to one size.

    Args:
        path: A bundled set (`fashion_mnist`), a folder of images (one sub-folder per class, or none), of parquet files,
            of WebDataset shards (.tar) or of LSUN's LMDBs, or the id of a data set on the hub.
        name: Configuration of a data set on the hub that has several, as in `datasets.load_dataset`.
        revision: Branch, tag or commit of a data set on the hub.
        split: The split to train on. Sub-folders named train, val, validation or test are splits; a folder without
            them is all `train`. `all`: the images of all sub-folders, whatever their names.
        validation_split: The split to measure on; if not given, `validation_images` of the training split are held out.
        validation_images: Images measured during and after training.
        image_column: The column that holds the image.
        label_column: The column that holds the class; if the data has none, there are no classes.
        num_classes: Number of classes if the label column holds numbers without names.
        streaming: Read parquet files, WebDataset shards or a hub data set as they come, without preparing them on the
            disk first. Needs a `validation_split`.
        shuffle_images: Images of a shard that are shuffled together when streaming; shards are shuffled, too.
        resolution: Side in pixels of the square images the networks see.
        fit: Makes an image square. `crop`: the shorter side is resized (Lanczos), then the centre is cropped.
            `random_crop`: the same, cropped at a random place in training and at the centre elsewhere. `adm`: halved by
            box filters while the shorter side is at least twice the resolution, resized (bicubic), cropped at the
            centre.
            `pad`: an image that is smaller than the resolution is put in the centre of a black one.
        flip: Mirror each image with probability 1/2. Training only.
        num_workers: Processes that load images, for each training process.
        max_unreadable_share: Share of the images that may be unreadable. A warning names each, and the next
            readable image takes its place; when there are more, the run stops.
        max_image_pixels: Pixels of the largest image that is read; Pillow's limit, 179 million, if not given.
    """

    path: str = "fashion_mnist"
    name: str | None = None
    revision: str | None = None
    split: str = "train"
    validation_split: str | None = None
    validation_images: PositiveInt = 1000
    image_column: str = "image"
    label_column: str = "label"
    num_classes: AtLeastTwo | None = None
    streaming: bool = False
    shuffle_images: PositiveInt = 4096
    resolution: PositiveInt = 256
    fit: Fit = "crop"
    flip: bool = True
    num_workers: NonNegativeInt = 4
    max_unreadable_share: ClosedUnitInterval = 0.001
    max_image_pixels: PositiveInt | None = None
