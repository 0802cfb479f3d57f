"""For `trust_remote_code=True`: the pipeline of the installed looc_ldm."""

from looc_ldm import LooCLDMPipeline

__all__ = ["LooCLDMPipeline"]
