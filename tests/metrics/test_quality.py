"""PSNR and SSIM of each image are scikit-image's, and L1 is the mean absolute error."""

import math

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from looc_ldm.metrics import l1, psnr, ssim

SSIM_SETTINGS = {  # scikit-image's
    "gaussian": {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False},
    "uniform": {"win_size": 11},
}


@pytest.fixture(params=[(3, (37, 52), 0.05), (1, (28, 28), 0.2), (3, (11, 40), 0.001)], ids=str)
def pair(request) -> tuple[torch.Tensor, torch.Tensor]:
    """Return smooth images in [0, 1], some of it saturated as skies are, and noisy copies."""
    channels, size, error = request.param
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(4, channels, 6, 6, generator=generator)
    x = (torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(-1, 1) + 1) / 2
    return x, (x + error * torch.randn(x.shape, generator=generator)).clamp(0, 1)


def test_psnr_is_scikit_images(pair):
    images = zip(*(images.double().numpy() for images in pair), strict=True)
    expected = [peak_signal_noise_ratio(x, y, data_range=1) for x, y in images]
    assert psnr(*pair).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("window", SSIM_SETTINGS)
def test_ssim_is_scikit_images(pair, window):
    images = zip(*(images.double().numpy() for images in pair), strict=True)
    expected = [structural_similarity(x, y, data_range=1, channel_axis=0, **SSIM_SETTINGS[window]) for x, y in images]
    assert ssim(*pair, window).tolist() == pytest.approx(expected, abs=1e-9)


def test_l1_is_the_mean_absolute_error_of_each_image():
    x = torch.rand(2, 3, 5, 7)
    y = torch.stack([x[0], 1 - x[1]])
    assert l1(x, y).tolist() == pytest.approx([0, (2 * x[1] - 1).abs().mean().item()])
    assert l1(x, y).dtype == torch.float64


def test_identical_images_have_infinite_psnr_and_ssim_one():
    x = torch.rand(2, 3, 16, 16)
    assert psnr(x, x).tolist() == [math.inf] * 2
    for window in SSIM_SETTINGS:
        assert ssim(x, x, window).tolist() == pytest.approx([1, 1], abs=1e-12)


def test_images_that_cannot_be_measured_are_refused():
    x = torch.rand(1, 3, 16, 10)
    with pytest.raises(ValueError, match="at least 11x11, got 16x10"):
        ssim(x, x)
    with pytest.raises(ValueError, match="one of gaussian, uniform, got 'box'"):
        ssim(x, x, "box")
    for measure in (psnr, ssim, l1):
        with pytest.raises(ValueError, match=r"one shape.*\(1, 3, 16, 10\) and \(1, 1, 16, 10\)"):
            measure(x, x[:, :1])
        with pytest.raises(ValueError, match=r"reconstructions must be floats in \[0, 1\], got torch\.float32 from"):
            measure(x, x - 1)
        with pytest.raises(ValueError, match=r"torch\.uint8"):
            measure(x.byte(), x.byte())
