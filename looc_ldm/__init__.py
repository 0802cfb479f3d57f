"""Latent diffusion for diffusers on a LooC first stage.

The public names are imported when they are first used, so that `import looc_ldm` costs no more than
`import diffusers`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.2.0"

_HOME_OF = {
    "LooCQuantizer": "looc_ldm.quantizer.loocq",
    "codebook_statistics": "looc_ldm.quantizer.statistics",
    "CodebookStatistics": "looc_ldm.quantizer.statistics",
    "LooCVQModel": "looc_ldm.models.autoencoder",
    "LooCDecoderOutput": "looc_ldm.models.autoencoder",
    "LooCSmallVQModel": "looc_ldm.models.small",
    "ClassEmbedding": "looc_ldm.models.class_embedding",
    "FixedHeadsUNet2DModel": "looc_ldm.models.unet",
    "LooCLDMPipeline": "looc_ldm.pipelines.ldm",
    "LooCLDMImg2ImgPipeline": "looc_ldm.pipelines.img2img",
    "LooCLDMInpaintPipeline": "looc_ldm.pipelines.inpaint",
    "starter_model": "looc_ldm.models.starter",
}
__all__ = sorted(_HOME_OF)

if TYPE_CHECKING:
    from looc_ldm.models.autoencoder import LooCDecoderOutput as LooCDecoderOutput
    from looc_ldm.models.autoencoder import LooCVQModel as LooCVQModel
    from looc_ldm.models.class_embedding import ClassEmbedding as ClassEmbedding
    from looc_ldm.models.small import LooCSmallVQModel as LooCSmallVQModel
    from looc_ldm.models.starter import starter_model as starter_model
    from looc_ldm.models.unet import FixedHeadsUNet2DModel as FixedHeadsUNet2DModel
    from looc_ldm.pipelines.img2img import LooCLDMImg2ImgPipeline as LooCLDMImg2ImgPipeline
    from looc_ldm.pipelines.inpaint import LooCLDMInpaintPipeline as LooCLDMInpaintPipeline
    from looc_ldm.pipelines.ldm import LooCLDMPipeline as LooCLDMPipeline
    from looc_ldm.quantizer.loocq import LooCQuantizer as LooCQuantizer
    from looc_ldm.quantizer.statistics import CodebookStatistics as CodebookStatistics
    from looc_ldm.quantizer.statistics import codebook_statistics as codebook_statistics


def __getattr__(name: str):
    if name not in _HOME_OF:
        raise AttributeError(f"module 'looc_ldm' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
