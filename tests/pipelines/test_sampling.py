"""`sample_images`: a set of images that its seed and labels decide, and nothing else."""

import pytest
import torch

from looc_ldm.pipelines.sampling import sample_images

LABELS = [0, "sandal", 2, None, 1]


def drawn(pipe, labels=LABELS, **arguments) -> torch.Tensor:
    arguments = {"num_inference_steps": 2, "progress": False} | arguments
    return torch.stack(list(sample_images(pipe, labels, **arguments)))


def test_images_are_8_bit_tensors_one_a_label(make_pipeline):
    images = drawn(make_pipeline(channels=1))
    assert images.dtype == torch.uint8
    assert images.shape == (5, 1, 16, 16)


def test_the_set_does_not_depend_on_the_batch_size(make_pipeline):
    pipe = make_pipeline()
    whole = drawn(pipe, batch_size=5, guidance_scale=2.0)
    for batch_size in (1, 2):
        # A rounding difference may turn into one grey level, or rarely another code.
        difference = (drawn(pipe, batch_size=batch_size, guidance_scale=2.0).int() - whole.int()).abs()
        assert difference.float().mean() < 0.1


def test_the_seed_decides_the_images(make_pipeline):
    pipe = make_pipeline()
    assert torch.equal(drawn(pipe, seed=1), drawn(pipe, seed=1))


def test_no_image_comes_twice_in_a_set_or_in_the_sets_of_two_seeds(make_pipeline):
    pipe = make_pipeline()
    images = torch.cat([drawn(pipe, labels=[0] * 4, seed=seed) for seed in range(4)])
    assert len(images.unique(dim=0)) == 16


def test_image_i_is_the_same_in_a_longer_set(make_pipeline):
    pipe = make_pipeline()
    assert torch.equal(drawn(pipe, labels=LABELS[:2], batch_size=2), drawn(pipe, batch_size=2)[:2])


def test_an_unconditional_model_draws_without_labels_and_refuses_them(make_pipeline):
    pipe = make_pipeline("unconditional")
    assert drawn(pipe, labels=[None] * 3).shape == (3, 3, 16, 16)
    with pytest.raises(ValueError, match="this model is unconditional"):
        drawn(pipe, labels=["sandal", None])


def test_its_progress_bar_counts_images_and_leaves_that_of_the_pipeline_as_it_was(make_pipeline, capsys):
    pipe = make_pipeline()
    pipe.set_progress_bar_config(disable=False)
    drawn(pipe)
    assert capsys.readouterr().err == ""
    pipe(num_inference_steps=2)
    assert "2/2" in capsys.readouterr().err
