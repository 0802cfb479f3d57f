"""Options of every command: what can be typed, with units and defaults. Imports nothing heavy.

`looc_ldm.commands.main` names the class and the function of each command.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt, restricted_number_type

from looc_ldm.images.config import Fit
from looc_ldm.training.config import AutoencoderConfig as AutoencoderConfig
from looc_ldm.training.config import DiffusionConfig as DiffusionConfig
from looc_ldm.utils.arguments import CacheLatents as CacheLatents
from looc_ldm.utils.arguments import DeviceOptions, Dtype, Options, Seed, positional
from looc_ldm.utils.errors import UserError

Factor = restricted_number_type("Factor", float, [(">", 0.0), ("<", float("inf"))])


# Groups that several commands share -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ComputeOptions(DeviceOptions):
    """Device

    Args:
        dtype: Data type of the networks.
    """

    dtype: Dtype = "float32"


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """Model

    Args:
        model: Autoencoder or pipeline: folder, hub id or starter.
    """

    model: str = field(metadata=positional("MODEL"))


@dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """Images

    Args:
        data: Bundled name, folder of images, parquet files, WebDataset shards or LSUN's LMDBs, or hub id.
        split: Split of the data. If not given, test, validation, or the first there is.
        resolution: Side of the images in pixels. If not given, that of the (first) model's training, or of the samples.
        fit: How images become square: crop (at the centre), adm (the centre crop of most published FIDs) or pad. If
            not given, as in the model's training.
    """

    data: str
    split: str | None = None
    resolution: PositiveInt | None = None
    fit: Fit | None = None


@dataclass(frozen=True, kw_only=True)
class MeasuredImageOptions(DataOptions):
    """Images

    Args:
        images: Measure only N images, at even distances. If not given, all.
    """

    images: PositiveInt | None = None


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(Options):
    """Sampling

    Args:
        steps: Denoising steps.
        guidance_scale: Classifier-free guidance; 1 is none.
        batch_size: Images drawn at a time.
        seed: Same seed, same images.
    """

    steps: PositiveInt = 50
    guidance_scale: float = 1.0
    batch_size: PositiveInt = 64
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class InceptionOptions(Options):
    """Inception network

    Args:
        inception_weights: File of torch-fidelity's Inception network. If not given and needed, it is downloaded.
        feature_layer: Its features; only 2048 compares with published FIDs.
    """

    inception_weights: Path | None = None
    feature_layer: Literal["64", "192", "768", "2048"] = "2048"


@dataclass(frozen=True, kw_only=True)
class ReconstructionMetricOptions(InceptionOptions):
    """Metrics

    Rate and use of the codebook are always measured. Weights that --metrics needs and no option gives are downloaded.

    Args:
        metrics: psnr, ssim, l1, lpips_vgg, lpips_alex, rfid, kid or all. If not given, those that need no download.
        protocol: clean: floats, the usual SSIM and FID; paper: as in the LooC paper's tables (of JPEGs).
        lpips_vgg_weights: torchvision's VGG16, .safetensors or .pth. If not given, lpips_vgg is left out.
        lpips_alex_weights: torchvision's AlexNet, .safetensors or .pth. If not given, lpips_alex is left out.
    """

    metrics: list[str] | None = None
    protocol: str = "clean"
    lpips_vgg_weights: Path | None = None
    lpips_alex_weights: Path | None = None


@dataclass(frozen=True, kw_only=True)
class GenerationMetricOptions(InceptionOptions):
    """Metrics

    Weights that are needed and not given are downloaded.

    Args:
        metrics: Any of fid, kid, is, precision_recall, class_fid (FID within each class, averaged), fd@dinov2,
            kd@dinov2, precision_recall@dinov2, precision_recall@vgg and cmmd (CLIP). If not given, fid and kid.
        protocol: clean: the usual FID; paper: as in the LooC paper's tables, FID after a resize to 229.
        dinov2: Folder or hub id of a DINOv2 of transformers. If not given, facebook/dinov2-large.
        clip: Folder or hub id of a CLIP of transformers. If not given, openai/clip-vit-large-patch14-336.
        vgg_weights: torchvision's VGG16, .pth. If not given, it is downloaded.
    """

    metrics: list[str] | None = None
    protocol: str = "clean"
    dinov2: str | None = None
    clip: str | None = None
    vgg_weights: Path | None = None


# Commands -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Quickstart(InceptionOptions):
    """Run the whole chain in miniature on bundled images, with a report to look at.

    Args:
        output: Folder of everything.
    """

    output: Path = Path("quickstart")


@dataclass(frozen=True, kw_only=True)
class Sample(SamplingOptions, ComputeOptions):
    """Draw images, and a grid of them, from a trained model.

    Args:
        model: Pipeline: folder, hub id, or starter, which comes with the package.
        labels: Classes, by name or index. If not given, all.
        images: Images of each class, or of a model without classes.
        output: Folder of PNGs, with one sub-folder per class; the grid is the .png of its name.
    """

    model: str = field(metadata=positional("MODEL"))
    labels: list[str] | None = None
    images: PositiveInt = 4
    output: Path = Path("samples")


@dataclass(frozen=True, kw_only=True)
class Reconstruct(DataOptions, ModelOptions, DeviceOptions):
    """Show originals beside reconstructions.

    Args:
        images: Images in the grid.
        output: PNG file.
    """

    data: str = field(metadata=positional("IMAGES"))
    images: PositiveInt = 8
    output: Path = Path("reconstructions.png")


@dataclass(frozen=True, kw_only=True)
class _CodeOptions(ComputeOptions):
    """Files

    Args:
        output: Folder of the results; sub-folders are kept. encode writes one NAME.looc per image, or SPLIT.parquet.
        overwrite: Replace files that are there.
        batch_size: Images of one size computed at a time. If not given, 2**18 pixels on a CPU, 2**21 on others.
    """

    output: Path
    overwrite: bool = False
    batch_size: PositiveInt | None = None


@dataclass(frozen=True, kw_only=True)
class Encode(ModelOptions, _CodeOptions):
    """Encode images as packed codes (.looc), or as a table of code sequences.

    --format looc writes one .looc file per image, at the image's own size. --format parquet writes one table of a data
    set, with labels, that datasets.load_dataset reads. Images are taken as a viewer shows them: turned as their EXIF
    data says, transparent ones on white, the first frame of several.

    Args:
        images: Image files and folders of images. With --format parquet one data set: bundled name, folder of images,
            parquet files, WebDataset shards or LSUN's LMDBs, or hub id.
        format: Format of the codes.
        split: Split of the data set (parquet). If not given, train.
        resolution: Side of the images in pixels (parquet). If not given, that of the model's training.
        fit: How images become square (parquet): crop, adm, pad, or none, which leaves each image at its own size. If
            not given, as in the model's training.
    """

    images: list[str] = field(metadata=positional("IMAGES"))
    format: Literal["looc", "parquet"] = "looc"
    split: str | None = None
    resolution: PositiveInt | None = None
    fit: Literal[Fit, "none"] | None = None


@dataclass(frozen=True, kw_only=True)
class Decode(ModelOptions, _CodeOptions):
    """Decode packed codes to images.

    Reads .looc files and tables of `looc-ldm encode --format parquet`, and writes PNG files. Codes that are damaged or
    of a different model are named and left out.

    Args:
        codes: .looc or .parquet files, or folders of them.
    """

    codes: list[str] = field(metadata=positional("CODES"))


@dataclass(frozen=True, kw_only=True)
class EvaluateReconstruction(ModelOptions, ReconstructionMetricOptions, MeasuredImageOptions, ComputeOptions):
    """Measure how well images are reconstructed, and at which rate.

    On several GPUs: accelerate launch -m looc_ldm.cli evaluate ..., with the same options and figures.

    Args:
        output: JSON file for the figures. If not given, they are only printed.
    """

    output: Path | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluateGeneration(GenerationMetricOptions, DataOptions, SamplingOptions, ComputeOptions):
    """Measure how close generated images are to real ones.

    A model draws the samples, or they are read from a folder or an .npz. On several GPUs: accelerate launch -m
    looc_ldm.cli evaluate ..., with the same options and figures.

    Args:
        samples: Pipeline (folder, hub id or starter) that draws samples; or folder of images; or .npz in ADM's layout.
        data: The real images (also --reference): bundled name, folder of images, parquet files, WebDataset shards or
            LSUN's LMDBs, or hub id; or .npz of ADM's reference batches, with images or statistics (mu, sigma).
        reference_images: Read only N real images, at even distances. If not given, all.
        images: Samples that a model draws, of each class in its share of the real images. If not given, 10000.
        cache: Folder of features of real images. If not given, $LOOC_LDM_CACHE, or looc_ldm in the user's cache folder.
        no_cache: Neither read nor keep features of the real images.
        export_npz: File to write the samples to, in ADM's layout. If not given, they are not kept.
        output: JSON file for the figures. If not given, they are only printed.
    """

    samples: str = field(metadata=positional("SAMPLES"))
    data: str = field(metadata={"aliases": ["reference"]})
    reference_images: PositiveInt | None = None
    images: PositiveInt | None = None
    batch_size: PositiveInt = 100
    cache: Path | None = None
    no_cache: bool = False
    export_npz: Path | None = None
    output: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Analyze(ModelOptions, MeasuredImageOptions, ComputeOptions):
    """Draw the paper's figures for a model: codebook use, sharing, t-SNE, rate and distortion, errors.

    Every figure is written as PNG and SVG, one page shows them all (analysis.html), and analysis.json holds the
    numbers.

    Args:
        output: Folder: new, empty, or of an earlier analysis, which is replaced.
        seed: Seed of t-SNE and of samples of the data.
    """

    output: Path = Path("analysis")
    seed: Seed = 0


@dataclass(frozen=True, kw_only=True)
class Compare(ReconstructionMetricOptions, MeasuredImageOptions, ComputeOptions):
    """Measure several models on the same images, sorted by bits per pixel.

    Writes comparison.md (the table), comparison.json (every figure), comparison.png and .svg (reconstructions and
    amplified differences), rate_distortion.png and .svg (the models beside JPEG and WebP). PSNR is always measured.

    Args:
        models: Autoencoders or pipelines of any kind and rate: folders, hub ids or starter.
        names: Names of the models, in their order. If not given, what tells their paths apart.
        show: Images in the picture.
        codec_images: Images that JPEG and WebP are measured on; about half a second each at 256x256.
        output: Folder of the results.
    """

    models: list[str] = field(metadata=positional("MODEL"))
    names: list[str] | None = None
    show: PositiveInt = 8
    codec_images: PositiveInt = 128
    output: Path = Path("comparison")


@dataclass(frozen=True, kw_only=True)
class Convert(Options):
    """Convert weights of other projects to a folder of ours.

    Reads weights of the authors' LooC and CVQ-VAE, of taming's VQGAN and of CompVis LDM. An option is required if
    neither the weights nor the original config show its value.

    Args:
        checkpoint: File: .safetensors, .ckpt, .pt or .pth.
        output: New folder: an autoencoder, or for ldm a whole pipeline.
        kind: Kind of the weights. If not given, found out from their keys.
        original_config: YAML file of their training; the options below win over it.
        resolution: Side of the images in pixels.
        no_ema: Take the live weights instead of the averaged ones.
        distance: Distance by which a quantizer of LooC or CVQ-VAE chooses codes (cos, l2).
        interpolation_factor: s of a quantizer of LooC, their shuffle_scale; 1 is off.
        num_heads: Attention heads of the UNet (ldm), the same at all resolutions.
        num_head_channels: Channels of each attention head of the UNet (ldm), at all resolutions.
        prediction_type: What the UNet predicts (ldm: eps, x0, v).
        scaling_factor: Factor that latents are multiplied by (ldm).
        null_class_label: Label that stands for no class (ldm), which guidance needs. If not given, there is none.
    """

    checkpoint: Path = field(metadata=positional("CHECKPOINT"))
    output: Path
    kind: Literal["looc", "cvq", "vqgan", "ldm"] | None = None
    original_config: Path | None = None
    resolution: PositiveInt | None = None
    no_ema: bool = False
    distance: Literal["cosine", "euclidean"] | None = None
    interpolation_factor: PositiveInt | None = None
    num_heads: PositiveInt | None = None
    num_head_channels: PositiveInt | None = None
    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = None
    scaling_factor: Factor | None = None
    null_class_label: NonNegativeInt | None = None

    def __post_init__(self):
        if self.num_heads is not None and self.num_head_channels is not None:
            raise UserError("--num-heads and --num-head-channels exclude each other.")


@dataclass(frozen=True, kw_only=True)
class Push(Options):
    """Upload a model with its model card to the hub.

    The card is made from what was measured. Interrupted, the same command goes on. Needs a token that may write:
    `hf auth login`, HF_TOKEN or --token.

    Args:
        folder: pipeline/ or model/ of a run, or a saved model.
        repo_id: Repository; made if it is not there.
        private: Make a new repository a private one.
        revision: Branch to push to; made if it is not there. If not given, main.
        create_pr: Open a pull request instead of committing.
        license: Licence of the weights, as the hub writes it: mit, cc-by-4.0. If not given, it is asked for.
        metrics: Files of figures for the card, which `looc-ldm evaluate ... --output FILE` wrote. If not given, those
            of the training.
        samples: Picture for the card. If not given, the newest preview.
        token: Token of the hub. If not given, that of `hf auth login`, or HF_TOKEN.
    """

    folder: Path = field(metadata=positional("FOLDER"))
    repo_id: str = field(metadata=positional("USER/NAME"))
    private: bool = False
    revision: str | None = None
    create_pr: bool = False
    license: str | None = None
    metrics: list[Path] | None = None
    samples: Path | None = None
    token: str | None = None


@dataclass(frozen=True, kw_only=True)
class Pull(Options):
    """Download a model from the hub, and verify it.

    Takes what a model needs, without other variants of its weights, and compares every file with the checksum that the
    hub states.

    Args:
        repo_id: Repository.
        output: New folder. If not given, the cache of downloads.
        revision: Branch, tag or commit. If not given, main.
        variant: Variant of the weights: non_ema, fp16, ... If not given, the plain ones.
        token: Token of the hub. If not given, that of `hf auth login`, or HF_TOKEN.
    """

    repo_id: str = field(metadata=positional("USER/NAME"))
    output: Path | None = None
    revision: str | None = None
    variant: str | None = None
    token: str | None = None
