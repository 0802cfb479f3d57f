"""Figures a paper can quote: how well images are reconstructed, at which rate, and how well they are generated.

They take images, not pipelines, and follow the `clean` protocol unless told otherwise (`looc_ldm.metrics.protocols`).
torch-fidelity, torchvision, lpips and transformers are imported when a network of theirs is first needed.
"""

from looc_ldm.metrics.extractors import CLIPFeatures, DINOv2Features, InceptionFeatures, VGG16Features
from looc_ldm.metrics.generation import evaluate_generation, fid_and_kid
from looc_ldm.metrics.quality import l1, psnr, ssim
from looc_ldm.metrics.reconstruction import evaluate_reconstruction

__all__ = [
    "CLIPFeatures",
    "DINOv2Features",
    "InceptionFeatures",
    "VGG16Features",
    "evaluate_generation",
    "evaluate_reconstruction",
    "fid_and_kid",
    "l1",
    "psnr",
    "ssim",
]
