"""A training on photographs is planned from the folder, the device, the measured speeds and the hours."""

import numpy as np
import pytest
from PIL import Image

from looc_ldm.images.source import FileSource
from looc_ldm.training.config import AutoencoderConfig, DiffusionConfig
from looc_ldm.training.photos import plan
from looc_ldm.training.photos.plan import (
    Plan,
    choose_resolution,
    look_at,
    measure_speeds,
    split_hours,
    stretched,
)
from looc_ldm.utils.errors import DataError

SPEEDS = {"autoencoder": 10.0, "diffusion": 100.0}


def plan_of(hours: float, training_images: int = 3000, **speeds) -> Plan:
    made = Plan(64, 3, "auto", True, None, 200, training_images, None, [], hours, "1.0", {**SPEEDS, **speeds})
    split_hours(made, (16, 64), 5000)
    return made


def write_images(folder, count: int, mode: str = "RGB", size=(80, 70), subfolder: str = ""):
    (folder / subfolder).mkdir(parents=True, exist_ok=True)
    shape = (*size[::-1], 3) if mode == "RGB" else size[::-1]
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, shape, np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / subfolder / f"{i:03d}.png")


@pytest.mark.parametrize(
    ("memory_gib", "side", "resolution"),
    [(None, 2000, 64), (4, 2000, 64), (8, 2000, 128), (16, 2000, 128), (24, 2000, 256), (80, 128, 128), (80, 32, 64)],
)
def test_the_preset_is_the_largest_that_memory_and_images_allow(memory_gib, side, resolution):
    assert choose_resolution(memory_gib, side) == resolution


def test_stage_1_gets_45_percent_of_the_hours_and_stage_2_50():
    plan = plan_of(2.0)
    assert plan.autoencoder_images == pytest.approx(0.45 * 7200 * 10, abs=16)
    assert plan.diffusion_images == [pytest.approx(0.50 * 7200 * 100, abs=64)]
    assert plan.autoencoder_images % 16 == plan.diffusion_images[0] % 64 == 0


def test_short_trainings_leave_time_for_latents_and_samples_but_half_at_most():
    plan = plan_of(0.05)
    training = plan.autoencoder_images / 10 + plan.diffusion_images[0] / 100
    assert training == pytest.approx(180 - 8400 / 120 - 5000 / 300, rel=0.05)
    plan = plan_of(0.01)
    assert plan.autoencoder_images / 10 + plan.diffusion_images[0] / 100 == pytest.approx(18, rel=0.1)


def test_few_images_for_the_hours_are_warned_of():
    assert plan_of(2.0).warnings() == []
    assert "27 images 13,333 times" in plan_of(2.0, training_images=27).warnings()[0]


def test_latents_that_take_more_than_half_of_the_hours_are_warned_of():
    (warning,) = plan_of(0.5, autoencoder=0.6).warnings()
    assert "take about 20 min. Training keeps half of the hours, so all takes about 35 min" in warning
    assert plan_of(0.7, autoencoder=0.6).warnings() == []


def test_schedules_are_stretched_to_the_length_of_a_run():
    lengths = stretched(AutoencoderConfig(batch_size=16), 16_000, per_second=10)
    assert lengths["optimizer.warmup_images"] == lengths["ema_halflife_images"] == 800
    assert lengths["preview_every_images"] == 2000
    assert lengths["checkpoint_every_images"] == 1200 // 16 * 16  # every two minutes
    assert stretched(AutoencoderConfig(batch_size=16), 64, per_second=10)["checkpoint_every_images"] == 16
    second = DiffusionConfig(batch_size=50, preview_steps=25, class_conditional=True)
    assert stretched(second, 500_000, per_second=100)["preview_every_images"] == 62_500
    assert stretched(second, 10_000, per_second=100)["preview_every_images"] == 10_000  # a grid costs as much as 667


def test_classes_grey_images_and_held_out_images_are_found(tmp_path):
    for name in ("cats", "dogs"):
        write_images(tmp_path / "pets", 10, "L", subfolder=name)
    photos = look_at(str(tmp_path / "pets"), with_classes=True)
    assert (photos.channels, photos.held_out, photos.training_images, photos.side) == (1, 2, 18, 70)
    assert "2 classes: cats 10, dogs 10" in photos.lines()
    assert look_at(str(tmp_path / "pets"), with_classes=False).source.classes == []
    write_images(tmp_path / "splits", 10, subfolder="train")
    write_images(tmp_path / "splits", 3, subfolder="val")
    photos = look_at(str(tmp_path / "splits"), with_classes=True)
    assert (photos.channels, photos.validation_split) == (3, "validation")
    assert (photos.held_out, photos.training_images) == (3, 10)
    assert photos.source.classes == []


def test_unreadable_images_are_named_with_the_reason_and_too_many_refused(tmp_path):
    write_images(tmp_path, 20)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    assert any("broken.jpg: not an image" in line for line in look_at(str(tmp_path), True).lines())
    for i in range(4):
        (tmp_path / f"empty{i}.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="5 of 25 images cannot be read"):
        look_at(str(tmp_path), True)


def test_both_trainers_are_measured_and_leave_nothing(tmp_path, autoencoder_config, diffusion_config, images):
    first = autoencoder_config(tmp_path / "unused")
    second = diffusion_config(tmp_path / "unused", class_conditional=True)
    files = [images.source.read(i).content for i in range(len(images))]
    source = FileSource([str(tmp_path / "gone.png"), *files], [0, *images.labels()], images.classes)
    speeds = measure_speeds(first, second, source, tmp_path / "measuring", seconds=0.01)
    assert speeds["autoencoder"] > 0
    assert speeds["diffusion"] > 0
    assert list(tmp_path.iterdir()) == []


def test_a_short_trial_beside_other_processes_does_not_decide_the_speed(
    tmp_path, autoencoder_config, diffusion_config, images, monkeypatch
):
    """Small batches at 0.8 images/s take 10 of the 15 seconds; then 2 images/s are measured with whole batches."""
    first = autoencoder_config(tmp_path / "unused", batch_size=8)
    second = diffusion_config(tmp_path / "unused", batch_size=8)
    source = FileSource([images.source.read(i).content for i in range(len(images))], images.labels(), images.classes)
    measured = iter([0.8, 2.0, 0.1])
    monkeypatch.setattr(plan, "last_speed", lambda run: next(measured))
    speeds = measure_speeds(first, second, source, tmp_path / "measuring", seconds=15)
    assert speeds == {"autoencoder": 2.0, "diffusion": 0.1}
