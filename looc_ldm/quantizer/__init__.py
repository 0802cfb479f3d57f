"""The method: one small codebook, shared by all segments of every feature vector."""

from looc_ldm.quantizer.loocq import LooCQuantizer

__all__ = ["LooCQuantizer"]
