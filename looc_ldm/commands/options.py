"""Options of every command: what can be typed, with units and defaults. Imports nothing heavy.

`looc_ldm.commands.main` names class and function of each command; `looc_ldm.training.config` has those of the trainers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jsonargparse.typing import NonNegativeInt, PositiveInt, restricted_number_type

from looc_ldm.images.config import Fit
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
        split: Which split. If not given, test, validation, or the first there is.
        resolution: Side of the images in pixels. If not given, that of the model's training; of the first model's
            where there are several.
        fit: How images become square; random_crop is crop here, adm the centre crop that most published FIDs are
            measured with. If not given, as in the model's training, as far as its folder says, else crop.
    """

    split: str | None = None
    resolution: PositiveInt | None = None
    fit: Fit | None = None


@dataclass(frozen=True, kw_only=True)
class MeasuredImageOptions(DataOptions):
    """Images

    Args:
        data: Bundled name, folder of images, parquet files, WebDataset shards or LSUN's LMDBs, or hub id.
        images: Measure only N images, at even distances. If not given, all.
    """

    data: str
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
        inception_weights: File of torch-fidelity's Inception network. If not given, evaluate generation downloads it
            and other commands leave FID and KID out, unless --metrics asks for them.
        feature_layer: Its features; only 2048 compares with published FIDs.
    """

    inception_weights: Path | None = None
    feature_layer: Literal["64", "192", "768", "2048"] = "2048"


@dataclass(frozen=True, kw_only=True)
class ReconstructionMetricOptions(InceptionOptions):
    """What is measured

    The codebook (use, perplexity, dead codes, entropy), the rate and the parameters always are. Figures whose weights
    are not there are left out, and named, unless --metrics asks for them: then the weights are downloaded, which is
    tried before anything is computed.

    Args:
        metrics: Any of psnr, ssim, l1, lpips_vgg, lpips_alex, rfid and kid, or all. If not given, psnr, ssim, l1 and
            those whose weights are given.
        protocol: clean: floats, the usual SSIM and FID; paper: as in the LooC paper's tables, of JPEGs, SSIM with a
            uniform window, FID after a resize to 229.
        lpips_vgg_weights: torchvision's VGG16, .safetensors or .pth. If not given, lpips_vgg is left out.
        lpips_alex_weights: torchvision's AlexNet, .safetensors or .pth. If not given, lpips_alex is left out.
    """

    metrics: list[str] | None = None
    protocol: str = "clean"
    lpips_vgg_weights: Path | None = None
    lpips_alex_weights: Path | None = None


@dataclass(frozen=True, kw_only=True)
class GenerationMetricOptions(InceptionOptions):
    """What is measured

    fid, kid, is (Inception score), precision_recall and class_fid (FID within each class, averaged) by Inception
    features; fd@dinov2 (FD-DINOv2), kd@dinov2 and precision_recall@dinov2 by DINOv2; precision_recall@vgg as
    torch-fidelity has it; cmmd by CLIP. Figures of one network come from one pass over the images. Weights that are not
    given are downloaded, which is tried before anything is drawn or measured.

    Args:
        metrics: Any of those. If not given, fid and kid.
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
class Reconstruct(ModelOptions, DataOptions, DeviceOptions):
    """Show originals beside reconstructions.

    Args:
        data: Bundled name, folder of images, parquet files, WebDataset shards or LSUN's LMDBs, or hub id.
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
        batch_size: Images of one size that go through the network at a time. If not given, as many as make 2**18
            pixels on a CPU, 2**21 on others.
    """

    output: Path
    overwrite: bool = False
    batch_size: PositiveInt | None = None


@dataclass(frozen=True, kw_only=True)
class Encode(ModelOptions, _CodeOptions):
    """Encode images as packed codes (.looc), or as a table of code sequences.

    --format looc makes one .looc file per image, at the image's own size. --format parquet makes one table of a data
    set, with labels, that datasets.load_dataset reads, of images of one size. Images are taken as a viewer shows them:
    turned as their EXIF data says, transparent ones on white, the first frame of several.

    Args:
        images: Image files and folders of images. With --format parquet one data set: bundled name, folder of images,
            parquet files, WebDataset shards or LSUN's LMDBs, or hub id.
        format: Format of the codes.
        split: Split of the data set, with --format parquet. If not given, train.
        resolution: Side of the images in pixels, with --format parquet. If not given, that of the model's training.
        fit: How images become square, with --format parquet; random_crop crops at the centre; none leaves each image at
            its own size, so that sequences differ in length. If not given, as in the model's training, as far as its
            folder says, else crop.
    """

    images: list[str] = field(metadata=positional("IMAGES"))
    format: Literal["looc", "parquet"] = "looc"
    split: str | None = None
    resolution: PositiveInt | None = None
    fit: Literal[Fit, "none"] | None = None


@dataclass(frozen=True, kw_only=True)
class Decode(ModelOptions, _CodeOptions):
    """Decode packed codes to images.

    Reads .looc files, and tables of `looc-ldm encode --format parquet`, and writes PNG files. Codes that are damaged or
    of another model are named and left out.

    Args:
        codes: .looc or .parquet files, or folders of them.
    """

    codes: list[str] = field(metadata=positional("CODES"))


@dataclass(frozen=True, kw_only=True)
class EvaluateReconstruction(ModelOptions, ReconstructionMetricOptions, MeasuredImageOptions, ComputeOptions):
    """Measure how well images are reconstructed, and at which rate.

    By several processes: accelerate launch -m looc_ldm.cli evaluate ..., with the same options and figures.

    Args:
        output: JSON file for the figures. If not given, they are only printed.
    """

    output: Path | None = None


@dataclass(frozen=True, kw_only=True)
class _DrawnSampleOptions(Options):
    """Samples that a model draws

    Args:
        images: How many; of each class in its share of the real images. If not given, 10000.
        steps: Denoising steps. If not given, 50.
        guidance_scale: Classifier-free guidance; 1 is none. If not given, 1.
        batch_size: Images drawn at a time. If not given, 100.
        seed: Same seed, same images. If not given, 0.
    """

    images: PositiveInt | None = None
    steps: PositiveInt | None = None
    guidance_scale: float | None = None
    batch_size: PositiveInt | None = None
    seed: Seed | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluateGeneration(GenerationMetricOptions, DataOptions, _DrawnSampleOptions, ComputeOptions):
    """Measure how close generated images are to real ones.

    They are drawn from a model, without a detour over files, or are read from a folder or an npz; then real images are
    brought to the side of these, cropped to squares. By several processes: accelerate launch -m looc_ldm.cli
    evaluate ..., with the same options and figures.

    Args:
        model: Pipeline (folder, hub id or starter) that draws samples; or folder of images; or .npz in ADM's layout.
        reference: The real images (also --data): bundled name, folder of images, parquet files, WebDataset shards or
            LSUN's LMDBs, or hub id; or .npz of ADM's reference batches, whose statistics (mu, sigma) FID is measured
            against.
        cache: Folder where features of the real images are kept for further runs. If not given, $LOOC_LDM_CACHE, or
            looc_ldm in the user's cache folder.
        no_cache: Neither read nor keep features of the real images.
        export_npz: File to write the samples to, too, in ADM's layout. If not given, they are not kept.
        output: JSON file for the figures. If not given, they are only printed.
    """

    model: str = field(metadata=positional("SAMPLES"))
    reference: str = field(metadata={"aliases": ["data"]})
    cache: Path | None = None
    no_cache: bool = False
    export_npz: Path | None = None
    output: Path | None = None

    def __post_init__(self):
        if self.no_cache and self.cache is not None:
            raise UserError("--cache and --no-cache exclude each other.")


@dataclass(frozen=True, kw_only=True)
class Analyze(ModelOptions, MeasuredImageOptions, ComputeOptions):
    """Draw the paper's figures for a model: codebook use, sharing, t-SNE, rate and distortion, errors.

    Shows how the codebook is used, overall and by each segment, how codevectors are shared and where they lie among the
    features, rate and distortion beside JPEG and WebP, where errors are, and what codevectors stand for. Every figure
    as PNG and SVG, one page with all of them (analysis.html), and the numbers (analysis.json).

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
    Models are loaded one after the other.

    Args:
        models: Autoencoders or pipelines of any kind and rate: folders, hub ids or starter.
        names: Names of the models, in their order. If not given, what tells their paths apart.
        show: Images in the picture.
        codec_images: Images that JPEG and WebP are measured on, at even distances among those of the models; about half
            a second each at 256x256.
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

    Reads weights of the authors' LooC and CVQ-VAE (small VQ-VAE), of taming's VQGAN and of CompVis LDM. What neither
    weights nor the original config show is asked for, never guessed.

    Args:
        checkpoint: File: .safetensors, .ckpt, .pt or .pth.
        output: New folder: an autoencoder, or for ldm a whole pipeline.
        kind: What it is. If not given, found out from the keys.
        original_config: YAML file it was trained with; the options below win over it.
        resolution: Side of the images in pixels.
        no_ema: Take the live weights instead of the averaged ones.
        distance: Distance by which a quantizer of LooC or CVQ-VAE chooses codes (cos, l2).
        interpolation_factor: s of a quantizer of LooC, their shuffle_scale; 1 is off. Not asked for with CVQ-VAE.
        num_heads: Attention heads of the UNet (ldm), the same at all resolutions.
        num_head_channels: Channels of each attention head of the UNet (ldm), at all resolutions.
        prediction_type: What the UNet predicts (ldm: eps, x0, v).
        scaling_factor: What latents are multiplied by (ldm); not asked for where the weights hold it.
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
