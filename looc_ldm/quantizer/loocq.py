"""`LooCQuantizer`: one small codebook, shared by all segments of every feature vector (LooC, WACV 2026)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from looc_ldm.quantizer.anchors import ANCHORS
from looc_ldm.quantizer.chunks import chunk_elements
from looc_ldm.quantizer.gradients import QuantizerLoss, Rotation
from looc_ldm.quantizer.revival import NOT_FINITE, RevivedCodebook
from looc_ldm.quantizer.search import DISTANCES, is_exporting, is_recording, nearest_codevectors

SEGMENT_LAYOUTS = ("channel", "patch")
INPUT_LAYOUTS = ("BCHW", "BCL", "BLC")
CODEBOOK_UPDATES = ("ema", "gradient")
GRADIENTS = ("straight-through", "rotation")


class LooCQuantizer(RevivedCodebook):
    """Interpolate, quantize, pool: the paper's vector quantizer, a drop-in for diffusers' `VectorQuantizer`.

    Each `vq_embed_dim`-channel vector of a feature map is cut into segments of `codevector_dim` channels, and every
    segment is replaced by its nearest codevector of *one* codebook of `num_codevectors` vectors (paper section
    3.2, "LDC"). Before that the map is enlarged bilinearly by `interpolation_factor` and afterwards pooled back
    (section 3.3). Codevectors that are hardly used are pulled towards features of the batch (the CVQ update).

    Unlike in diffusers, indices keep the shape of the map, perplexity is a number, `decode_indices` replaces
    `get_codebook_entry`, and gradients rotate with the segments by default.

    Codebook, search and loss are always float32, also inside a module of a different dtype. A bfloat16 search picks a
    wrong codevector for 2 to 8 % of segments at 2 to 4 dimensions. The output has the dtype of the input.

    The codebook learns in train mode if its weight requires a gradient: `eval()` and `requires_grad_(False)`, of the
    quantizer or of a module around it, freeze codebook and usage (see `learns`).

    Args:
        vq_embed_dim (`int`): n_q, the channels of a feature vector.
        num_codevectors (`int`): K, the size of the codebook.
        codevector_dim (`int`): d, the channels of a codevector.
        interpolation_factor (`int`, defaults to 2): s; 1 switches interpolation off.
        segment_layout (`str`, defaults to `"channel"`): Definition of a segment if s > 1. `"channel"`, as in the text
            of the paper: d neighbouring channels at one interpolated position; d must divide n_q. `"patch"`, as in the
            authors' code: d consecutive channels of `pixel_unshuffle`, so that at s=2, d=4 a segment is the 2x2 patch
            of one channel; d must divide n_q * s**2. At s=1 both are the same.
        distance (`str`, defaults to `"euclidean"`): `"euclidean"`, or `"cosine"` as published. It decides which
            codevector is nearest; the output is always the codevector itself.
        commitment_weight (`float`, defaults to 0.25): beta, the weight of the commitment term. 8 learns much faster
            with the published settings, `codebook_update="gradient"` and `gradient="straight-through"`. With the
            default settings and cosine distance, 8 gains at most 0.5 dB of PSNR (docs/tables.md).
        anchor (`str`, defaults to `"closest"`): The feature a codevector is revived with: `"closest"`, `"random"`,
            `"probrandom"`, or `"none"` for no revival.
        usage_decay (`float`, defaults to 0.99): gamma, the decay of two moving averages: `usage` and, with `"ema"`, the
            codebook.
        codebook_update (`str`, defaults to `"ema"`): Rule by which a codevector follows the segments that choose it.
            `"ema"`: it is their moving average (VQ-VAE, appendix A.1). `revive` moves it, and it gets no gradient.
            (Under DistributedDataParallel its gradient is zero: exempt it from weight decay.) `"gradient"`: it is
            trained by the codebook term of the loss, as published. The optimizer needs the quantizer's parameters. It
            also moves a frozen codebook, by momentum or weight decay, unless the gradient is None, as after
            `zero_grad()`.
            Together with `gradient="straight-through"`, on some data the loss climbs to many times its start in the
            first 50 steps, since the codevectors, which start in [-1/K, 1/K], lag behind the encoder
            (docs/quantizer_recipes.md).
        gradient (`str`, defaults to `"rotation"`): Gradient for a segment z at the choice of a codevector c.
            `"rotation"`: the gradient goes through the rotation and scaling that map z to c, both treated as
            constants ("Restructuring vector quantization with the rotation trick", ICLR 2025). It passes straight
            through if c is more than 32 times longer than z, and at d = 1, where there is nothing to rotate.
            `"straight-through"`: the gradient of the output reaches z unchanged, as published. At K = 256 it is
            better with up to four codes per position, and rotation with eight (docs/choosing_sizes.md).
        input_layout (`str`, defaults to `"BCHW"`): The axes of `z`: `"BCHW"` for feature maps, `"BCL"` (convolutions)
            or `"BLC"` (transformers) for sequences. A sequence is interpolated along L: in shapes and formulas, read s
            instead of s**2 and (L) instead of (H, W).

    Attributes:
        embedding (`nn.Embedding`): `weight` is the codebook, (K, d), float32.
        usage (`torch.Tensor` of shape `(K,)`): Moving average of the share of segments each codevector received. A
            buffer: saved and loaded with the module.
        owner_revives (`bool`): Whether the training loop calls `revive` or `discard` once per optimizer step and checks
            losses or gradients; False by default. If True, a training forward neither revives by itself nor raises for
            values that are not finite (by default it does on CPUs).

    Raises:
        ValueError: A size is not positive, `codevector_dim` does not divide the channels (see `segment_layout`), a name
            is unknown, or `codevector_dim=1` is given with `"cosine"` (only the sign would be left to compare).

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
        distance: str = "euclidean",
        commitment_weight: float = 0.25,
        anchor: str = "closest",
        usage_decay: float = 0.99,
        codebook_update: str = "ema",
        gradient: str = "rotation",
        input_layout: str = "BCHW",
    ):
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
            ("codebook_update", codebook_update, CODEBOOK_UPDATES),
            ("gradient", gradient, GRADIENTS),
            ("input_layout", input_layout, INPUT_LAYOUTS),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")
        if not 0 <= usage_decay < 1:
            raise ValueError(f"usage_decay must be in [0, 1), got {usage_decay!r}.")
        if not commitment_weight >= 0:
            raise ValueError(f"commitment_weight must not be negative, got {commitment_weight!r}.")
        if codevector_dim == 1 and distance == "cosine":
            raise ValueError('codevector_dim=1 needs distance="euclidean": by cosine only the sign would count.')
        axes = len(input_layout) - 2
        divided = vq_embed_dim * (interpolation_factor**axes if segment_layout == "patch" else 1)
        if divided % codevector_dim:
            formula = f"vq_embed_dim * interpolation_factor**{axes}" if segment_layout == "patch" else "vq_embed_dim"
            raise ValueError(
                f"codevector_dim={codevector_dim} does not divide {formula} = {divided} "
                f'(segment_layout="{segment_layout}").'
            )

        super().__init__(num_codevectors, codevector_dim, usage_decay, codebook_update)
        self.vq_embed_dim = vq_embed_dim
        self.interpolation_factor = interpolation_factor
        self.segment_layout = segment_layout
        self.distance = distance
        self.commitment_weight = commitment_weight
        self.anchor = anchor
        self.gradient = gradient
        self.input_layout = input_layout

    @property
    def codes_per_position(self) -> int:
        """C, the number of codes at each latent position: n_q * s**2 / d, or n_q * s / d with one spatial axis."""
        return self.vq_embed_dim * self.interpolation_factor**self.spatial_axes // self.codevector_dim

    @property
    def bits_per_position(self) -> float:
        """The rate of a latent position in bits, C * log2(K)."""
        return self.codes_per_position * math.log2(self.num_codevectors)

    @property
    def codebook_scalars(self) -> int:
        """Numbers in the codebook, K * d."""
        return self.num_codevectors * self.codevector_dim

    @property
    def spatial_axes(self) -> int:
        """Number of spatial axes of the input: 2 for `"BCHW"`, 1 for `"BCL"` and `"BLC"`."""
        return len(self.input_layout) - 2

    def forward(
        self, z: torch.Tensor, mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, None, torch.Tensor]]:
        """Quantize a feature map. `gradient` decides how gradients flow back through the quantization.

        Args:
            z (`torch.Tensor` of shape `(B, n_q, H, W)`): The feature map; its axes depend on `input_layout`.
            mask (`torch.Tensor` of shape `(B, L)`, bool, *optional*): For padded sequences (`"BCL"`, `"BLC"`, s = 1):
                True for positions to quantize. The others are ignored in loss, perplexity, usage and revival; their
                output is 0 and their index -1.

        Returns:
            `tuple`: `quantized` in the shape and dtype of `z`; `loss`, a float32 scalar,
            mean((z_q - sg z)^2) + beta * mean((sg z_q - z)^2) over the interpolated map (paper, equation 3); and
            `(perplexity, None, indices)`, where perplexity is exp of the entropy of this batch's indices, between 1
            and K, and indices are int64 `(B, H, W, C)`.

        Raises:
            ValueError: `z` has a different shape, or holds values that are not finite. Training on an accelerator does
                not raise for such values, as it would have to wait for the device: call `check_finite`. Compiled or
                exported, evaluation does not raise either: `quantized` and `loss` hold NaN, and the indices are
                arbitrary.
            ValueError: `mask` has a different shape or type, is True nowhere, or is given with interpolation or feature
                maps.
        """
        if mask is not None:
            return self._forward_masked(z, mask)
        collects = self._begin_forward()
        nonfinite = self._check_input(z)
        with torch.autocast(z.device.type, enabled=False):
            segments = self._to_segments(z.float())  # (B, H, W, C, d)
            vectors = segments.detach().reshape(-1, self.codevector_dim)  # (N, d)
            anchor = self.anchor if collects else "none"
            chosen, counts, anchors = nearest_codevectors(vectors, self.codebook.detach(), self.distance, anchor)
            indices = chosen.view(segments.shape[:-1])
            if torch.is_grad_enabled() and not torch.jit.is_tracing():  # no trace holds our gradients
                difference = F.embedding(chosen, self.codebook.detach()).sub_(vectors)  # c - z, (N, d)
                if collects:
                    self._collect(counts, nonfinite, difference, chosen, anchors)
                quantized = self._with_gradient(segments, indices, difference)
                by_gradient = self.codebook_update == "gradient" and self.learns
                loss = QuantizerLoss.apply(
                    segments, self.codebook, difference, chosen, self.commitment_weight, by_gradient
                )
            else:
                loss = self._loss_in_chunks(vectors, chosen)
                del segments, vectors  # as large as what is made next
                quantized = self._lookup(indices)
                if is_recording():
                    quantized = torch.where(nonfinite, torch.nan, quantized)
            share = counts / chosen.numel()
            perplexity = torch.exp(-torch.sum(share * torch.log(share + 1e-10)))
        return self._like(quantized, z), loss, (perplexity, None, indices)

    def encode_indices(self, z: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Return the indices of a feature map `(B, n_q, H, W)`, int64 `(B, H, W, C)`.

        The order along C is (dy, dx, segment) in the `"channel"` layout, and the order of `pixel_unshuffle` in the
        `"patch"` layout. See `forward` for `mask` and the errors.
        """
        if mask is None:
            return self.search(z)[0]
        return self._unmask(self.search(self._masked(z, mask))[0][0], mask, -1)

    @torch.no_grad()
    def search(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the indices `(B, H, W, C)` of a feature map, and its segments, float32 `(B, H, W, C, d)`."""
        self._check_input(z, wait=True)
        with torch.autocast(z.device.type, enabled=False):
            segments = self._to_segments(z.float())
            vectors = segments.reshape(-1, self.codevector_dim)
            chosen = nearest_codevectors(vectors, self.codebook, self.distance).indices
            return chosen.view(segments.shape[:-1]), segments

    def decode_indices(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the float32 feature map `(B, n_q, H, W)` of integer indices `(B, H, W, C)`, equal to `forward`'s.

        In sequences, positions that a mask left out have the index -1; their features are 0.

        Raises:
            ValueError: `indices` are not integers, have a wrong number of axes, have a last axis that is not C, or are
                not all in [0, K). Compiled code does not check the range.
        """
        if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
            raise ValueError(f"indices must be integers, got {indices.dtype}.")
        if indices.ndim != self.spatial_axes + 2 or indices.shape[-1] != self.codes_per_position:
            axes = "batch, height, width" if self.spatial_axes == 2 else "batch, length"
            raise ValueError(
                f"indices must have the shape ({axes}, {self.codes_per_position}), got {tuple(indices.shape)}."
            )
        indices = indices.long()
        masked = self.spatial_axes == 1 and self.interpolation_factor == 1
        if indices.numel() and not is_recording():
            lowest, highest = (int(extreme) for extreme in indices.aminmax())
            masked = masked and lowest == -1
            if lowest < -masked or highest >= self.num_codevectors:
                raise ValueError(
                    f"indices must be in [0, {self.num_codevectors}), got values from {lowest} to {highest}."
                )
        with torch.autocast(indices.device.type, enabled=False):
            quantized = self._lookup(indices.clamp_min(0) if masked else indices)
        if masked:
            left_out = (indices < 0).repeat_interleave(self.codevector_dim, -1)
            quantized = quantized.masked_fill(left_out, 0)
        return quantized if self.input_layout == "BLC" else _channels_first(quantized)

    @torch.no_grad()
    def code_counts(self, indices: torch.Tensor) -> list[torch.Tensor]:
        """Count how often each codevector was chosen: int64 `(K,)` on the CPU, one tensor since there is one codebook.

        Positions that a mask left out, with the index -1, do not count.
        """
        return [torch.bincount(indices[indices >= 0], minlength=self.num_codevectors).cpu()]

    def _check_input(self, z: torch.Tensor, wait: bool = False) -> torch.Tensor:
        """Return a bool tensor: whether z holds values that are not finite.

        Raises ValueError for wrong shapes. Raises it for values that are not finite only with `wait`, in evaluation, or
        on a CPU without `owner_revives`. Elsewhere the check would delay training; traces cannot raise.
        """
        channel_axis = self.input_layout.index("C")
        if z.ndim != len(self.input_layout) or z.shape[channel_axis] != self.vq_embed_dim or not z.is_floating_point():
            names = {"B": "batch", "C": str(self.vq_embed_dim), "H": "height", "W": "width", "L": "length"}
            shape = ", ".join(names[axis] for axis in self.input_layout)
            raise ValueError(f"z must be floating point of the shape ({shape}), got {z.dtype} of {tuple(z.shape)}.")
        if not is_recording() and z.numel() == 0:
            raise ValueError(f"z must not be empty, got the shape {tuple(z.shape)}.")
        if is_exporting():  # ONNX knows no minimum and maximum of a whole tensor
            return ~z.isfinite().all()
        lowest, highest = z.detach().aminmax()
        nonfinite = ~(lowest.isfinite() & highest.isfinite())
        cheap = z.device.type == "cpu" and not self.owner_revives
        at_once = (wait or cheap or not self.training) and not is_recording()
        if at_once and bool(nonfinite):
            raise ValueError(NOT_FINITE)
        return nonfinite

    def _forward_masked(self, z: torch.Tensor, mask: torch.Tensor):
        """Quantize the positions where `mask` is True.

        They are joined to one sequence without padding, since at s = 1 positions do not depend on their neighbours.
        """
        quantized, loss, (perplexity, _, indices) = self.forward(self._masked(z, mask))
        if self.input_layout == "BCL":
            quantized = quantized.transpose(1, 2)
        quantized = self._unmask(quantized[0], mask, 0)
        if self.input_layout == "BCL":
            quantized = _channels_first(quantized)
        return quantized, loss, (perplexity, None, self._unmask(indices[0], mask, -1))

    def _masked(self, z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the positions of z where `mask` is True, joined to a batch of one sequence with the axes of z."""
        if self.spatial_axes == 2 or self.interpolation_factor > 1:
            raise ValueError(
                'mask is for input_layout="BCL" or "BLC" with interpolation_factor=1, got '
                f"input_layout={self.input_layout!r} with interpolation_factor={self.interpolation_factor}."
            )
        by_position = z if self.input_layout == "BLC" else z.movedim(1, -1)
        if mask.dtype != torch.bool or mask.shape != by_position.shape[:-1]:
            raise ValueError(
                f"mask must be bool of the shape {tuple(by_position.shape[:-1])}, got {mask.dtype} of "
                f"{tuple(mask.shape)}."
            )
        if not is_recording() and not mask.any():
            raise ValueError("mask must be True for at least one position.")
        kept = by_position[mask][None]
        return kept if self.input_layout == "BLC" else kept.transpose(1, 2)

    def _unmask(self, values: torch.Tensor, mask: torch.Tensor, fill: int) -> torch.Tensor:
        """Spread values (N, n) of the N positions where `mask` is True over (B, L, n), with `fill` elsewhere."""
        full = values.new_full((*mask.shape, values.shape[-1]), fill)
        return full.masked_scatter(mask[..., None], values)

    def _to_segments(self, z: torch.Tensor) -> torch.Tensor:
        """Interpolate and cut: (B, n_q, H, W) -> (B, H, W, C, d)."""
        if self.input_layout == "BLC":
            z = z.transpose(1, 2)
        s, axes = self.interpolation_factor, self.spatial_axes
        batch, channels, *size = z.shape
        if s > 1:
            mode = "bilinear" if axes == 2 else "linear"
            z = F.interpolate(z, scale_factor=float(s), mode=mode, align_corners=False)
        # (B, n_q, H, dy, W, dx), or (B, n_q, L, dx)
        z = z.reshape(batch, channels, *(part for length in size for part in (length, s)))
        positions, samples = range(2, 2 + 2 * axes, 2), range(3, 2 + 2 * axes, 2)
        if self.segment_layout == "channel":
            z = z.permute(0, *positions, *samples, 1)
        else:  # the channels of pixel_unshuffle
            z = z.permute(0, *positions, 1, *samples)
        return z.reshape(batch, *size, self.codes_per_position, self.codevector_dim)

    def _pool(self, segments: torch.Tensor) -> torch.Tensor:
        """(B, H, W, C, d) -> (B, H, W, n_q): the mean over a position's interpolated samples."""
        samples = self.interpolation_factor**self.spatial_axes
        values = segments.flatten(-2)
        if self.segment_layout == "channel":
            return values.unflatten(-1, (samples, self.vq_embed_dim)).mean(-2)
        return values.unflatten(-1, (self.vq_embed_dim, samples)).mean(-1)

    def _lookup(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the pooled codevectors (B, H, W, n_q) of indices (B, H, W, C), in little memory if d allows it."""
        samples, d = self.interpolation_factor**self.spatial_axes, self.codevector_dim
        if samples == 1:
            return F.embedding(indices, self.codebook).flatten(-2)
        if self.segment_layout == "channel":
            parts = indices.unflatten(-1, (samples, -1)).unbind(-2)  # each (B, H, W, m)
            total = F.embedding(parts[0], self.codebook)
            for part in parts[1:]:
                total = total + F.embedding(part, self.codebook)
            return (total / samples).flatten(-2)
        if d % samples == 0:  # whole channels in a codevector: pool the codebook instead
            return F.embedding(indices, self.codebook.unflatten(-1, (-1, samples)).mean(-1)).flatten(-2)
        if samples % d == 0:  # whole codevectors in a channel
            means = F.embedding(indices, self.codebook.mean(-1, keepdim=True)).flatten(-2)
            return means.unflatten(-1, (self.vq_embed_dim, -1)).mean(-1)
        return self._pool(F.embedding(indices, self.codebook))

    def _with_gradient(self, segments: torch.Tensor, indices: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
        """Return the pooled codevectors, (B, H, W, n_q), with a gradient for the segments."""
        if self.gradient == "rotation" and self.codevector_dim > 1:
            segments = Rotation.apply(segments, self.codebook.detach(), difference, indices)
        pooled = self._pool(segments)
        return self._lookup(indices).detach() + (pooled - pooled.detach())  # the parenthesis is exactly 0

    def _loss_in_chunks(self, vectors: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Return the loss of N vectors and their N indices, without a temporary of the size of `vectors`."""
        if is_recording():  # fused by the compiler
            squared = (F.embedding(chosen, self.codebook) - vectors).square().sum()
        else:
            size = max(1, chunk_elements(vectors.device) // self.codevector_dim)
            squared = sum(
                (F.embedding(indices, self.codebook) - part).square_().sum()
                for indices, part in zip(chosen.split(size), vectors.split(size), strict=True)
            )
        return (1 + self.commitment_weight) * squared / vectors.numel()

    def _like(self, quantized: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """Return quantized (B, H, W, n_q) with the axes and the dtype of z."""
        if self.input_layout != "BLC":
            quantized = _channels_first(quantized)
        return quantized.to(z.dtype)

    def extra_repr(self) -> str:
        return (
            f"vq_embed_dim={self.vq_embed_dim}, num_codevectors={self.num_codevectors}, "
            f"codevector_dim={self.codevector_dim}, interpolation_factor={self.interpolation_factor}, "
            f"segment_layout={self.segment_layout!r}, distance={self.distance!r}, anchor={self.anchor!r}, "
            f"codebook_update={self.codebook_update!r}, gradient={self.gradient!r}, input_layout={self.input_layout!r}"
        )


def _channels_first(z: torch.Tensor) -> torch.Tensor:
    """(B, H, W, n_q) -> (B, n_q, H, W), contiguous."""
    # Not movedim(-1, 1), whose negative axis gets into ONNX files of the older exporter, which no runtime takes.
    return z.permute(0, z.ndim - 1, *range(1, z.ndim - 1)).contiguous()
