"""`LooCQuantizer`: one small codebook, shared by all segments of every feature vector (LooC, WACV 2026)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from looc_ldm.search import DISTANCES, Anchors, better_anchors, nearest_codevectors

SEGMENT_LAYOUTS = ("channel", "patch")
ANCHORS = ("closest", "random", "probrandom", "none")


class Collected(NamedTuple):
    """What training forwards leave behind for `LooCQuantizer.revive`."""

    counts: torch.Tensor  # (K,) int64: how often each codevector was chosen
    anchors: Anchors | None


class LooCQuantizer(nn.Module):
    """Interpolate, quantize, pool: the paper's vector quantizer, a drop-in for diffusers' `VectorQuantizer`.

    Each `vq_embed_dim`-channel vector of a feature map is cut into segments of `codevector_dim` channels, and every
    segment is replaced by its nearest codevector of *one* codebook of `num_codevectors` vectors (paper section
    3.2, "LDC"). Before that the map is enlarged bilinearly by `interpolation_factor` and afterwards pooled back
    (section 3.3). Codevectors that are hardly used are pulled towards features of the batch (the CVQ update).

    Codebook, search and loss are float32 whatever the dtype of the module around it: a bfloat16 search picks a wrong
    code for 2 to 8 % of vectors at 2 to 4 dimensions. The output has the dtype of the input.

    Args:
        vq_embed_dim (`int`): n_q, the channels of a feature vector.
        num_codevectors (`int`): K, the size of the codebook.
        codevector_dim (`int`): d, the channels of a codevector.
        interpolation_factor (`int`, defaults to 2): s; 1 switches interpolation off.
        segment_layout (`str`, defaults to `"channel"`): What a segment is when s > 1. `"channel"`, the paper's text: d
            neighbouring channels at one interpolated position; d must divide n_q. `"patch"`, the authors' code: d
            consecutive rows of `pixel_unshuffle`, so that at s=2, d=4 a segment is the 2x2 patch of one channel; d
            must divide n_q * s**2. Equal at s=1.
        distance (`str`, defaults to `"cosine"`): `"cosine"` or `"euclidean"`; only the choice of the code depends on
            it, the output is always the codevector itself.
        commitment_weight (`float`, defaults to 0.25): beta, on the commitment term.
        anchor (`str`, defaults to `"closest"`): The feature a codevector is revived with: `"closest"`, `"random"`,
            `"probrandom"`, or `"none"` for no revival.
        usage_decay (`float`, defaults to 0.99): gamma, the decay of the average of `usage`.

    Attributes:
        embedding (`nn.Embedding`): `weight` is the codebook, (K, d), float32.
        usage (`torch.Tensor` of shape `(K,)`): Moving average of the share of segments each codevector received. A
            buffer: saved and loaded with the module.

    Raises:
        ValueError: A size that is not positive, a `codevector_dim` that does not divide as said, an unknown name, or
            `codevector_dim=1` with `"cosine"` (only the sign would be left to compare).

    Example:

    ```py
    >>> import torch
    >>> from looc_ldm import LooCQuantizer
    >>> quantizer = LooCQuantizer(vq_embed_dim=8, num_codevectors=256, codevector_dim=4)
    >>> z = torch.randn(2, 8, 16, 16)
    >>> z_q, loss, (perplexity, _, indices) = quantizer(z)
    >>> indices.shape  # 2 segments at each of 2 x 2 interpolated positions
    torch.Size([2, 16, 16, 8])
    >>> quantizer.revive()  # once per optimizer step
    ```
    """

    def __init__(
        self,
        vq_embed_dim: int,
        num_codevectors: int,
        codevector_dim: int,
        interpolation_factor: int = 2,
        segment_layout: str = "channel",
        distance: str = "cosine",
        commitment_weight: float = 0.25,
        anchor: str = "closest",
        usage_decay: float = 0.99,
    ):
        super().__init__()
        sizes = {
            "vq_embed_dim": vq_embed_dim,
            "num_codevectors": num_codevectors,
            "codevector_dim": codevector_dim,
            "interpolation_factor": interpolation_factor,
        }
        for name, value in sizes.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, got {value!r}.")
        if num_codevectors < 2:
            raise ValueError(f"num_codevectors must be at least 2, got {num_codevectors}.")
        for name, value, allowed in (
            ("segment_layout", segment_layout, SEGMENT_LAYOUTS),
            ("distance", distance, DISTANCES),
            ("anchor", anchor, ANCHORS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")
        if not 0 <= usage_decay < 1:
            raise ValueError(f"usage_decay must be in [0, 1), got {usage_decay!r}.")
        if not commitment_weight >= 0:
            raise ValueError(f"commitment_weight must not be negative, got {commitment_weight!r}.")
        if codevector_dim == 1 and distance == "cosine":
            raise ValueError('codevector_dim=1 needs distance="euclidean": by cosine only the sign would count.')
        divided = vq_embed_dim * (interpolation_factor**2 if segment_layout == "patch" else 1)
        if divided % codevector_dim:
            formula = "vq_embed_dim * interpolation_factor**2" if segment_layout == "patch" else "vq_embed_dim"
            raise ValueError(
                f"codevector_dim={codevector_dim} does not divide {formula} = {divided} "
                f'(segment_layout="{segment_layout}").'
            )

        self.vq_embed_dim = vq_embed_dim
        self.num_codevectors = num_codevectors
        self.codevector_dim = codevector_dim
        self.interpolation_factor = interpolation_factor
        self.segment_layout = segment_layout
        self.distance = distance
        self.commitment_weight = commitment_weight
        self.anchor = anchor
        self.usage_decay = usage_decay

        self.embedding = nn.Embedding(num_codevectors, codevector_dim, dtype=torch.float32)
        nn.init.uniform_(self.embedding.weight, -1 / num_codevectors, 1 / num_codevectors)
        self.register_buffer("usage", torch.zeros(num_codevectors, dtype=torch.float32))
        # Plain attributes, not buffers: DDP broadcasts buffers of rank 0 at each forward and would overwrite what the
        # other ranks have collected since the last optimizer step.
        self._collected: Collected | None = None
        self._owner_revives = False

    @property
    def codes_per_position(self) -> int:
        """C, the number of codes at each latent position: n_q * s**2 / d."""
        return self.vq_embed_dim * self.interpolation_factor**2 // self.codevector_dim

    @property
    def codebook(self) -> torch.Tensor:
        """The codevectors, (K, d), float32."""
        return self.embedding.weight

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, None, torch.Tensor]]:
        """Quantize a feature map. In training mode the gradient passes straight through, at interpolated resolution.

        Args:
            z (`torch.Tensor` of shape `(B, n_q, H, W)`): The feature map.

        Returns:
            `tuple`: `quantized` `(B, n_q, H, W)` in the dtype of `z`; `loss`, a float32 scalar,
            mean((z_q - sg z)^2) + beta * mean((sg z_q - z)^2) over the interpolated map (paper, equation 3); and
            `(perplexity, None, indices)`, where perplexity is exp of the entropy of this batch's codes, between 1 and
            K, and indices are int64 `(B, H, W, C)`.
        """
        if self.training and self._collected is not None and not self._owner_revives:
            self._apply_revival()
        with torch.autocast(z.device.type, enabled=False):
            rows = self._to_segments(self._interpolate(z.float()))  # (B, H, W, C, d)
            anchor = self.anchor if self.training else "none"
            flat = rows.detach().reshape(-1, self.codevector_dim)
            indices, anchors = nearest_codevectors(flat, self.codebook.detach(), self.distance, anchor)
            counts = torch.bincount(indices, minlength=self.num_codevectors)
            if self.training:
                self._collect(counts, anchors)
            indices = indices.view(rows.shape[:-1])
            chosen = self.embedding(indices)  # (B, H, W, C, d)
            codebook_loss = F.mse_loss(chosen, rows.detach())
            commitment_loss = F.mse_loss(rows, chosen.detach())
            loss = codebook_loss + self.commitment_weight * commitment_loss
            if self.training:
                chosen = rows + (chosen - rows).detach()
            quantized = self._pool(self._from_segments(chosen))
            share = counts / indices.numel()
            perplexity = torch.exp(-torch.sum(share * torch.log(share + 1e-10)))
        return quantized.to(z.dtype), loss, (perplexity, None, indices)

    @torch.no_grad()
    def encode_indices(self, z: torch.Tensor) -> torch.Tensor:
        """Codes of a feature map `(B, n_q, H, W)`, as int64 `(B, H, W, C)`.

        Along C: (dy, dx, segment) in the `"channel"` layout, the rows of `pixel_unshuffle` in `"patch"`.
        """
        with torch.autocast(z.device.type, enabled=False):
            rows = self._to_segments(self._interpolate(z.float()))
            flat = rows.reshape(-1, self.codevector_dim)
            return nearest_codevectors(flat, self.codebook, self.distance).indices.view(rows.shape[:-1])

    def decode_indices(self, indices: torch.Tensor) -> torch.Tensor:
        """The float32 feature map `(B, n_q, H, W)` of codes `(B, H, W, C)`: what `forward` returns in eval mode.

        Raises:
            ValueError: `indices` has another number of axes, or a last axis that is not C.
        """
        if indices.ndim != 4 or indices.shape[-1] != self.codes_per_position:
            raise ValueError(
                f"indices must have the shape (batch, height, width, {self.codes_per_position}), "
                f"got {tuple(indices.shape)}."
            )
        with torch.autocast(indices.device.type, enabled=False):
            return self._pool(self._from_segments(self.embedding(indices)))

    @torch.no_grad()
    def revive(self) -> None:
        """Apply the revival collected since the last call (the CVQ-VAE update). Call once per optimizer step.

        With p_k the share of segments that chose codevector k: N_k <- gamma N_k + (1 - gamma) p_k, then
        c_k <- (1 - alpha_k) c_k + alpha_k a_k with alpha_k = exp(-10 K N_k / (1 - gamma) - 0.001) and a_k the anchor.
        Right after each forward this is the published rule; once per optimizer step it also holds under gradient
        accumulation. Where `torch.distributed` runs, this is a collective: every rank must call it, and all ranks end
        with the codebook that one process would have got from all their features.

        A module whose `revive` was never called revives by itself at its next training forward. Call it once before
        the first step of a training that accumulates gradients.
        """
        self._owner_revives = True
        if self._collected is not None:
            self._apply_revival()

    @torch.no_grad()
    def _apply_revival(self) -> None:
        counts, anchors = self._reduce_over_ranks(self._collected)
        self._collected = None
        share = counts / counts.sum()
        self.usage.lerp_(share.to(self.usage.dtype), 1 - self.usage_decay)
        if anchors is not None:
            weight = torch.exp(-10 * self.num_codevectors * self.usage / (1 - self.usage_decay) - 1e-3)
            revived = self.embedding.weight.lerp(anchors.vector, weight[:, None])
            # Features overflow in the steps that a gradient scaler skips; a codevector would keep a NaN for good.
            self.embedding.weight.copy_(torch.where(revived.isfinite(), revived, self.embedding.weight))

    def _collect(self, counts: torch.Tensor, anchors: Anchors | None) -> None:
        if self._collected is not None:
            counts = counts + self._collected.counts
            anchors = None if anchors is None else better_anchors(self._collected.anchors, anchors)
        self._collected = Collected(counts, anchors)

    def _reduce_over_ranks(self, collected: Collected) -> Collected:
        """Sum the counts and keep the best anchors of all ranks: O(K d) traffic. A collective."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return collected
        counts = collected.counts.clone()
        dist.all_reduce(counts)
        if collected.anchors is None:
            return Collected(counts, None)
        mine = torch.cat([collected.anchors.score[:, None], collected.anchors.vector], dim=1)  # (K, 1 + d)
        gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, mine)
        best = None
        for candidates in gathered:  # in the order of ranks, so that ties go to the lowest
            best = better_anchors(best, Anchors(candidates[:, 0], candidates[:, 1:]))
        return Collected(counts, best)

    def _interpolate(self, z: torch.Tensor) -> torch.Tensor:
        if z.ndim != 4 or z.shape[1] != self.vq_embed_dim:
            raise ValueError(
                f"z must have the shape (batch, {self.vq_embed_dim}, height, width), got {tuple(z.shape)}."
            )
        if self.interpolation_factor == 1:
            return z
        return F.interpolate(z, scale_factor=self.interpolation_factor, mode="bilinear", align_corners=False)

    def _pool(self, z: torch.Tensor) -> torch.Tensor:
        return z if self.interpolation_factor == 1 else F.avg_pool2d(z, self.interpolation_factor)

    def _to_segments(self, z: torch.Tensor) -> torch.Tensor:
        """(B, n_q, s H, s W) -> (B, H, W, C, d)"""
        batch, channels, height, width = z.shape
        s, d = self.interpolation_factor, self.codevector_dim
        height, width = height // s, width // s
        z = z.view(batch, channels, height, s, width, s)
        # (B, H, W, dy, dx, n_q), or (B, H, W, n_q, dy, dx): the channels of pixel_unshuffle
        order = (0, 2, 4, 3, 5, 1) if self.segment_layout == "channel" else (0, 2, 4, 1, 3, 5)
        return z.permute(order).reshape(batch, height, width, self.codes_per_position, d)

    def _from_segments(self, rows: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C, d) -> (B, n_q, s H, s W), the inverse of `_to_segments`"""
        batch, height, width = rows.shape[:3]
        s, channels = self.interpolation_factor, self.vq_embed_dim
        if self.segment_layout == "channel":
            z = rows.reshape(batch, height, width, s, s, channels).permute(0, 5, 1, 3, 2, 4)
        else:
            z = rows.reshape(batch, height, width, channels, s, s).permute(0, 3, 1, 4, 2, 5)
        return z.reshape(batch, channels, height * s, width * s)

    def _apply(self, fn, recurse: bool = True):
        """Follow `.to(device)`, but not `.half()` or `.to(dtype)`: codebook and usage stay float32."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    def extra_repr(self) -> str:
        return (
            f"vq_embed_dim={self.vq_embed_dim}, num_codevectors={self.num_codevectors}, "
            f"codevector_dim={self.codevector_dim}, interpolation_factor={self.interpolation_factor}, "
            f"segment_layout={self.segment_layout!r}, distance={self.distance!r}, anchor={self.anchor!r}"
        )
