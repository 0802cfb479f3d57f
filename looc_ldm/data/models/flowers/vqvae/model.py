"""For `trust_remote_code=True`: the classes of components of the installed looc_ldm."""

from looc_ldm import ClassEmbedding, FixedHeadsUNet2DModel, LooCSmallVQModel, LooCVQModel

__all__ = ["ClassEmbedding", "FixedHeadsUNet2DModel", "LooCSmallVQModel", "LooCVQModel"]
