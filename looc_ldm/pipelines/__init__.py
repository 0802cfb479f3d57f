"""Diffusers pipelines. Nothing here knows how a model was trained."""

from looc_ldm.pipelines.img2img import LooCLDMImg2ImgPipeline
from looc_ldm.pipelines.inpaint import LooCLDMInpaintPipeline
from looc_ldm.pipelines.ldm import LooCLDMPipeline

__all__ = ["LooCLDMImg2ImgPipeline", "LooCLDMInpaintPipeline", "LooCLDMPipeline"]
