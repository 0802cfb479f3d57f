"""Samples in ADM's .npz are read and written a batch at a time, and what is something else is named."""

import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from looc_ldm.metrics.samples import NpzSamples, npz_writer
from looc_ldm.utils.errors import UserError


def pixels(count: int = 7, size: tuple[int, int] = (5, 6), seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_any_share_of_the_images_is_read(save, tmp_path):
    stored = pixels()
    save(tmp_path / "s.npz", stored, np.arange(7))
    samples = NpzSamples(tmp_path / "s.npz")
    assert (len(samples), samples.shape, samples.labels.tolist()) == (7, (3, 5, 6), list(range(7)))
    batches = list(samples.batches([range(0, 2), range(4, 6), range(6, 7)]))
    assert [tuple(batch.shape) for batch in batches] == [(2, 3, 5, 6), (2, 3, 5, 6), (1, 3, 5, 6)]
    chosen = torch.cat(batches).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(chosen, stored[[0, 1, 4, 5, 6]])


def test_what_is_written_is_what_numpy_reads(tmp_path):
    stored = pixels()
    images = torch.from_numpy(stored).permute(0, 3, 1, 2)
    with npz_writer(tmp_path / "s.npz", 7, torch.arange(7)) as writer:
        for batch in images.split(3):
            writer.add(batch)
    read = np.load(tmp_path / "s.npz")
    assert sorted(read.files) == ["arr_0", "arr_1"]
    assert np.array_equal(read["arr_0"], stored)
    assert read["arr_1"].dtype == np.int64
    with npz_writer(tmp_path / "grey.npz", 2) as writer:
        writer.add(torch.tensor([3, 9], dtype=torch.uint8).view(2, 1, 1, 1).expand(-1, -1, 2, 2))
    read = np.load(tmp_path / "grey.npz")
    assert read.files == ["arr_0"]
    assert np.array_equal(read["arr_0"][1], np.full((2, 2, 3), 9))


def test_the_images_are_never_all_in_memory(tmp_path):
    count, image = 400, torch.zeros(10, 3, 64, 64, dtype=torch.uint8)
    tracemalloc.start()
    with npz_writer(tmp_path / "s.npz", count) as writer:
        for _ in range(count // 10):
            writer.add(image)
    for batch in NpzSamples(tmp_path / "s.npz").batches(range(i, i + 10) for i in range(0, count, 10)):
        assert batch.shape == image.shape
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.3 * count * image[0].numel()


def write(file, sizes: list[tuple[int, int]], interrupted: bool = False) -> None:
    """An npz that is said to have 4 images, of these sizes."""
    with npz_writer(file, 4) as writer:
        for size in sizes:
            writer.add(torch.zeros(1, 3, *size, dtype=torch.uint8))
        if interrupted:
            raise KeyboardInterrupt


def test_a_file_that_was_not_finished_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="3 images were written to an npz of 4"):
        write(tmp_path / "s.npz", [(4, 4)] * 3)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "s.npz", [(4, 4)] * 3, interrupted=True)
    with pytest.raises(ValueError, match="one size"):
        write(tmp_path / "s.npz", [(4, 4), (5, 4)])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match="cannot write"):
        write(tmp_path / "no" / "s.npz", [])


def test_statistics_are_those_of_the_file(tmp_path):
    covariance = np.diag([1.0, 2.0, 3.0])
    np.savez(tmp_path / "s.npz", mu=np.arange(3.0), sigma=covariance, mu_s=np.zeros(2), sigma_s=np.eye(2))
    samples = NpzSamples(tmp_path / "s.npz")
    assert (len(samples), samples.shape, samples.has_statistics) == (0, None, True)
    moments = samples.statistics
    assert moments.mean.tolist() == [0, 1, 2]
    assert np.allclose(moments.covariance.numpy(), covariance)
    assert moments.count is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": pixels().astype(np.float32)}, r"must be uint8 .* got float32 of shape \(7, 5, 6, 3\)"),
        ({"arr_0": pixels().transpose(0, 3, 1, 2)}, r"must be uint8"),
        ({"arr_0": pixels()[..., :2]}, r"\(7, 5, 6, 2\)"),
        ({"arr_0": np.zeros((0, 5, 6, 3), np.uint8)}, r"\(0, 5, 6, 3\)"),
        ({"arr_0": pixels(), "arr_1": np.arange(6)}, r"arr_1 must be 7 integers"),
        ({"arr_0": pixels(), "arr_1": np.arange(7.0)}, r"arr_1 must be 7 integers"),
        ({"arr_0": pixels(), "arr_1": np.array([None] * 7)}, r"allow_pickle=False"),
        ({"images": pixels()}, r"it holds images, neither arr_0 nor mu, sigma"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_arrays_are_refused_in_a_line_that_names_the_file(arrays, message, tmp_path):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(ValueError, match=message) as error:
        NpzSamples(tmp_path / "s.npz")
    assert "s.npz" in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_no_npz_or_damaged_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        NpzSamples(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(ValueError, match=r"text\.npz"):
        NpzSamples(tmp_path / "text.npz")
    np.savez(tmp_path / "whole.npz", pixels(50))
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive, zipfile.ZipFile(tmp_path / "whole.npz") as whole:
        archive.writestr("arr_0.npy", whole.read("arr_0.npy")[:-100])
    with pytest.raises(ValueError, match=r"short\.npz.*cut off"):
        list(NpzSamples(tmp_path / "short.npz").batches([range(0, 50)]))
    content = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "gap.npz").write_bytes(content[:1000] + content[1100:])
    with pytest.raises(ValueError, match=r"cannot read .*gap\.npz"):
        NpzSamples(tmp_path / "gap.npz")
