"""SSIM of both windows is scikit-image's, and L1 is the mean absolute error."""

import pytest
import torch
from skimage.metrics import structural_similarity

from looc_ldm.metrics import l1, ssim


def pair(channels: int, size: tuple[int, int], error: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(3, channels, 6, 6, generator=generator)
    x = torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1)
    return x, (x + error * torch.randn(x.shape, generator=generator)).clamp(0, 1)


@pytest.mark.parametrize(("channels", "size", "error"), [(3, (37, 52), 0.05), (1, (28, 28), 0.2), (3, (11, 40), 0.001)])
def test_uniform_windows_are_those_of_scikit_images_default(channels, size, error):
    x, y = pair(channels, size, error)
    expected = [
        structural_similarity(a, b, win_size=11, data_range=1, channel_axis=0)
        for a, b in zip(x.double().numpy(), y.double().numpy(), strict=True)
    ]
    assert ssim(x, y, "uniform").tolist() == pytest.approx(expected, abs=1e-9)
    assert ssim(x, y).tolist() != pytest.approx(expected, abs=1e-5)
    assert ssim(x, x, "uniform").tolist() == pytest.approx([1, 1, 1], abs=1e-12)


def test_another_window_is_refused():
    x = torch.rand(1, 3, 16, 16)
    with pytest.raises(ValueError, match="one of gaussian, uniform, got 'box'"):
        ssim(x, x, "box")


def test_l1_is_the_mean_absolute_error_of_each_image():
    x = torch.rand(2, 3, 5, 7)
    y = torch.stack([x[0], 1 - x[1]])
    assert l1(x, y).tolist() == pytest.approx([0, (2 * x[1] - 1).abs().mean().item()])
    assert l1(x, y).dtype == torch.float64
    with pytest.raises(ValueError, match=r"reconstructions must be floats in \[0, 1\]"):
        l1(x, y - 1)
