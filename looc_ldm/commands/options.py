"""Options of every command, with units and defaults. Imports nothing heavy.

`looc_ldm.commands.main` names the class and the function of each command.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt, restricted_number_type

from looc_ldm.images.config import Fit
from looc_ldm.training.config import AutoencoderConfig as AutoencoderConfig
from looc_ldm.training.config import DiffusionConfig as DiffusionConfig
from looc_ldm.utils.arguments import CacheLatents as CacheLatents
from looc_ldm.utils.arguments import DeviceOptions, Dtype, Factor, InceptionOptions, Options, Seed, option
from looc_ldm.utils.arguments import TrainPhotos as TrainPhotos
from looc_ldm.utils.errors import UserError

Port = restricted_number_type("Port", int, [(">", 0), ("<", 2**16)])
DATA = "bundled name, folder of images, parquet files, WebDataset shards or LSUN's LMDBs, or hub id"


# Groups that several commands share -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ComputeOptions(DeviceOptions):
    """Device"""

    dtype: Dtype = option("Data type of the networks.", "float32")


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """Model"""

    model: str = option("Autoencoder or pipeline: folder, hub id or bundled name.", positional="MODEL")


@dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """Images

    By default, --resolution and --fit are as in the training of the (first) model, or as the samples.
    """

    data: str = option(f"Images: {DATA}.")
    split: str | None = option("Split of the data. If not given, test, validation, or the first there is.", None)
    resolution: PositiveInt | None = option("Side of the images in pixels.", None)
    fit: Fit | None = option("Make images square by crop (centre), adm (crop of most published FIDs) or pad.", None)


@dataclass(frozen=True, kw_only=True)
class MeasuredImageOptions(DataOptions):
    """Images"""

    images: PositiveInt | None = option("Measure only N images, at even distances. If not given, all.", None)


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(Options):
    """Sampling"""

    steps: PositiveInt = option("Number of denoising steps.", 50)
    guidance_scale: float = option("Scale of classifier-free guidance; 1 is none.", 1.0)
    batch_size: PositiveInt = option("Images drawn at a time.", 64)
    seed: Seed = option("Seed of the samples; they do not depend on the batch size.", 0)


@dataclass(frozen=True, kw_only=True)
class ReconstructionMetricOptions(InceptionOptions):
    """Metrics

    Rate and use of the codebook are always measured. Without --metrics, only figures that need no download are
    measured. Weights that --metrics needs are downloaded, unless an option gives them.
    """

    metrics: list[str] | None = option("Any of psnr, ssim, l1, lpips_vgg, lpips_alex, rfid and kid; or all.", None)
    protocol: str = option("clean: usual SSIM and FID; paper: as in the LooC paper, of JPEGs.", "clean")
    lpips_vgg_weights: Path | None = option("torchvision's VGG16, .safetensors or .pth.", None)
    lpips_alex_weights: Path | None = option("torchvision's AlexNet, .safetensors or .pth.", None)


@dataclass(frozen=True, kw_only=True)
class GenerationMetricOptions(InceptionOptions):
    """Metrics

    Any of fid, kid, is, precision_recall, class_fid (FID within each class, averaged), memorization (share of samples
    that copy a training image), fd@dinov2, kd@dinov2, precision_recall@dinov2, precision_recall@vgg and cmmd (CLIP).
    Weights are downloaded, unless an option gives them.
    """

    metrics: list[str] | None = option("Metrics to measure. If not given, fid and kid.", None)
    protocol: str = option("clean: the usual FID; paper: as in the LooC paper, FID after a resize to 229.", "clean")
    dinov2: str | None = option("DINOv2 of transformers. If not given, facebook/dinov2-large.", None)
    clip: str | None = option("CLIP of transformers. If not given, openai/clip-vit-large-patch14-336.", None)
    vgg_weights: Path | None = option("torchvision's VGG16, .pth. If not given, downloaded.", None)


# Commands -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Quickstart(InceptionOptions):
    """Run every step on a small scale, on bundled images, and write a report."""

    output: Path = option("Folder of all results.", Path("quickstart"))


@dataclass(frozen=True, kw_only=True)
class Sample(SamplingOptions, ComputeOptions):
    """Draw images, and a grid of them, from a trained model."""

    model: str = option("Pipeline: folder, hub id or bundled name (flowers, ...).", positional="MODEL")
    labels: list[str] | None = option("Classes, by name or index. If not given, all.", None)
    images: PositiveInt = option("Images per class, or from a model without classes.", 4)
    output: Path = option("Folder of PNGs, one sub-folder per class; the grid is NAME.png.", Path("samples"))


@dataclass(frozen=True, kw_only=True)
class Reconstruct(DataOptions, ModelOptions, DeviceOptions):
    """Show originals beside reconstructions."""

    data: str = option(f"Images: {DATA}.", positional="IMAGES")
    images: PositiveInt = option("Images in the grid.", 8)
    output: Path = option("PNG file to write.", Path("reconstructions.png"))


@dataclass(frozen=True, kw_only=True)
class _CodeOptions(ComputeOptions):
    """Files"""

    output: Path = option("Folder of the results: one NAME.looc or NAME.png per image, or SPLIT.parquet.")
    overwrite: bool = option("Replace files that are there.", False)
    batch_size: PositiveInt | None = option("Images of one size computed at a time. If not given, by device.", None)


@dataclass(frozen=True, kw_only=True)
class Encode(ModelOptions, _CodeOptions):
    """Encode images as packed codes (.looc), or as a table of code sequences.

    --format looc writes one .looc file per image, at the image's own size. --format parquet writes one table of a data
    set, with labels, that datasets.load_dataset reads. Images are read as a viewer shows them: rotated by EXIF,
    transparent pixels on white, and only the first frame.
    """

    images: list[str] = option(f"Image files and folders. With parquet one data set: {DATA}.", positional="IMAGES")
    format: Literal["looc", "parquet"] = option("Format of the codes.", "looc")
    split: str | None = option("Split of the data set (parquet). If not given, train.", None)
    resolution: PositiveInt | None = option("Side of images in pixels (parquet). If not given, as in training.", None)
    fit: Literal[Fit, "none"] | None = option(
        "Crop, adm, pad, or none: own sizes (parquet). Else as in training.", None
    )


@dataclass(frozen=True, kw_only=True)
class Decode(ModelOptions, _CodeOptions):
    """Decode packed codes to images.

    Reads .looc files and tables of `looc-ldm encode --format parquet`, and writes PNG files. Codes that are damaged or
    from a different model are named and left out.
    """

    codes: list[str] = option(".looc or .parquet files, or folders of them.", positional="CODES")


@dataclass(frozen=True, kw_only=True)
class EvaluateReconstruction(ModelOptions, ReconstructionMetricOptions, MeasuredImageOptions, ComputeOptions):
    """Measure how well images are reconstructed, and at which rate.

    On several GPUs: accelerate launch -m looc_ldm.cli evaluate ..., with the same options and figures.
    """

    output: Path | None = option("JSON file for the figures. If not given, they are only printed.", None)


@dataclass(frozen=True, kw_only=True)
class EvaluateGeneration(GenerationMetricOptions, DataOptions, SamplingOptions, ComputeOptions):
    """Measure how close generated images are to real ones.

    A model draws the samples, or they are read from a folder or an .npz in ADM's layout. The real images may also be
    an .npz of ADM's reference batches, with images or statistics (mu, sigma). On several GPUs: accelerate launch -m
    looc_ldm.cli evaluate ..., with the same options and figures.
    """

    samples: str = option("Pipeline (folder, hub id or bundled name), folder of images, or .npz.", positional="SAMPLES")
    data: str = option(f"Real images (also --reference): {DATA}; or .npz.", alias="reference")
    reference_images: PositiveInt | None = option("Read only N real images. If not given, all.", None)
    training_data: str | None = option(
        "Training images of the model, for memorization; --data are held-out ones. If not given, as in training.json.",
        None,
    )
    images: PositiveInt | None = option("Samples that a model draws. If not given, 10000.", None)
    batch_size: PositiveInt = option("Images drawn at a time.", 100)
    cache: Path | None = option("Cache of real features. If not given, $LOOC_LDM_CACHE or ~/.cache/looc_ldm.", None)
    no_cache: bool = option("Neither read nor keep features of the real images.", False)
    export_npz: Path | None = option("File to write the samples to, in ADM's layout.", None)
    output: Path | None = option("JSON file for the figures. If not given, they are only printed.", None)


@dataclass(frozen=True, kw_only=True)
class Analyze(ModelOptions, MeasuredImageOptions, ComputeOptions):
    """Draw the paper's figures for a model: codebook use, sharing, t-SNE, rate and distortion, errors.

    Every figure is written as PNG and SVG, one page shows them all (analysis.html), and analysis.json holds the
    numbers.
    """

    output: Path = option("Folder: new, empty, or with an earlier analysis, which is replaced.", Path("analysis"))
    seed: Seed = option("Seed of t-SNE and of samples of the data.", 0)


@dataclass(frozen=True, kw_only=True)
class Compare(ReconstructionMetricOptions, MeasuredImageOptions, ComputeOptions):
    """Measure several models on the same images, sorted by bits per pixel.

    Writes comparison.html and .md (the table and the pictures), comparison.json (every figure), comparison.png and .svg
    (reconstructions and amplified differences), rate_distortion.png and .svg (the models beside JPEG and WebP). PSNR is
    always measured.
    """

    models: list[str] = option("Autoencoders or pipelines: folders, hub ids or bundled names.", positional="MODEL")
    names: list[str] | None = option("Names of the models. If not given, the parts in which paths differ.", None)
    show: PositiveInt = option("Images in the picture.", 8)
    codec_images: PositiveInt = option("Images for JPEG and WebP; each takes about 0.5 s at 256x256.", 128)
    output: Path = option("Folder of the results.", Path("comparison"))


@dataclass(frozen=True, kw_only=True)
class Convert(Options):
    """Convert weights of other projects to a folder of ours.

    Reads weights of the authors' LooC and CVQ-VAE, of taming's VQGAN and of CompVis LDM. An option is required if
    neither the weights nor the original config show its value.
    """

    checkpoint: Path = option("File: .safetensors, .ckpt, .pt or .pth.", positional="CHECKPOINT")
    output: Path = option("New folder: an autoencoder, or for ldm a whole pipeline.")
    kind: Literal["looc", "cvq", "vqgan", "ldm"] | None = option("Kind of weights. If not given, by their keys.", None)
    original_config: Path | None = option("YAML file of their training; the options below win over it.", None)
    resolution: PositiveInt | None = option("Side of the images in pixels.", None)
    no_ema: bool = option("Take the live weights instead of the averaged ones.", False)
    distance: Literal["cosine", "euclidean"] | None = option("Distance of LooC's and CVQ-VAE's quantizers.", None)
    interpolation_factor: PositiveInt | None = option("s of LooC's quantizer, their shuffle_scale; 1 is off.", None)
    num_heads: PositiveInt | None = option("Attention heads at all levels of the UNet (ldm).", None)
    num_head_channels: PositiveInt | None = option("Channels of each attention head of the UNet (ldm).", None)
    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = option("Output of the UNet (ldm).", None)
    scaling_factor: Factor | None = option("Factor that latents are multiplied by (ldm).", None)
    null_class_label: NonNegativeInt | None = option("Label of no class, which guidance needs (ldm).", None)

    def __post_init__(self):
        if self.num_heads is not None and self.num_head_channels is not None:
            raise UserError("--num-heads and --num-head-channels exclude each other.")


@dataclass(frozen=True, kw_only=True)
class Demo(DeviceOptions):
    """Serve a page to sample, vary, inpaint and tokenize in a browser.

    Needs the extra demo: pip install "looc-ldm[demo]". One image or grid is drawn at a time.
    """

    model: str | None = option(
        "Pipeline: folder, hub id or bundled name. If not given, all bundled ones.", None, positional="MODEL"
    )
    host: str = option("Address to serve on; 0.0.0.0 is all of this machine.", "127.0.0.1")
    port: Port | None = option("Port to serve on. If not given, the first free one from 7860.", None)
    space: Path | None = option("Write the folder of a Hugging Face Space instead of serving the page.", None)


@dataclass(frozen=True, kw_only=True)
class Push(Options):
    """Upload a model with its model card to the hub.

    The card shows the measured figures. To resume an interrupted upload, repeat the command. Needs a write token:
    `hf auth login`, HF_TOKEN or --token.
    """

    folder: Path = option("pipeline/ or model/ of a run, or a saved model.", positional="FOLDER")
    repo_id: str = option("Repository; made if it is not there.", positional="USER/NAME")
    private: bool = option("Make a new repository private.", False)
    revision: str | None = option("Branch to push to; made if it is not there. If not given, main.", None)
    create_pr: bool = option("Open a pull request instead of committing.", False)
    license: str | None = option("Licence as the hub writes it: mit, cc-by-4.0. If not given, asked for.", None)
    metrics: list[Path] | None = option("Files of `looc-ldm evaluate ... --output FILE` for the card.", None)
    samples: Path | None = option("Picture for the card. If not given, the newest preview.", None)
    token: str | None = option("Token of the hub. If not given, that of `hf auth login`, or HF_TOKEN.", None)
    dry_run: bool = option("Send nothing: list the files (stderr) and print the card (stdout).", False)


@dataclass(frozen=True, kw_only=True)
class Pull(Options):
    """Download a model from the hub, and verify it.

    Downloads only the files that the model needs, without other variants of its weights, and compares each with the
    checksum on the hub.
    """

    repo_id: str = option("Repository to download.", positional="USER/NAME")
    output: Path | None = option("New folder. If not given, the cache of downloads.", None)
    revision: str | None = option("Branch, tag or commit. If not given, main.", None)
    variant: str | None = option("Variant of the weights: non_ema, fp16, ... If not given, the plain ones.", None)
    token: str | None = option("Token of the hub. If not given, that of `hf auth login`, or HF_TOKEN.", None)
