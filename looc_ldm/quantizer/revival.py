"""Codebook updates: training forwards collect, `revive` reduces over ranks and applies.

A codevector is the moving average of the segments that choose it (VQ-VAE, appendix A.1), or follows the gradient of the
loss. In both cases a codevector that is hardly used is pulled towards a feature of the batch, its anchor (CVQ-VAE).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn as nn

from looc_ldm.quantizer.anchors import Anchors, better_anchors
from looc_ldm.quantizer.gradients import sum_by_codevector

NOT_FINITE = "z holds NaN or infinite values: no codevector is nearest to them."


class Collected(NamedTuple):
    """Results of training forwards that the next `revive` applies."""

    counts: torch.Tensor  # (K,) int64: how often each codevector was chosen
    nonfinite: torch.Tensor  # () bool: whether a feature map held values that are not finite
    difference_sums: torch.Tensor | None  # (K, d) float64: sum of c - z over the segments z that chose c; "ema" only
    anchors: Anchors | None


def merged(first: Collected | None, second: Collected) -> Collected:
    """Merge the results of two forwards into the result of one forward over all their segments."""
    if first is None:
        return second
    return Collected(
        first.counts + second.counts,
        first.nonfinite | second.nonfinite,
        None if second.difference_sums is None else first.difference_sums + second.difference_sums,
        None if second.anchors is None else better_anchors(first.anchors, second.anchors),
    )


def reduce_over_ranks(collected: Collected) -> Collected:
    """Sum counts and differences and keep the best anchors of all ranks: O(K d) traffic. Collective."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return collected
    counts, nonfinite, difference_sums, anchors = collected
    counts = torch.cat([counts, nonfinite.long()[None]])
    dist.all_reduce(counts)
    counts, nonfinite = counts[:-1], counts[-1] > 0
    if difference_sums is not None:
        difference_sums = difference_sums.clone()
        dist.all_reduce(difference_sums)
    if anchors is not None:
        mine = torch.cat([anchors.score[:, None], anchors.vector], dim=1)  # (K, 1 + d)
        gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, mine)
        anchors = None
        for candidates in gathered:  # in the order of ranks, so that ties go to the lowest
            anchors = better_anchors(anchors, Anchors(candidates[:, 0], candidates[:, 1:]))
    return Collected(counts, nonfinite, difference_sums, anchors)


class Codebook(nn.Embedding):
    """An embedding that returns all its vectors, (K, d), if it is called without indices.

    Offloading hooks bring weights to the device when a module is called, not when its weight is read.
    """

    def forward(self, indices: torch.Tensor | None = None) -> torch.Tensor:
        # A view keeps the vectors alive after a hook has taken the weight back.
        return self.weight.view_as(self.weight) if indices is None else super().forward(indices)


class RevivedCodebook(nn.Module):
    """Base of `LooCQuantizer`: its codebook, the usage of each codevector, and their update."""

    def __init__(self, num_codevectors: int, codevector_dim: int, usage_decay: float, codebook_update: str):
        super().__init__()
        self.num_codevectors = num_codevectors
        self.codevector_dim = codevector_dim
        self.usage_decay = usage_decay
        self.codebook_update = codebook_update
        self.embedding = Codebook(num_codevectors, codevector_dim, dtype=torch.float32)
        nn.init.uniform_(self.embedding.weight, -1 / num_codevectors, 1 / num_codevectors)
        self.register_buffer("usage", torch.zeros(num_codevectors, dtype=torch.float32))
        self.owner_revives = False
        # Plain attributes, not buffers: DDP broadcasts buffers of rank 0 at each forward and would overwrite what the
        # other ranks have collected since the last optimizer step.
        self._collected: Collected | None = None
        self._collected_before_backward = False
        self._revive_called = False
        self._codebook_version: int | None = None
        self._nonfinite: torch.Tensor | None = None

    @property
    def codebook(self) -> torch.Tensor:
        """The codevectors, (K, d), float32."""
        return self.embedding()

    @property
    def learns(self) -> bool:
        """Whether training changes codebook and usage: in train mode, if `embedding.weight` requires a gradient.

        So `eval()` freezes both, and so does `requires_grad_(False)` of the quantizer, of `embedding`, or of any module
        around it (peft calls it for adapters). This holds for `codebook_update="ema"` too: there the codebook uses no
        gradient, and `requires_grad` serves only as this switch.
        """
        return self.training and self.embedding.weight.requires_grad

    def revive(self) -> None:
        """Update usage and codebook by what training forwards have collected since the last call.

        With `codebook_update="ema"` each codevector moves to the weighted average of all segments that ever chose it. A
        segment of n calls ago has the weight usage_decay**n. Then, unless `anchor` is `"none"`, codevectors that are
        hardly used are pulled towards the features that the anchor strategy has picked (CVQ-VAE's update):
        c_k <- (1 - alpha_k) c_k + alpha_k a_k with alpha_k = exp(-10 K N_k / (1 - gamma) - 0.001) and a_k the anchor.

        The published rule is `codebook_update="gradient"` with a call right after each forward. A call once per
        optimizer step also works with gradient accumulation. If `torch.distributed` runs, this is a collective: every
        rank must have run a training forward and must call it. All ranks then hold the codebook that one process would
        have computed from the features of all ranks. (Randomly drawn anchors agree in distribution only.)

        If nobody has ever called `revive`, a training forward first applies what earlier forwards have collected, and
        that forward is then the collective. Training loops that accumulate gradients set `owner_revives` before their
        first step. With CUDA graphs (`torch.compile(mode="reduce-overhead")`), call `revive` after each forward. While
        `learns` is False, `revive` only discards what was collected.
        """
        self._revive_called = True
        if not self.learns:
            self.discard()
        if self._collected is not None:
            self._update()

    def discard(self) -> None:
        """Forget what the forwards since the last `revive` collected: for a step whose gradients are not applied."""
        self._collected, self._collected_before_backward = None, False

    def check_finite(self) -> None:
        """Raise if a training forward before the last `revive` got values that are not finite. Waits for the device.

        Training on an accelerator does not stop at such values: the step leaves codebook and usage unchanged. Call this
        when you wait for the device anyway, for example to log. All ranks raise together.

        Raises:
            ValueError: A feature map held NaN or infinite values.
        """
        if self._nonfinite is not None and bool(self._nonfinite):
            self._nonfinite = None
            raise ValueError(NOT_FINITE)

    def _begin_forward(self) -> bool:
        """Return whether this forward collects. If nobody calls `revive`, first apply what was collected before."""
        # Activation checkpointing repeats a forward during backward; the batch must not be collected twice. Reentrant
        # checkpointing runs the first forward without gradients, so there the repetition collects.
        repeated = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        collects = self.learns and torch.is_grad_enabled() and not (repeated and self._collected_before_backward)
        if self.learns and not repeated:
            if self._collected is not None and not (self.owner_revives or self._revive_called):
                self._update()
            self._collected_before_backward = collects or self._collected_before_backward
        if not torch.compiler.is_compiling():
            version = self.embedding.weight._version
            if not repeated:
                self._codebook_version = version
            elif self.learns and version != self._codebook_version:
                raise RuntimeError(
                    "The codebook has changed between a forward and its repetition under activation checkpointing: "
                    "call revive() after backward, once per optimizer step."
                )
        return collects

    def _collect(
        self,
        counts: torch.Tensor,
        nonfinite: torch.Tensor,
        difference: torch.Tensor,
        indices: torch.Tensor,
        anchors: Anchors | None,
    ) -> None:
        sums = None
        if self.codebook_update == "ema":
            # In float64, so that the codebook does not depend on how features are spread over steps and ranks: if
            # two codevectors are almost equally near, a float32 rounding difference would change the choice.
            wide = torch.float64 if difference.device.type in ("cpu", "cuda") else torch.float32
            sums = sum_by_codevector(difference, indices, self.num_codevectors, wide)
        self._collected = merged(self._collected, Collected(counts, nonfinite, sums, anchors))

    @torch.no_grad()
    def _update(self) -> None:
        counts, nonfinite, difference_sums, anchors = reduce_over_ranks(self._collected)
        self.discard()
        # A clone: under CUDA graphs the next replay overwrites the tensors of the last forward.
        self._nonfinite = nonfinite.clone() if self._nonfinite is None else self._nonfinite | nonfinite
        # A step with values that are not finite changes nothing; the device decides, so that nobody waits for it.
        rate = torch.where(nonfinite, 0.0, 1 - self.usage_decay)
        share = (counts / counts.sum()).to(self.usage.dtype)
        self.usage.lerp_(share, rate)
        codebook = self.embedding.weight
        if difference_sums is not None:
            # Merge the average of earlier segments, of weight N_k, with the segments of this step.
            weight = rate / counts.sum() / self.usage.clamp_min(torch.finfo(self.usage.dtype).tiny)
            codebook = (codebook - weight[:, None] * difference_sums).to(codebook.dtype)
        if anchors is not None:
            alpha = torch.exp(-10 * self.num_codevectors * self.usage / (1 - self.usage_decay) - 1e-3)
            codebook = codebook.lerp(anchors.vector, alpha[:, None])
        self.embedding.weight.copy_(torch.where(nonfinite, self.embedding.weight, codebook))

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        codebook = state_dict.get(f"{prefix}embedding.weight")
        if codebook is not None and f"{prefix}usage" not in state_dict:
            # Saved by a different vector quantizer: its codevectors must not count as unused.
            state_dict[f"{prefix}usage"] = torch.full_like(codebook[:, 0], 1 / len(codebook))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.discard()

    def _apply(self, fn, recurse: bool = True):
        """Follow `.to(device)`, but not `.half()` or `.to(dtype)`: codebook and usage stay float32."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)
        if self._collected is not None and self._collected.counts.device != self.usage.device:
            self.discard()  # collected on the previous device
            self._nonfinite = None
        return self
