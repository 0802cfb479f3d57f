"""Figures of the codebook: how it is used, by which segments, and where its codevectors lie among the features."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from looc_ldm.analysis.collect import Findings
from looc_ldm.analysis.style import BLUE, RED, SKY, Drawing, new_figure, style

MOST_CODES = 1024  # codevectors in the embedding
MOST_BARS = 64  # bars of a histogram, and segments that are drawn as bars
MOST_CELLS = 512  # cells along each side of the map of segments and codevectors
PERPLEXITY = 30  # t-SNE's: about the number of neighbours of a point
FEWEST = 5  # distinct points that t-SNE needs


def draw_use(findings: Findings) -> Drawing:
    """Draw each codevector's share of all codes, from the most to the least used."""
    statistics = findings.statistics
    counts = statistics.counts.sum(0)
    codebook_size, dead = len(counts), len(statistics.dead)
    shares = (counts.sort(descending=True).values.double() / counts.sum()).numpy()
    live = shares[: codebook_size - dead]
    with style():
        figure = new_figure(2.7)
        axes = figure.subplots()
        edges = np.arange(len(live) + 1) + 0.5
        axes.stairs(live, edges, baseline=live.min() / 2, fill=True, color=SKY, alpha=0.5)
        axes.stairs(live, edges, baseline=None, color=BLUE, linewidth=1.2)
        axes.axhline(1 / codebook_size, color="black", linewidth=0.9, linestyle="--", label="equal use, 1 / K")
        if dead:
            axes.axvspan(len(live) + 0.5, codebook_size + 0.5, color=RED, alpha=0.15, linewidth=0, label="never used")
        top = max(live.max(), 1 / codebook_size)
        axes.set(
            yscale="log",
            xlim=(0.5, codebook_size + 0.5),
            ylim=(live.min() / 1.6, top * 1.8),
            xlabel="codevectors, from the most to the least used",
            ylabel="share of all codes",
        )
        _whole_numbers(axes.xaxis)
        axes.grid(axis="y")
        figure.legend(loc="outside lower center", ncols=2)
        axes.set_title(
            f"{statistics.use:.1%} of K = {codebook_size:,} used · perplexity {statistics.perplexity:,.1f} · "
            f"{dead:,} dead"
        )
    caption = (
        f"Share of each codevector in the {int(counts.sum()):,} codes of {findings.images:,} images. Dead codevectors "
        "were never chosen. Perplexity: exp of the entropy of these shares, at most K."
    )
    return Drawing("codebook_use", "Use of the codebook", caption, figure)


def draw_segment_use(findings: Findings) -> Drawing:
    """Draw figure 7 of the paper: the share of the codebook that each segment uses."""
    counts = findings.statistics.counts
    segments, codebook_size = counts.shape
    use = 100 * findings.statistics.segment_use.numpy()
    perplexity = 100 * segment_perplexity(counts).numpy() / codebook_size
    with style():
        figure = new_figure(2.7)
        axes = figure.subplots()
        number = np.arange(segments)
        used = f"used at least once, % of K = {codebook_size:,}"
        axes.bar(number, use, width=0.8 * min(1, (1 + segments) / 10), color=SKY, label=used)
        size = 5 if segments <= MOST_BARS else 2
        axes.plot(number, perplexity, "o", color=RED, markersize=size, label="perplexity, % of K", clip_on=False)
        axes.set(
            xlim=(-0.6, segments - 0.4),
            ylim=(0, 100 if use.max() > 60 else 1.2 * use.max()),
            xlabel="segment",
            ylabel="share of the codebook (%)",
        )
        _whole_numbers(axes.xaxis)
        axes.grid(axis="y")
        figure.legend(loc="outside lower center", ncols=2)
        axes.set_title(f"{segments:,} segments, using {use.min():.3g} to {use.max():.3g} % of the codebook")
    d = findings.codebook.shape[1]
    place = f"channels {d} i to {d} i + {d - 1} of the latents"
    place = place if findings.segment_layout == "channel" else f"{place} after unshuffling (layout patch)"
    caption = (
        "Share of the codevectors that each segment chose at least once, and perplexity of its codes "
        f"(paper, figure 7), from {int(counts[0].sum()):,} codes per segment. Segment i: {place}."
    )
    return Drawing("segment_use", "Use by each segment", caption, figure)


def draw_sharing(findings: Findings) -> Drawing:
    """Draw figure 8 of the paper, how many segments share a codevector, and which segments use which."""
    statistics = findings.statistics
    segments, codebook_size = statistics.counts.shape
    sharing = statistics.segments_per_codevector.numpy()
    with style():
        from matplotlib.colors import LogNorm

        figure = new_figure(2.9)
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.25))
        step = math.ceil((segments + 1) / MOST_BARS)
        edges = np.arange(0, segments + step + 1, step) - 0.5
        left.hist(sharing, edges, color=SKY, rwidth=0.8)
        left.set(xlim=(-0.6, edges[-1] + 0.1), xlabel="segments that use a codevector", ylabel="codevectors")
        _whole_numbers(left.xaxis)
        _whole_numbers(left.yaxis)
        left.grid(axis="y")
        left.set_title(f"median: {np.median(sharing):g} of {segments:,}")

        order = statistics.counts.sum(0).argsort(descending=True, stable=True)
        shares = statistics.counts[:, order].double() / statistics.counts.sum(1, keepdim=True).clamp_min(1)
        cells = _pooled(shares)
        lowest = cells[cells > 0].min()
        drawn = right.imshow(
            np.ma.masked_equal(cells, 0),
            aspect="auto",
            cmap="viridis",
            norm=LogNorm(lowest if lowest < cells.max() else lowest / 10, cells.max()),
            extent=(0.5, codebook_size + 0.5, segments - 0.5, -0.5),
            interpolation="nearest",
        )
        right.set(xlabel="codevectors, most used first", ylabel="segment", facecolor="white")
        _whole_numbers(right.yaxis)
        _whole_numbers(right.xaxis)
        right.spines[:].set_visible(True)
        right.set_title("share of a segment's codes")
        figure.colorbar(drawn, ax=right, pad=0.02)
    everywhere = int((sharing == segments).sum())
    caption = (
        f"Left: codevectors by the number of segments that use them (paper, figure 8); {everywhere:,} of "
        f"{codebook_size:,} are used by every segment. Right: share of each codevector in the codes of each segment; "
        "white is never. In a large codebook each cell is a mean of neighbours."
    )
    return Drawing("code_sharing", "Codevectors shared by segments", caption, figure)


def draw_embedding(findings: Findings, seed: int) -> Drawing:
    """Draw figure 5 of the paper: t-SNE of codevectors and features."""
    codebook_size, d = findings.codebook.shape
    counts = findings.statistics.counts.sum(0)
    by_use = counts.argsort(descending=True, stable=True).numpy()
    shown = by_use[np.linspace(0, codebook_size - 1, min(codebook_size, MOST_CODES)).round().astype(int)]
    vectors = findings.sample.vectors
    codes, features, how = in_the_plane(findings.codebook[shown], vectors, findings.distance, seed)
    live = (counts > 0).numpy()[shown]
    with style():
        figure = new_figure(4.6, width=5.2)
        axes = figure.subplots()
        dots = {"rasterized": True, "linestyle": "none"}
        label = f"{len(features):,} features"
        axes.plot(*features.T, marker=".", color=SKY, alpha=0.6, ms=3, markeredgewidth=0, label=label, **dots)
        dots["markersize"] = 5 if len(shown) <= 300 else 2.8
        label = f"{live.sum():,} codevectors in use"
        axes.plot(*codes[live].T, marker="o", color=RED, mec="white", markeredgewidth=0.4, label=label, **dots)
        if not live.all():
            label = f"{(~live).sum():,} dead"
            axes.plot(*codes[~live].T, marker="x", color="black", markeredgewidth=0.9, label=label, **dots)
        if how == "t-SNE":
            axes.set(xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2")
        else:
            axes.set(xlabel="component 1", ylabel="component 2")
        axes.set_aspect("equal", adjustable="datalim")
        axes.spines[:].set_visible(True)
        axes.spines[:].set_color("0.7")
        figure.legend(loc="outside lower center", ncols=3, handletextpad=0.2, markerscale=1.5)
        what = "directions" if findings.distance == "cosine" else "vectors"
        axes.set_title(f"{how} of {what}, d = {d}" if how == "t-SNE" else f"{what.capitalize()}, d = {d}")
    caption = (
        f"{len(shown):,} of {codebook_size:,} codevectors, and {len(features):,} segments of features before "
        f"quantization, drawn at random (paper, figure 5). Embedded: their {what}. A codebook that fits lies where the "
        "features are."
    )
    return Drawing("embedding", "Codevectors among features", caption, figure)


def in_the_plane(
    codevectors: torch.Tensor, vectors: torch.Tensor, distance: str, seed: int
) -> tuple[np.ndarray, np.ndarray, str]:
    """Embed codevectors `(K, d)` and segments of features `(V, d)` in the plane by t-SNE.

    Under cosine distance their directions are embedded. On one machine, the same seed gives the same picture.

    Returns:
        `(K, 2)`, `(V, 2)`, and the method: "t-SNE", or "components" for vectors of fewer than three dimensions, which
        are returned as they are (the second component is 0 if there is only one).
    """
    points = torch.cat([codevectors, vectors]).float()
    if distance == "cosine":
        points = F.normalize(points, dim=1)
    points = points.numpy()
    distinct, place = np.unique(points, axis=0, return_inverse=True)
    place = place.reshape(-1)
    if points.shape[1] < 3 or len(distinct) < FEWEST:
        flat, how = np.pad(points, ((0, 0), (0, 1)))[:, :2], "components"
    else:
        flat, how = _tsne(distinct, seed)[place], "t-SNE"  # equal points are one
    return flat[: len(codevectors)], flat[len(codevectors) :], how


def _tsne(points: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(PERPLEXITY, (len(points) - 1) / 3)
    with threadpool_limits(1):  # several threads add up in any order, and small differences grow
        return TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(points)


def segment_perplexity(counts: torch.Tensor) -> torch.Tensor:
    """Return the perplexity of each segment's codes, in [1, K], from counts `(segments, K)`."""
    share = counts.double() / counts.sum(1, keepdim=True)
    return torch.special.entr(share).sum(1).exp()


def _pooled(shares: torch.Tensor) -> np.ndarray:
    """Average neighbours so that neither side is longer than MOST_CELLS."""
    size = [min(length, MOST_CELLS) for length in shares.shape]
    return F.adaptive_avg_pool2d(shares[None], size)[0].numpy()


def _whole_numbers(axis) -> None:
    """Put ticks at whole numbers."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1))
    axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
