"""Figures a paper can quote: how well images are reconstructed, at which rate, and how well they are generated.

All follow the `clean` protocol: float tensors or 8-bit images without JPEG, torch-fidelity's standard resize. They
take images, not pipelines. torch-fidelity and torchvision are imported when a feature network is first needed.
"""

from looc_ldm.metrics.generation import InceptionFeatures, fid_and_kid
from looc_ldm.metrics.reconstruction import evaluate_reconstruction, psnr, ssim

__all__ = ["InceptionFeatures", "evaluate_reconstruction", "fid_and_kid", "psnr", "ssim"]
