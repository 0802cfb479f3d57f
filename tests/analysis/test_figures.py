"""Figures show what was found, for any quantizer, and their words are text."""

import io
import re
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
from PIL import Image

from looc_ldm import LooCVQModel
from looc_ldm.analysis import collect as module
from looc_ldm.analysis import image_figures
from looc_ldm.analysis.codebook_figures import draw_embedding, draw_segment_use, draw_sharing, in_the_plane
from looc_ldm.analysis.collect import Findings, collect
from looc_ldm.analysis.image_figures import draw_error_map, draw_rate
from looc_ldm.analysis.page import analyze, page
from looc_ldm.analysis.rate_distortion import QUALITIES
from looc_ldm.images.pixels import to_float
from tiny import noise, tiny_autoencoder


@pytest.fixture(autouse=True)
def few_vectors(monkeypatch):
    monkeypatch.setattr(module, "MOST_VECTORS", 40)


model_with = partial(tiny_autoencoder, channels=1, vq_embed_dim=8, codevector_dim=4)  # two segments


def found_in(model: LooCVQModel, images: torch.Tensor) -> Findings:
    return collect(model, [to_float(images)], len(images))


def words(svg: bytes) -> list[str]:
    return [re.sub("<[^>]*>", "", text) for text in re.findall(r"<text.*?</text>", svg.decode(), re.DOTALL)]


# For any quantizer ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error:.*layout:UserWarning", "error::RuntimeWarning")  # matplotlib and NumPy
@pytest.mark.parametrize(
    ("count", "channels", "settings"),
    [
        (3, 3, {"interpolation_factor": 2, "segment_layout": "patch"}),
        (2, 1, {"codevector_dim": 8}),  # one segment
        (1, 1, {"vq_embed_dim": 512, "codevector_dim": 1, "distance": "euclidean", "num_vq_embeddings": 1100}),
    ],
)
def test_every_figure_is_drawn(count, channels, settings):
    images = noise(count, channels)
    model = model_with(channels=channels, **settings)
    drawings, figures = analyze(found_in(model, images))
    assert len({drawing.name for drawing in drawings}) == (7 if figures["segments"] > 1 else 5)
    for drawing in drawings:
        assert np.asarray(Image.open(io.BytesIO(drawing.png())).convert("L")).std() > 0
        assert drawing.caption
    assert figures["images"] == count


@pytest.mark.filterwarnings("error:.*layout:UserWarning", "error::RuntimeWarning")  # matplotlib and NumPy
def test_a_dead_codebook_and_images_of_one_grey_are_drawn_as_what_they_are():
    model, images = model_with(), torch.full((2, 1, 8, 8), 99, dtype=torch.uint8)  # smaller than the window of SSIM
    nn.init.zeros_(model.quantize.embedding.weight)
    drawings, figures = analyze(found_in(model, images))
    assert len(drawings) == 7
    assert all(drawing.png() for drawing in drawings)
    assert figures["codebook_use"] == 1 / 16
    assert figures["dead"] == list(range(1, 16))
    assert figures["bits_per_pixel_entropy"] == 0
    assert figures["rate_distortion"]["codecs"] == {}


# Contents --------------------------------------------------------------------------------------------------------


def test_bars_are_the_use_of_segments_and_the_sharing_of_codevectors_and_errors_lie_at_their_pixels():
    findings = found_in(model_with(), noise(2))
    (axes,) = draw_segment_use(findings).figure.axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx((100 * findings.statistics.segment_use).tolist())
    left, *_ = draw_sharing(findings).figure.axes
    bars = [bar.get_height() for bar in left.patches]
    assert bars == torch.bincount(findings.statistics.segments_per_codevector, minlength=3).tolist()
    axes = draw_error_map(findings).figure.axes[0]
    assert np.array_equal(axes.images[0].get_array(), findings.error_map)
    assert axes.images[0].get_extent() == [0, 16, 16, 0]


def test_the_model_stands_at_its_two_rates_beside_codecs_on_the_same_images():
    images, model = noise(2), model_with()
    findings = found_in(model, images)
    _, figures = analyze(findings)
    compared = figures["rate_distortion"]
    assert compared["images"] == 2
    assert compared["psnr"] == pytest.approx(findings.psnr)
    assert compared["bits_per_pixel"] == 2 * 8 * 8 * 4 / 16**2
    assert compared["bits_per_pixel_entropy"] == pytest.approx(findings.bits_per_pixel_entropy)
    assert [len(points) for points in compared["codecs"].values()] == [len(QUALITIES)] * 2
    drawn = draw_rate({**compared, "codecs": {}}).figure.axes[0]
    places = {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0]) for line in drawn.lines}
    assert places["model, log2 K bits per code"] == (compared["bits_per_pixel"], compared["psnr"])
    assert places["model, entropy-coded"] == (compared["bits_per_pixel_entropy"], compared["psnr"])


def test_codecs_get_images_from_all_of_the_data_not_from_its_first_class(monkeypatch):
    monkeypatch.setattr(image_figures, "MOST_CODED", 3)
    findings = found_in(model_with(), noise(9))
    compared = image_figures.compared_with_codecs(findings)
    assert [psnr for _, psnr in compared["by_image"]] == findings.sample.psnr[[0, 4, 8]].tolist()


def test_one_seed_gives_one_embedding_of_directions_or_vectors():
    torch.manual_seed(0)
    codes, vectors = torch.randn(12, 4), torch.randn(40, 4)
    first, again = (in_the_plane(codes, vectors, "euclidean", seed=0) for _ in range(2))
    assert first[2] == "t-SNE"
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert first[0].shape == (12, 2)
    assert first[1].shape == (40, 2)

    # Under cosine distance directions are embedded.
    near = [in_the_plane(length * codes, vectors, "cosine", 0)[0] for length in (1.0, 4.0)]  # exact in float32
    assert np.array_equal(*near)
    far = [in_the_plane(length * codes, vectors, "euclidean", 0)[0] for length in (1.0, 4.0)]
    assert not np.allclose(*far)


def test_codevectors_lie_among_the_features_that_choose_them():
    torch.manual_seed(0)
    codes = 20 * torch.eye(4)
    vectors = codes.repeat_interleave(25, 0) + torch.randn(100, 4)
    places, features, _ = in_the_plane(codes, vectors, "euclidean", 0)
    nearest = np.linalg.norm(features[:, None] - places[None], axis=-1).argmin(1)
    assert np.array_equal(nearest, np.repeat(range(4), 25))


def test_two_channels_need_no_embedding():
    codes, vectors = torch.randn(5, 2), torch.randn(9, 2)
    places, features, how = in_the_plane(codes, vectors, "euclidean", 0)
    assert how == "components"
    assert np.array_equal(places, codes.numpy())
    assert np.array_equal(features, vectors.numpy())


def test_dead_codevectors_are_told_from_the_others():
    findings = found_in(model_with(num_vq_embeddings=64), noise(1))
    dead = len(findings.statistics.dead)
    text = words(draw_embedding(findings, seed=0).svg())
    assert {f"{dead} dead", f"{64 - dead} codevectors in use"} <= set(text)


# The page -------------------------------------------------------------------------------------------------------------


def test_the_page_holds_everything_and_asks_for_nothing():
    images, model = noise(2), model_with()
    drawings, figures = analyze(found_in(model, images))
    html = page(drawings, figures, "mine & <yours>", "folder", "looc-ldm analyze MODEL --data 'a <b>'")
    assert len(re.findall(r'<img alt="[^"]+" src="data:image/svg\+xml;base64,', html)) == html.count("<img") == 7
    assert not re.search(r"<link|<script|href=", html)
    assert "Inside mine &amp; &lt;yours&gt;" in html
    assert "a &lt;b&gt;" in html
    for drawing in drawings:
        assert f"<h2>{drawing.title}</h2>" in html
