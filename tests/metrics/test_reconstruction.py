"""Reconstruction figures measure the model's output without padding, and carry the rate."""

import json
import math

import pytest
import torch

from looc_ldm import LooCVQModel
from looc_ldm.baselines import ProductQuantizer
from looc_ldm.metrics import InceptionFeatures, evaluate_reconstruction, fid_and_kid, psnr, ssim
from tiny import tiny_autoencoder


class Parrot(LooCVQModel):
    """Returns what `answer` makes of the image, and the codes `codes` if they are set."""

    def encode(self, x):
        self.seen = x
        return super().encode(x)

    def decode(self, h):
        output = super().decode(h)
        output.sample = self.answer(self.seen)
        output.indices = getattr(self, "codes", output.indices)
        return output


def parrot(answer=lambda x: x) -> Parrot:
    model = tiny_autoencoder(kind=Parrot)
    model.answer = answer
    return model


def photos(count: int = 3, size: tuple[int, int] = (32, 32), seed: int = 0) -> torch.Tensor:
    """Return smooth random images in [-1, 1], some of it saturated as skies are."""
    coarse = torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size, mode="bicubic").clamp(-1, 1)


def test_one_exact_reconstruction_does_not_make_the_mean_infinite():
    images = photos(2)
    model = parrot(lambda x: torch.stack([x[0], x[1] * 0.5]))
    second = psnr((images[1:] + 1) / 2, (images[1:] * 0.5 + 1) / 2).item()
    assert evaluate_reconstruction(model, [images])["psnr"] == pytest.approx((100 + second) / 2)


def test_figures_are_means_over_images_however_they_are_batched():
    model, images = tiny_autoencoder(), photos(5)
    whole = evaluate_reconstruction(model, [images])
    split = evaluate_reconstruction(model, (batch for batch in images.split(2)))
    assert whole["images"] == split["images"] == 5
    assert split.pop("protocol") == whole.pop("protocol") == "clean"
    assert split == pytest.approx(whole, rel=1e-4)


def test_the_figures_are_those_of_the_models_own_output():
    model, images = tiny_autoencoder().eval(), photos()
    with torch.no_grad():
        x, y = (images + 1) / 2, (model(images).sample.clamp(-1, 1) + 1) / 2
    report = json.loads(json.dumps(evaluate_reconstruction(model, [images]), allow_nan=False))
    assert report["psnr"] == pytest.approx(psnr(x, y).mean().item())
    assert report["ssim"] == pytest.approx(ssim(x, y).mean().item())
    assert report["l1"] == pytest.approx((x - y).abs().mean().item())
    assert evaluate_reconstruction(parrot(lambda x: 7 * x), [torch.ones(1, 3, 16, 16)])["l1"] == 0  # clamped


def test_padding_does_not_change_the_measured_quality():
    inner = photos(2, (28, 28))
    padded = torch.nn.functional.pad(inner, (2, 2, 2, 2), value=-1.0)

    def darken(x):
        return x * 0.5 - 0.5  # leaves the padding exact

    measured = evaluate_reconstruction(parrot(darken), [padded], measured_size=(28, 28))
    alone = evaluate_reconstruction(parrot(darken), [inner])
    flattered = evaluate_reconstruction(parrot(darken), [padded])
    assert (measured["height"], measured["width"]) == (28, 28)
    for name in ("psnr", "ssim", "l1"):
        assert measured[name] == pytest.approx(alone[name])
    assert flattered["psnr"] > alone["psnr"] + 0.5


def test_sizes_are_stated_and_bits_with_the_padding_are_divided_by_the_measured_pixels():
    model = tiny_autoencoder()
    report = evaluate_reconstruction(model, [photos()], measured_size=(28, 24))
    bits = 16 * 16 * 2 * 4  # positions, codes at each, log2(16)
    assert report["bits_per_image"] == bits
    assert report["bits_per_pixel"] == pytest.approx(bits / (28 * 24))
    assert (report["num_codevectors"], report["codevector_dim"], report["codebook_scalars"]) == (16, 2, 32)
    assert report["parameters"] == sum(p.numel() for p in model.parameters())


def test_codebook_use_and_perplexity_are_those_of_all_images_together():
    model = parrot()

    def batches():  # alone, each would use 1/16 of the codebook, with perplexity 1
        for code in (0, 3, 9, 15):
            model.codes = torch.full((1, 16, 16, 2), code)
            yield photos(1)

    report = evaluate_reconstruction(model, batches())
    assert report["codebook_use"] == 4 / 16
    assert report["perplexity"] == pytest.approx(4)


def test_entropy_perplexity_and_dead_codes_are_those_of_the_counts_and_give_the_rate_of_an_ideal_coder():
    model = parrot()
    model.codes = torch.tensor([0, 0, 0, 7]).repeat(128).view(1, 16, 16, 2)
    report = evaluate_reconstruction(model, [photos(1)])
    entropy = -(0.75 * math.log2(0.75) + 0.25 * math.log2(0.25))
    assert report["code_entropy"] == pytest.approx(entropy)
    assert report["perplexity"] == pytest.approx(2**entropy)
    assert report["dead_codes"] == 14
    assert report["bits_per_pixel"] == pytest.approx(16 * 16 * 2 * 4 / 32**2)
    assert report["bits_per_pixel_entropy"] == pytest.approx(16 * 16 * 2 * entropy / 32**2)
    padded = evaluate_reconstruction(model, [photos(1)], measured_size=(16, 16))
    assert padded["bits_per_pixel_entropy"] == pytest.approx(4 * report["bits_per_pixel_entropy"])


def test_codes_of_several_codebooks_are_counted_apart():
    torch.manual_seed(0)
    model = tiny_autoencoder()
    model.quantize = ProductQuantizer(4, 16, 2, distance="euclidean")  # two codebooks
    x = photos(4)
    report = evaluate_reconstruction(model, [x[:3], x[3:]])
    shares = [count.double() / count.sum() for count in model.quantize.code_counts(model.encode_indices(x))]
    entropies = [-(share[share > 0] * share[share > 0].log2()).sum().item() for share in shares]
    assert report["code_entropy"] == pytest.approx(sum(entropies) / 2)
    assert report["perplexity"] == pytest.approx(2 ** report["code_entropy"])
    assert report["codebook_use"] == pytest.approx(sum((share > 0).sum().item() for share in shares) / 32)
    assert report["bits_per_pixel"] == pytest.approx(16 * 16 * 2 * 4 / 32**2)
    assert report["bits_per_pixel_entropy"] == pytest.approx(16 * 16 * sum(entropies) / 32**2)
    assert (report["num_codevectors"], report["codebook_scalars"]) == (32, 2 * 16 * 2)


def test_perceptual_distances_are_of_whole_images_as_rgb_under_their_own_names():
    seen = []

    def distance(x, y):
        seen.append(x.shape)
        return (x - y).abs().mean(dim=(1, 2, 3), keepdim=True)

    images = photos(3) * 0.5
    report = evaluate_reconstruction(
        parrot(lambda x: x + 0.25), [images[:2], images[2:]], (28, 28), None, {"lpips_x": distance}
    )
    assert report["lpips_x"] == pytest.approx(0.25)
    assert seen == [(2, 3, 32, 32), (1, 3, 32, 32)]
    grey = LooCVQModel.from_config(tiny_autoencoder().config, in_channels=1, out_channels=1)
    evaluate_reconstruction(grey, [images[:, :1]], lpips={"lpips_x": distance})
    assert seen[-1] == (3, 3, 32, 32)


def test_only_what_is_named_is_measured():
    tiny = photos(size=(8, 8))  # smaller than the window of SSIM
    report = evaluate_reconstruction(tiny_autoencoder(), [tiny], metrics=["l1"])
    assert "l1" in report
    assert not {"psnr", "ssim"} & report.keys()
    with pytest.raises(ValueError, match="psnr, ssim, l1, rfid, kid, got 'fid'"):
        evaluate_reconstruction(tiny_autoencoder(), [tiny], metrics=["fid"])
    with pytest.raises(ValueError, match="rfid needs features"):
        evaluate_reconstruction(tiny_autoencoder(), [tiny], metrics=["rfid"])


def test_the_paper_protocol_damages_both_sides_by_a_jpeg():
    images = photos()
    paper = evaluate_reconstruction(parrot(), [images], protocol="paper")
    assert paper["protocol"] == "paper"
    assert paper["psnr"] == 100  # the same JPEG twice
    spoil = parrot(lambda x: (x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1))
    clean, paper = (evaluate_reconstruction(spoil, [images], protocol=name) for name in ("clean", "paper"))
    assert abs(clean["psnr"] - paper["psnr"]) > 0.05
    assert clean["perplexity"] == paper["perplexity"]
    with pytest.raises(ValueError, match="clean, paper, got 'papr'"):
        evaluate_reconstruction(parrot(), [images], protocol="papr")


def test_the_model_is_measured_in_eval_mode_and_gets_its_modes_back():
    seen = []
    model = parrot(lambda x: seen.append(model.training) or x).train()
    model.quantize.eval()
    codebook = model.quantize.codebook.clone()
    evaluate_reconstruction(model, [photos()])
    assert seen == [False]
    assert [module.training for module in (model, model.decoder, model.quantize)] == [True, True, False]
    assert torch.equal(model.quantize.codebook, codebook)

    with pytest.raises(ValueError, match="divisible by 2"):
        evaluate_reconstruction(model, [photos(size=(31, 32))])
    assert model.training


def test_a_bfloat16_model_is_measured_against_the_images_themselves():
    model = parrot().to(torch.bfloat16)
    report = evaluate_reconstruction(model, [photos()])  # the parrot returns what it was given: rounded to 8 bits
    assert 40 < report["psnr"] < 70


def test_bad_batches_and_reconstructions_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match=r"reconstructions.*nan"):
        evaluate_reconstruction(parrot(lambda x: x * math.nan), [photos()])
    model = tiny_autoencoder()
    with pytest.raises(ValueError, match="batches is empty"):
        evaluate_reconstruction(model, iter([]))
    with pytest.raises(ValueError, match=r"in \[-1, 1\], got torch\.float32.* to 255"):
        evaluate_reconstruction(model, [torch.full((1, 3, 32, 32), 255.0)])
    with pytest.raises(ValueError, match=r"got torch\.uint8"):
        evaluate_reconstruction(model, [torch.ones(1, 3, 32, 32, dtype=torch.uint8)])
    with pytest.raises(ValueError, match=r"one size, got \(32, 32\) and \(16, 16\)"):
        evaluate_reconstruction(model, [photos(), photos(size=(16, 16))])
    with pytest.raises(ValueError, match="the centre, 64x28, does not lie inside images of 32x32"):
        evaluate_reconstruction(model, [photos()], measured_size=(64, 28))


def test_rfid_compares_what_is_measured_with_the_originals(untrained_inception):
    features, images = InceptionFeatures("64", untrained_inception), photos(4)

    def spoil(x):
        return (x * 0.8).round(decimals=1)

    report = evaluate_reconstruction(parrot(spoil), images.split(2), (28, 28), features)
    sides = [((x + 1) / 2 * 255).round().byte()[..., 2:30, 2:30] for x in (images, spoil(images))]
    assert report["rfid@64"] == pytest.approx(fid_and_kid(*sides, features)["fid@64"], rel=1e-6)
    assert report["rfid@64"] > 0.01
    assert abs(evaluate_reconstruction(parrot(), [images], features=features)["rfid@64"]) < 1e-3
