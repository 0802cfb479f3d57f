"""Diffusers pipelines. Nothing here knows how a model was trained."""

from looc_ldm.pipelines.ldm import LooCLDMPipeline

__all__ = ["LooCLDMPipeline"]
