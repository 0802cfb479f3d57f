"""Figures a paper can quote: quality and rate of reconstructions, and quality of generated images.

Functions take images, not pipelines, and follow the `clean` protocol by default (`looc_ldm.metrics.protocols`).
torch-fidelity, torchvision, lpips and transformers are imported when they are first needed. Lists of names:
`generation.METRICS`, `reconstruction.PIXEL_METRICS` and `FEATURE_METRICS`, `lpips.NETWORKS`, `protocols.PROTOCOLS`.
"""

from looc_ldm.metrics.extractors import CLIPFeatures, DINOv2Features, InceptionFeatures, VGG16Features
from looc_ldm.metrics.generation import evaluate_generation, fid_and_kid
from looc_ldm.metrics.memorization import Memorization, memorization
from looc_ldm.metrics.quality import l1, psnr, ssim
from looc_ldm.metrics.reconstruction import evaluate_reconstruction

__all__ = [
    "CLIPFeatures",
    "DINOv2Features",
    "InceptionFeatures",
    "Memorization",
    "VGG16Features",
    "evaluate_generation",
    "evaluate_reconstruction",
    "fid_and_kid",
    "l1",
    "memorization",
    "psnr",
    "ssim",
]
