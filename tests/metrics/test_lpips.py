"""LPIPS from local weights: the right network or one line, in float32, and with a name for the record."""

import hashlib
from urllib.error import URLError

import lpips
import pytest
import torch
from safetensors.torch import save_file

from looc_ldm.metrics.lpips import load_lpips, lpips_identity

SMALLEST = {"vgg": 16, "alex": 31}


@pytest.fixture(scope="module")
def packages() -> dict[str, lpips.LPIPS]:
    """The networks of the package, with random convolutions."""
    torch.manual_seed(0)
    return {name: lpips.LPIPS(net=name, pnet_rand=True, verbose=False) for name in SMALLEST}


@pytest.fixture(scope="module")
def untrained(packages, tmp_path_factory) -> dict:
    """Files of these convolutions, under torchvision's names."""
    folder = tmp_path_factory.mktemp("lpips")
    files = {}
    for name, network in packages.items():
        files[name] = folder / f"{name}.safetensors"
        weights = {}
        for part in network.net.children():
            weights |= {f"features.{key}": value for key, value in part.state_dict().items()}
        save_file({key: value.contiguous() for key, value in weights.items()}, files[name])
    return files


def images(side: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("network", SMALLEST)
@torch.no_grad()
def test_it_is_the_packages_distance_of_each_pair_in_float32_whatever_surrounds_it(network, untrained, packages):
    distance = load_lpips(network, untrained[network])
    x, y = images(64), images(64, seed=1)
    expected = distance(x, y)
    assert torch.equal(expected, packages[network](x, y))
    assert expected.shape == (2, 1, 1, 1)
    assert (expected > 0).all()
    assert (distance(x, x) == 0).all()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(distance(x, y), expected)
        fast = distance(x, y, autocast=True)  # as a loss
    assert not torch.equal(fast, expected)
    torch.testing.assert_close(fast, expected, rtol=0.03, atol=0)
    assert distance(x.bfloat16(), y.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(("network", "side"), SMALLEST.items())
def test_the_smallest_images_are_measured_and_smaller_ones_refused(network, side, untrained):
    distance = load_lpips(network, untrained[network])
    assert distance(images(side), images(side, seed=1)).isfinite().all()
    with pytest.raises(ValueError, match=f"at least {side}x{side}, got {side - 1}x{side - 1}"):
        distance(images(side - 1), images(side - 1))


def test_weights_of_something_else_are_refused_in_one_line_and_the_record_has_their_hash(untrained, tmp_path):
    (tmp_path / "text.pth").write_text("hello")
    torch.save([1, 2], tmp_path / "list.pth")
    for network, file, reason in (
        ("vgg", untrained["alex"], r"alex\.safetensors' does not hold features\.0\.weight of this network"),
        ("alex", tmp_path / "text.pth", r"text\.pth' is not a file of weights"),
        ("alex", tmp_path / "list.pth", r"list\.pth' is not a file of weights"),
        ("squeeze", untrained["alex"], "one of vgg, alex, got 'squeeze'"),
    ):
        with pytest.raises(ValueError, match=reason) as error:
            load_lpips(network, file)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        load_lpips("alex", tmp_path / "nowhere.pth")
    file = untrained["alex"]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert lpips_identity("alex", file) == {"network": "lpips-alex", "weights": str(file), "sha256": digest}


def test_a_download_that_fails_is_one_line(monkeypatch, tmp_path):
    def no_network(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for ask in (load_lpips, lpips_identity):
        with pytest.raises(ConnectionError, match=r"LPIPS' vgg could not be downloaded.*no network") as error:
            ask("vgg")
        assert "\n" not in str(error.value)
