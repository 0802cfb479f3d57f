"""Encoding a data set goes on where it stopped, with any number of processes, and leaves nothing half-written.

This file is also the script that each of two processes runs.
"""

import multiprocessing
import resource
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file

from looc_ldm import LooCVQModel
from looc_ldm.commands.main import main as looc_ldm
from looc_ldm.images.config import DataConfig
from looc_ldm.images.pixels import to_float
from looc_ldm.training import latent_fingerprint, latents
from looc_ldm.training.config_parsing import to_dict
from looc_ldm.training.data import load_image_sets
from looc_ldm.training.latents import LatentCache, LatentStream, cache_latents
from looc_ldm.utils.errors import ConfigError, DataError, UserError
from tiny import launch

IMAGE_BYTES = 2 * 2 * 4 * 16 * 16  # the latents of an image and of its mirror image


@pytest.fixture
def images_encoded(model, monkeypatch) -> list[int]:
    """Sizes of the batches that the model encodes."""
    encode, sizes = model.encode, []

    def counted(batch):
        sizes.append(len(batch))
        return encode(batch)

    monkeypatch.setattr(model, "encode", counted)
    return sizes


@pytest.fixture
def garments_with_broken_ones(garments, tmp_path) -> DataConfig:
    """79 garments, of which two cannot be read: the fourth and the last."""
    folder = tmp_path / "garments"
    shutil.copytree(garments, folder)
    files = sorted(folder.rglob("*.png"))
    files[0].unlink()  # leaves 79, of which the first is held out
    files[4].write_bytes(files[4].read_bytes()[:100])
    files[79].write_bytes(b"not an image")
    return DataConfig(
        path=str(folder), validation_images=1, resolution=32, fit="pad", num_workers=0, max_unreadable_share=0.05
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# Interrupted ------------------------------------------------------------------------------------------------------


def test_killed_at_any_moment_nothing_looks_finished_that_is_not_and_the_next_goes_on(
    model, images, accelerator, tmp_path, images_encoded
):
    def encode(folder: Path) -> LatentCache:
        return cache_latents(model, images, folder, accelerator, shard_bytes=2 * IMAGE_BYTES)

    def in_a_child():
        torch.set_num_threads(1)  # as in a loader's worker: its threads did not come along
        encode(folder)

    folder = tmp_path / "latents"
    encode(tmp_path / "uninterrupted")
    whole = contents(tmp_path / "uninterrupted")
    assert len(whole) == 32 + 1
    for shards in (1, 5, 14, 15):
        child = multiprocessing.get_context("fork").Process(target=in_a_child)
        child.start()
        while child.is_alive() and len(list(folder.glob("latents-*"))) < shards:
            time.sleep(0.0005)
        child.kill()  # SIGKILL
        child.join()
        left = contents(folder)
        assert {name: content for name, content in left.items() if name[0] != "."}.items() <= whole.items()
        if "description.json" not in left:  # if the machine is busy, a kill can come too late
            with pytest.raises(ConfigError, match=r"no cached latents in .*, or not all of them yet"):
                LatentCache(folder)
        else:
            assert left == whole
    kept = len(list(folder.glob("latents-*")))
    (folder / "description.json").unlink(missing_ok=True)
    (folder / ".latents-00031-of-00032.safetensors.partial").write_bytes(b"half-writt")  # as any kill can leave
    images_encoded.clear()
    encode(folder)
    assert sum(images_encoded) == 2 * (64 - 2 * kept)
    assert contents(folder) == whole


def test_the_beginning_of_other_latents_is_refused_and_kept(model, images, accelerator, tmp_path):
    folder = tmp_path / "latents"
    cache_latents(model, images, folder, accelerator, shard_bytes=20 * IMAGE_BYTES)
    (folder / "description.json").unlink()
    (folder / "latents-00002-of-00004.safetensors").unlink()
    before = contents(folder)
    with torch.no_grad():
        model.encoder.conv_in.bias.add_(1)
    with pytest.raises(ConfigError, match=r"a different autoencoder \(encoder weights\)"):
        cache_latents(model, images, folder, accelerator, shard_bytes=20 * IMAGE_BYTES)
    assert contents(folder) == before


def test_a_full_disk_ends_in_one_line_and_leaves_nothing_that_looks_finished(model, images, accelerator, tmp_path):
    def encode():
        return cache_latents(model, images, tmp_path / "latents", accelerator, shard_bytes=20 * IMAGE_BYTES)

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (15 * IMAGE_BYTES, limits[1]))
    try:
        with pytest.raises(UserError, match=r"^cannot write .*latents-00000-of-00004\.safetensors': File too large\.$"):
            encode()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path / "latents") == {}
    assert len(encode()) == 64


# Images that cannot be read ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("images_per_shard", [1, 10])  # 1: two shards hold none
def test_images_that_cannot_be_read_are_left_out_counted_and_named(
    garments_with_broken_ones, model, accelerator, tmp_path, images_per_shard, caplog
):
    images, _ = load_image_sets(garments_with_broken_ones, channels=1)
    folder = tmp_path / "latents"
    cache = cache_latents(model, images, folder, accelerator, shard_bytes=images_per_shard * IMAGE_BYTES)
    assert (len(images), len(cache), cache.unreadable) == (78, 76, 2)
    indices = [i for shard in sorted(folder.glob("latents-*")) for i in load_file(shard)["indices"].tolist()]
    bad = sorted(set(range(78)) - set(indices))
    assert bad == [2, 77]
    files = sorted(Path(garments_with_broken_ones.path).rglob("*.png"))[1:]
    named = [message for message in caplog.messages if message.endswith("; it has no latents")]
    assert len(named) == 2
    assert all(message.startswith(f"cannot read {files[i]}: ") for message, i in zip(named, bad, strict=True))
    for place, index in enumerate(indices):
        latents, label = cache.read(place)
        with torch.no_grad():
            expected = model.encode(to_float(images[index][0])[None]).latents[0]
        torch.testing.assert_close(latents.float(), expected, rtol=0, atol=2e-3)
        assert label == images.labels()[index]
    stream = LatentStream(cache, model, seed=0)
    assert sorted(stream.index_at(position) for position in range(76)) == list(range(76))


def test_more_than_are_allowed_stop_the_encoding_until_they_are_repaired(
    garments_with_broken_ones, model, accelerator, tmp_path, images_encoded, monkeypatch
):
    # As of a large data set: few images tell it from others, and a repaired one is hardly among them.
    monkeypatch.setattr(latent_fingerprint, "SAMPLED_IMAGES", 1)
    images, _ = load_image_sets(replace(garments_with_broken_ones, max_unreadable_share=0.02), channels=1)
    folder = tmp_path / "latents"
    for _ in range(2):
        with pytest.raises(
            DataError, match=r"^2 of 78 images cannot be read, more than data\.max_unreadable_share=0\.02"
        ):
            cache_latents(model, images, folder, accelerator, shard_bytes=40 * IMAGE_BYTES)
    assert not (folder / "description.json").exists()
    files = sorted(Path(garments_with_broken_ones.path).rglob("*.png"))[1:]
    for file in (files[2], files[77]):
        file.write_bytes(files[0].read_bytes())
    images_encoded.clear()
    cache = cache_latents(model, images, folder, accelerator, shard_bytes=40 * IMAGE_BYTES)
    assert (len(cache), cache.unreadable) == (78, 0)
    assert sum(images_encoded) == 2 * 78  # each of the two shards lacked one


def test_where_no_image_can_be_read_there_is_no_cache(garments, model, accelerator, tmp_path):
    shutil.copytree(garments, tmp_path / "garments")
    for file in (tmp_path / "garments").rglob("*.png"):
        file.write_bytes(b"")
    data = DataConfig(path=str(tmp_path / "garments"), validation_images=1, resolution=32, max_unreadable_share=1.0)
    images, _ = load_image_sets(replace(data, num_workers=0), channels=1)
    with pytest.raises(DataError, match=r"none of the 79 images of .* can be read"):
        cache_latents(model, images, tmp_path / "latents", accelerator)


# The command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def config_file(diffusion_config, tmp_path) -> Path:
    file = tmp_path / "diffusion.yaml"
    file.write_text(yaml.safe_dump(to_dict(diffusion_config(tmp_path / "run"))))
    return file


def test_the_command_says_how_many_images_of_what_deviation_and_size(config_file, tmp_path, capsys):
    looc_ldm(["cache-latents", "--config", str(config_file), "--device", "cpu", "--batch-size", "7"])
    cache = LatentCache(tmp_path / "run" / "latents")
    assert cache.size == sum(file.stat().st_size for file in cache.folder.glob("*.safetensors"))
    assert capsys.readouterr().out == (
        f"{cache.folder}: 64 images, standard deviation {cache.moments.standard_deviation:.4g}, 0 unreadable, "
        f"{cache.size / 2**20:.1f} MiB\n"
    )


def test_the_module_takes_the_commands_options_and_refuses_in_one_line(config_file, tmp_path, capsys):
    options = ["--config", str(config_file), "--output", str(tmp_path / "elsewhere")]
    latents.main([*options, "--device", "cpu"])
    assert len(LatentCache(tmp_path / "elsewhere")) == 64
    for wrong, message in (
        (["--batch-size", "0"], "--batch-size: must be >0, got 0"),
        (["--data", "/no/such"], "data.path='/no/such'"),
        (["--output", str(config_file)], "is not a folder"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            latents.main([*options, "--device", "cpu", *wrong])
        printed = capsys.readouterr().err
        assert stopped.value.code == 2
        assert message in printed
        assert printed.count("\n") == 1


# Two processes ----------------------------------------------------------------------------------------------------


def test_any_number_of_processes_writes_the_same_bytes_also_going_on_from_another_number(
    model, images, accelerator, config_file, autoencoder_run, tmp_path
):
    alone, begun, command = (tmp_path / name for name in ("alone", "begun", "command"))
    cache_latents(model, images, alone, accelerator, shard_bytes=10 * IMAGE_BYTES)
    latents.main(["--config", str(config_file), "--output", str(command), "--device", "cpu"])
    shutil.copytree(alone, begun)  # by one process, and to be finished by two
    for name in ("description.json", *(f"latents-0000{i}-of-00007.safetensors" for i in (1, 2, 6))):
        (begun / name).unlink()
    first = (begun / "latents-00000-of-00007.safetensors").stat().st_mtime_ns

    printed = launch(__file__, tmp_path, autoencoder_run / "model", config_file)
    assert contents(tmp_path / "two") == contents(alone)
    assert contents(begun) == contents(alone)
    assert (begun / "latents-00000-of-00007.safetensors").stat().st_mtime_ns == first
    assert contents(tmp_path / "two_command") == contents(command)
    assert printed.count("standard deviation") == 1
    for name in ("description.json", "latents-00003-of-00007.safetensors"):  # begun by two, and finished by one
        (tmp_path / "two" / name).unlink()
    cache_latents(model, images, tmp_path / "two", accelerator, shard_bytes=10 * IMAGE_BYTES)
    assert contents(tmp_path / "two") == contents(alone)


def of_two_processes(folder: Path, autoencoder: str, config_file: str) -> None:
    data = DataConfig(**yaml.safe_load(Path(config_file).read_text())["data"])
    model = LooCVQModel.from_pretrained(autoencoder).eval()
    images, _ = load_image_sets(data, channels=1)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    for name in ("two", "begun"):
        cache = cache_latents(model, images, folder / name, accelerator, shard_bytes=10 * IMAGE_BYTES)
        assert len(cache) == 64
    latents.main(["--config", config_file, "--output", str(folder / "two_command")])


if __name__ == "__main__":
    of_two_processes(Path(sys.argv[1]), *sys.argv[2:])
