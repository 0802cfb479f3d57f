"""`clean` leaves images alone; `paper` does what the authors' scripts do, re-computed here as these do it."""

from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from looc_ldm.metrics import psnr, ssim
from looc_ldm.metrics.protocols import get_protocol


def photos(count: int = 3, channels: int = 3, size: tuple[int, int] = (37, 50), seed: int = 0) -> torch.Tensor:
    """Smooth random images with some noise, beyond [-1, 1] here and there, as decoders give them."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, channels, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size, mode="bicubic")
    return smooth + 0.05 * torch.randn(smooth.shape, generator=generator)


def stored(image: torch.Tensor, file: Path) -> np.ndarray:
    """An image as the authors' scripts store it as a JPEG and read it again, uint8 `(H, W, 3)`."""
    array = ((image + 1.0) / 2.0).clamp(0, 1).numpy()
    if len(array) == 1:
        array = np.tile(array, (3, 1, 1))
    imageio.imwrite(file, (np.transpose(array, (1, 2, 0)) * 255).astype(np.uint8))
    return np.asarray(imageio.imread(file))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_papers_figures_are_those_of_its_scripts(channels, tmp_path):
    protocol = get_protocol("paper")
    originals = photos(channels=channels)
    reconstructions = originals + 0.1 * photos(channels=channels, seed=1)
    files = [
        [stored(image, tmp_path / f"{side}_{i}.jpg") for i, image in enumerate(images)]
        for side, images in enumerate((originals, reconstructions))
    ]
    views = [protocol.view(images) for images in (originals, reconstructions)]
    for view, arrays in zip(views, files, strict=True):
        assert view.dtype == torch.float32
        expected = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
        assert torch.equal(protocol.as_uint8(view), expected)
        torch.testing.assert_close(view, expected / 255)
    pairs = [[array.astype(np.float32) / 255 for array in pair] for pair in zip(*files, strict=True)]
    assert psnr(*views).tolist() == pytest.approx([peak_signal_noise_ratio(*pair, data_range=1) for pair in pairs])
    expected = [structural_similarity(*pair, channel_axis=2, data_range=1, win_size=11) for pair in pairs]
    assert ssim(*views, protocol.ssim_window).tolist() == pytest.approx(expected, abs=1e-5)
    assert protocol.pil_resize == 229


def test_the_paper_truncates_to_8_bits_and_clean_rounds_for_feature_networks_only():
    level = torch.full((1, 3, 16, 16), 100.7) / 127.5 - 1  # a flat image comes back from a JPEG as it was
    for name, eight_bits in (("paper", 100), ("clean", 101)):
        protocol = get_protocol(name)
        assert protocol.as_uint8(protocol.view(level)).unique().tolist() == [eight_bits]
    assert get_protocol("clean").view(level).unique().item() == pytest.approx(100.7 / 255)


def test_clean_clamps_and_does_nothing_else():
    protocol = get_protocol("clean")
    images = photos()
    x, y = protocol.view(images), protocol.view(images.bfloat16())
    assert torch.equal(x, (images.clamp(-1, 1) + 1) / 2)
    assert (x.dtype, y.dtype) == (torch.float32,) * 2
    assert (protocol.ssim_window, protocol.pil_resize) == ("gaussian", None)
    assert torch.equal(protocol.as_uint8(x), (x * 255).round().byte())


def test_every_8_bit_image_is_itself_to_the_feature_networks_of_clean():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    protocol = get_protocol("clean")
    for images in (levels / 127.5 - 1, (levels / 255 - 0.5) / 0.5):
        assert torch.equal(protocol.as_uint8(protocol.view(images)), levels)


def test_an_unknown_protocol_is_refused_and_what_the_paper_cannot_store():
    with pytest.raises(ValueError, match="one of clean, paper, got 'Paper'"):
        get_protocol("Paper")
    with pytest.raises(ValueError, match=r"paper.*1 or 3.*got \(1, 4, 16, 16\)"):
        get_protocol("paper").view(torch.zeros(1, 4, 16, 16))
    with pytest.raises(ValueError, match="must be finite"):
        get_protocol("paper").view(photos() * torch.nan)
