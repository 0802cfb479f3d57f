"""JPEG and WebP beside models: what their files cost, and what is kept."""

import io

import numpy as np
import PIL.Image
import pytest
import torch
from matplotlib.figure import Figure
from skimage.metrics import peak_signal_noise_ratio

from looc_ldm.analysis.rate_distortion import CODECS, ModelPoint, Point, codec_curve, draw_rate_distortion


@pytest.fixture
def textures() -> list[torch.Tensor]:
    """Three small images that compress neither to nothing nor not at all."""
    values = torch.randn(3, 3, 24, 32, generator=torch.Generator().manual_seed(0)).cumsum(2).cumsum(3)
    low, high = values.amin((1, 2, 3), keepdim=True), values.amax((1, 2, 3), keepdim=True)
    return list(((values - low) / (high - low) * 255).byte())


def stored(image: torch.Tensor, codec: str, quality: int) -> bytes:
    pixels = image.permute(1, 2, 0).numpy()
    file = io.BytesIO()
    PIL.Image.fromarray(pixels.squeeze()).save(file, codec, quality=quality, optimize=codec == "jpeg")
    return file.getvalue()


@pytest.mark.parametrize("codec", CODECS)
def test_the_rate_is_that_of_whole_files_and_the_distortion_that_of_what_they_hold(codec, textures):
    (point,) = codec_curve(textures, codec, [60])
    files = [stored(image, codec, 60) for image in textures]
    assert point.bits_per_pixel == 8 * sum(map(len, files)) / (3 * 24 * 32)
    decoded = [np.asarray(PIL.Image.open(io.BytesIO(file))) for file in files]
    expected = [
        peak_signal_noise_ratio(image.permute(1, 2, 0).numpy(), back)
        for image, back in zip(textures, decoded, strict=True)
    ]
    assert point.psnr == pytest.approx(np.mean(expected), rel=1e-5)


def test_a_grey_image_is_a_grey_jpeg_and_is_compared_in_grey(textures):
    grey = [image[:1] for image in textures]
    for codec in CODECS:
        (point,) = codec_curve(grey, codec, [90])
        assert point.psnr > 25
    (jpeg,) = codec_curve(grey, "jpeg", [90])
    assert jpeg.bits_per_pixel == 8 * sum(len(stored(image, "jpeg", 90)) for image in grey) / (3 * 24 * 32)
    (coloured,) = codec_curve([image.expand(3, -1, -1) for image in grey], "jpeg", [90])
    assert jpeg.bits_per_pixel < coloured.bits_per_pixel


def test_an_exact_reconstruction_leaves_the_mean_finite(textures):
    flat = torch.full((1, 16, 16), 128, dtype=torch.uint8)
    (point,) = codec_curve([flat], "jpeg", [95])
    assert (point.psnr, point.ssim) == (100, 1)


def test_the_protocol_of_the_paper_measures_codecs_through_its_jpeg_as_it_does_models(textures):
    image = textures[0]
    (point,) = codec_curve([image], "webp", [80], protocol="paper")
    back = torch.from_numpy(np.array(PIL.Image.open(io.BytesIO(stored(image, "webp", 80))))).permute(2, 0, 1)
    pair = [np.asarray(PIL.Image.open(io.BytesIO(stored(x, "jpeg", 75)))) for x in (image, back)]
    # Truncation to 8 bits moves some values of both by one before the JPEG.
    assert point.psnr == pytest.approx(peak_signal_noise_ratio(*pair), abs=0.5)
    assert point.psnr != pytest.approx(codec_curve([image], "webp", [80])[0].psnr, abs=0.5)


def test_no_images_and_too_small_ones_are_refused():
    with pytest.raises(ValueError, match="no images"):
        codec_curve([], "jpeg")
    with pytest.raises(ValueError, match="at least 11x11"):
        codec_curve([torch.zeros(3, 8, 8, dtype=torch.uint8)], "jpeg")


def test_the_drawing_has_every_codec_and_every_model_that_was_measured_by_its_own_name():
    axes = Figure().subplots()
    curve = [Point(10, 1.0, 25.0, 0.7), Point(90, 4.0, 40.0, 0.99)]
    models = [ModelPoint("_a", 0.5, 20.0, 0.5), ModelPoint("$b$", 1.0, 22.0), ModelPoint("c", 2.0, ssim=0.8)]
    draw_rate_distortion(axes, {"jpeg": curve, "webp": curve}, models)
    handles, labels = axes.get_legend_handles_labels()
    assert [label.strip() for label in labels] == ["JPEG", "WebP", "_a", r"\$b\$"]
    assert [tuple(handle.get_xydata()[0]) for handle in handles[2:]] == [(0.5, 20.0), (1.0, 22.0)]
    assert (axes.get_xscale(), axes.get_xlabel(), axes.get_ylabel()) == ("log", "bits per pixel", "PSNR (dB)")
