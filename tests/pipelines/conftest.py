"""Tiny pipelines of every kind, with random weights: what they draw is noise, but it is drawn as it should be."""

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel, UNet2DModel

from looc_ldm import ClassEmbedding, LooCLDMPipeline, LooCVQModel

ID2LABEL = {0: "T-shirt", 1: "sandal, flip-flop", 2: "ankle boot"}
NULL_LABEL = 3


def _vqvae(channels: int) -> LooCVQModel:
    return LooCVQModel(
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=16,
        codevector_dim=2,
        distance="euclidean",  # to which, unlike to "cosine", the scale of the latents matters
        sample_size=16,
        scaling_factor=0.7,
        mid_block_add_attention=False,
    )


@pytest.fixture
def make_pipeline():
    """Builds a pipeline, "unconditional", "num_class_embeds" or "cross_attention": 16x16 images, 4x8x8 latents."""

    def make(kind: str = "num_class_embeds", channels: int = 3, seed: int = 0, **arguments) -> LooCLDMPipeline:
        torch.manual_seed(seed)
        sizes = {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "norm_num_groups": 4,
        }
        conditional = {"id2label": ID2LABEL, "null_class_label": NULL_LABEL} | arguments
        scheduler = DDIMScheduler(clip_sample=False)
        if kind == "cross_attention":
            unet = UNet2DConditionModel(
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                cross_attention_dim=12,
                attention_head_dim=2,
                **sizes,
            )
            token = ClassEmbedding(len(ID2LABEL) + 1, 12)
            pipe = LooCLDMPipeline(_vqvae(channels).eval(), unet.eval(), scheduler, token, **conditional)
        else:
            unet = UNet2DModel(
                down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                up_block_types=("AttnUpBlock2D", "UpBlock2D"),
                num_class_embeds=None if kind == "unconditional" else len(ID2LABEL) + 1,
                attention_head_dim=4,
                **sizes,
            )
            if kind == "unconditional":
                conditional = arguments
            pipe = LooCLDMPipeline(_vqvae(channels).eval(), unet.eval(), scheduler, **conditional)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make
