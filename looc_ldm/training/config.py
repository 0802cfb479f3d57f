"""Settings of a run: typed dataclasses, which `looc_ldm.training.config_parsing` fills from YAML and dotted flags.

The dataclasses are the only definition of a setting. A type says which values are allowed. Models and schedulers are
given as the arguments of their constructors, which are checked against the constructor's own signature. Amounts of
training are counted in images.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from jsonargparse.typing import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
    restricted_string_type,
)

from looc_ldm.images.config import DataConfig, Fit
from looc_ldm.utils.arguments import Seed

HalfOpenUnitInterval = restricted_number_type("HalfOpenUnitInterval", float, [(">=", 0), ("<", 1)])
PositiveAtMostOne = restricted_number_type("PositiveAtMostOne", float, [(">", 0), ("<=", 1)])
RepositoryId = restricted_string_type("RepositoryId", r"^[\w.-]+/[\w.-]+$")


@dataclass
class OptimizerConfig:
    """AdamW and its learning rate, counted in images so that a different batch size keeps the schedule.

    Args:
        learning_rate: Peak learning rate, for the batch size of the config (not scaled).
        betas: Decay of the two moments.
        weight_decay: Decoupled weight decay.
        schedule: `constant`, or `cosine` from the end of the warm-up to 0 at the last image.
        warmup_images: Images over which the rate rises from 0.
        max_grad_norm: Norm that gradients are clipped to; 0 does not clip.
    """

    learning_rate: PositiveAtMostOne = 1e-4
    betas: tuple[HalfOpenUnitInterval, HalfOpenUnitInterval] = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.0
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_images: NonNegativeInt = 0
    max_grad_norm: NonNegativeFloat = 1.0


@dataclass
class EvaluationConfig:
    """Evaluation during training. Figures go to the log with the prefix `val_`.

    Args:
        every_images: Interval in images. If not given, nothing is evaluated.
        images: Held-out images that are reconstructed (stage 1), or samples that are drawn (stage 2).
        fid: Measure rFID (stage 1, between the images and their reconstructions) or FID (stage 2, between the samples
            and the training images). Needs at least 2 images.
        inception_weights: File of torch-fidelity's Inception network; if not given, torch-fidelity downloads it.
        feature_layer: Features of the Inception network to use. Only 2048 is comparable with published figures.
    """

    every_images: PositiveInt | None = None
    images: PositiveInt = 1000
    fid: bool = False
    inception_weights: str | None = None
    feature_layer: Literal[64, 192, 768, 2048] = 2048


@dataclass
class RunConfig:
    """Settings of both stages.

    Args:
        output_dir: Folder of checkpoints, logs, grids and the final model.
        init_from: Folder or hub id of a finished model of this stage to start from, instead of random weights; or the
            folder of a run, whose newest checkpoint has live and averaged weights. The networks are taken from it.
            Optimizers and the PatchGAN start over.
        seed: Seed of initial weights and of all randomness in training.
        total_images: Images to train on, repeats counted.
        batch_size: Images per optimizer step, over all processes and accumulation steps.
        gradient_accumulation_steps: Forward passes per optimizer step.
        mixed_precision: `auto` is bf16 if the hardware supports it, else `no`. A resumed run keeps its precision.
        threads: CPU threads, for training on a CPU. If neither this nor OMP_NUM_THREADS in the environment is given, a
            new run measures which number is fastest, and keeps it, unless steps become three times slower.
        channels_last: Keep convolution weights with their channels last. If not given: on accelerators, which are
            faster with it, and not on CPUs, which are slower.
        compile: Compile the trained network with `torch.compile`; the first steps take minutes.
        gradient_checkpointing: Compute activations again in the backward pass: less memory, about a third more time.
        ema_halflife_images: Images after which a weight counts half in the average; it rises with 5 % of the images
            seen, so that early averages follow.
        log_every_images: Interval of log lines.
        preview_every_images: Interval of image grids.
        checkpoint_every_images: Interval of checkpoints. The end of training also writes one.
        keep_last: Number of newest checkpoints to keep.
        keep_every_images: Interval of checkpoints that are never removed, a multiple of `checkpoint_every_images`.
        max_skipped_steps: Steps in a row that may be skipped because a gradient is not finite; one more stops it.
        push_to_hub: Repository (`user/name`) that the averaged model is uploaded to at every checkpoint, in the
            background. A failed upload is logged and does not stop the run.
        push_private: Make that repository a private one.
        tracker: A second place for scalars and grids, besides the run's folder: `tensorboard`, `wandb` or `none`.
    """

    output_dir: str = "runs/looc-ldm"
    init_from: str | None = None
    seed: Seed = 0
    total_images: PositiveInt = 1_000_000
    batch_size: PositiveInt = 64
    gradient_accumulation_steps: PositiveInt = 1
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    threads: PositiveInt | None = None
    channels_last: bool | None = None
    compile: bool = False
    gradient_checkpointing: bool = False
    ema_halflife_images: PositiveInt = 100_000
    log_every_images: PositiveInt = 10_000
    preview_every_images: PositiveInt = 100_000
    checkpoint_every_images: PositiveInt = 100_000
    keep_last: PositiveInt = 2
    keep_every_images: PositiveInt | None = None
    max_skipped_steps: NonNegativeInt = 10
    push_to_hub: RepositoryId | None = None
    push_private: bool = True
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard"


@dataclass
class LossConfig:
    """Terms of the autoencoder's loss (VQGAN, taming-transformers).

    Args:
        reconstruction: `l1` or `l2`, on images in [-1, 1].
        reconstruction_weight: Its weight.
        quantizer_weight: Weight of the codebook and commitment terms.
        lpips_weight: Weight of the perceptual term; 0 leaves it out.
        lpips_network: `vgg` or `alex`.
        lpips_share: Share of the images of each batch, the first of them, that LPIPS sees. Its VGG16 costs more than a
            small autoencoder.
        lpips_weights: Local file (.safetensors or .pth, torchvision's names) of that network's convolutions; if not
            given, torchvision downloads them.
        adversarial_weight: Weight of the PatchGAN term; 0 leaves it out.
        adversarial_start_images: Images seen before the PatchGAN is trained and its term is added to the loss.
        adaptive_weight: Scale the PatchGAN term so that its gradient at the last layer is as large as the
            reconstruction's.
        discriminator_channels: Channels of the PatchGAN's first layer.
        discriminator_layers: Strided layers of the PatchGAN; with 3, each output sees a patch of 70x70 pixels.
    """

    reconstruction: Literal["l1", "l2"] = "l1"
    reconstruction_weight: NonNegativeFloat = 1.0
    quantizer_weight: NonNegativeFloat = 1.0
    lpips_weight: NonNegativeFloat = 0.0
    lpips_network: Literal["vgg", "alex"] = "vgg"
    lpips_share: PositiveAtMostOne = 1.0
    lpips_weights: str | None = None
    adversarial_weight: NonNegativeFloat = 0.0
    adversarial_start_images: NonNegativeInt = 0
    adaptive_weight: bool = True
    discriminator_channels: PositiveInt = 64
    discriminator_layers: PositiveInt = 3


@dataclass
class AutoencoderConfig(RunConfig):
    """Stage 1: a `LooCVQModel`.

    Args:
        data: The images.
        model: Arguments of `LooCVQModel`.
        loss: Terms of the loss.
        optimizer: Settings for the autoencoder's optimizer, and also for the PatchGAN's.
        evaluation: Evaluation during training.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: dict[str, Any] = field(default_factory=dict)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)


@dataclass
class DiffusionDataConfig(DataConfig):
    """The images of stage 2.

    Args:
        resolution: Side in pixels of the square images. The default is the autoencoder's.
        fit: Method to make images square; see stage 1. The default is the autoencoder's, but `crop` if that is
            `random_crop`.
    """

    resolution: PositiveInt | None = None
    fit: Fit | None = None


@dataclass
class DiffusionConfig(RunConfig):
    """Stage 2: a UNet on the latents of a trained `LooCVQModel`.

    Args:
        autoencoder: Folder or hub id of the first stage, or of a pipeline that holds one. The default is the
            first stage of `init_from`.
        data: The images.
        cache_latents: Encode all images once, before training. Set it to false for data that is streamed or cropped at
            random: these images are encoded in the training loop.
        latents: Folder of the cached latents; made before training if it does not hold them yet.
        latent_scaling: Brings latents to unit variance. `scalar`: by the first stage's `scaling_factor`,
            measured if it has none. `channel`: each channel by its own mean and deviation over the training images;
            diffusers' LDMPipeline ignores these values.
        class_conditional: Train with the labels of the data.
        class_dropout: Share of images, drawn one by one, whose label is replaced by the null class, which
            classifier-free guidance needs. 0 leaves the null class out.
        unet: `type`, one of `UNet2DModel`, `UNet2DConditionModel` and `FixedHeadsUNet2DModel`, and the arguments of its
            constructor. What the data decides (`sample_size`, channels, `num_class_embeds`) is filled in, and refused
            if the config has a different value.
        class_embedding_dim: Channels of the learned class token that a `UNet2DConditionModel` attends to.
        scheduler: `type`, the scheduler saved with the pipeline, and its arguments, the noise schedule and
            `prediction_type` (`epsilon`, `v_prediction` or `sample`) among them. `FlowMatchEulerDiscreteScheduler` is
            flow matching. `rescale_betas_zero_snr` is for `v_prediction` and `sample`.
        loss: `l2` or `l1` between the prediction and its target.
        loss_weighting: `min_snr` weighs timesteps by min(SNR, gamma), as a loss on the latents; not for flow matching.
        min_snr_gamma: Gamma of `min_snr`.
        timestep_sampling: `uniform`, or `logit_normal` (the logistic function of a standard normal variable, as a share
            of the timesteps), which is usual for flow matching.
        optimizer: For the UNet.
        evaluation: Evaluation during training.
        preview_steps: Denoising steps of the sample grids.
        preview_guidance_scale: Guidance scale of the sample grids, for conditional models with a null class.
    """

    autoencoder: str = ""
    data: DiffusionDataConfig = field(default_factory=DiffusionDataConfig)
    cache_latents: bool = True
    latents: str | None = None
    latent_scaling: Literal["scalar", "channel"] = "scalar"
    class_conditional: bool = False
    class_dropout: HalfOpenUnitInterval = 0.1
    unet: dict[str, Any] = field(default_factory=dict)
    class_embedding_dim: PositiveInt | None = None
    scheduler: dict[str, Any] = field(default_factory=dict)
    loss: Literal["l1", "l2"] = "l2"
    loss_weighting: Literal["uniform", "min_snr"] = "uniform"
    min_snr_gamma: PositiveFloat = 5.0
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    preview_steps: PositiveInt = 50
    preview_guidance_scale: float = 1.0
