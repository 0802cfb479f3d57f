"""The benchmark of the paper's tables: its rows, a training that resumes exactly, its results and its page."""

import json
import math
import shlex
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch

from looc_ldm import LooCQuantizer, LooCSmallVQModel
from looc_ldm.analysis.style import new_figure
from looc_ldm.baselines import FiniteScalarQuantizer, ResidualQuantizer
from looc_ldm.utils.errors import UserError
from tiny import assert_equal_tensors
from tiny import noise as random_images

# The scripts import each other by name.
sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))

import benchmarks_page
import equal_bits
import equal_bits_page
import small_vqvae
import tables
import tables_page
from results import add_result, fill, read_results
from small_vqvae import Training, settings_of, small_model
from table_rows import PAPER_ROWS, ROWS, TABLES
from tables import load_paper

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
noise = partial(random_images, height=28, seed=0)


@pytest.fixture(autouse=True)
def _few_images_are_held_out(monkeypatch):
    monkeypatch.setattr(small_vqvae, "HELD_OUT", 8)


def train(file: Path, row: str = "looc-32x4", pixels: torch.Tensor | None = None, log=lambda line: None, **settings):
    """Train a row for 12 steps with held-out errors after 5, 10 and 12."""
    training = Training(**{"images": 96, "batch_size": 8, **settings})
    pixels = noise(40) if pixels is None else pixels
    objective = ROWS[row].objective if row in ROWS else None
    return small_vqvae.train(lambda: make_model(row, training.steps), pixels, training, file, CPU, objective, log)


def make_model(row: str, steps: int) -> LooCSmallVQModel:
    """Return the model of a row of the paper's tables, or of a name of the comparison at equal bits."""
    quantizer = ROWS[row].make_quantizer(steps) if row in ROWS else equal_bits.make_quantizer(row)
    return small_model(quantizer, 1, 28)


# Rows -----------------------------------------------------------------------------------------------------------------


def test_every_row_stands_beside_a_row_of_the_paper():
    paper = load_paper()["tables"]
    for table in ("1", "3", "4", "5"):
        assert list(PAPER_ROWS[table]) == TABLES[table]
        assert set(PAPER_ROWS[table].values()) <= paper[table].keys()
    named = {name for table, names in TABLES.items() if table != "all" for name in names}
    assert named == set(TABLES["all"]) == ROWS.keys()


@pytest.mark.parametrize(
    ("row", "bits", "scalars"),
    [
        ("looc-32x4", 160, 128),  # paper, Tab. 5: m log2 K
        ("looc-256x4", 256, 1024),
        ("looc-256x4-s2", 1024, 1024),
        ("looc-8192x4", 416, 32768),
        ("cvq-512x64", 9, 32768),
        ("pq-32x8x4", 96, 1024),
        ("rq-8", 64, 32768),
        ("lfq-8", 64, 0),
        ("sq-512x64", 9, 32768),
        ("factorized", 8, 2048),
        ("fsq-8", 8 * math.log2(200), 0),
        ("fsq-8x16x16", 64, 0),
        ("looc-8x256x2-st", 64, 512),
        ("cvq", 8, 16384),
    ],
)
def test_rates_and_sizes_of_rows_are_those_of_the_tables(row, bits, scalars):
    model = make_model(row, 100)
    assert model.quantize.bits_per_position == pytest.approx(bits)
    assert model.quantize.codebook_scalars == scalars
    assert model.bits_per_image(28, 28) == pytest.approx(49 * bits)


def test_quantizers_that_are_compared_by_default_have_about_equal_bits_three_by_three():
    rates = [equal_bits.make_quantizer(name).bits_per_position / 16 for name in equal_bits.MAIN]
    assert rates == pytest.approx([0.5] * 5 + [2.0] * 5 + [4.0] * 5)


@pytest.mark.parametrize("name", ["pq-4", "cvq", "rq-4", "simvq-4", "gsq-4x256x4", "factorized", "looc-4x256x3-st"])
def test_only_looc_has_the_rotation_trick_and_not_with_st(name):
    for module in equal_bits.make_quantizer(name).modules():
        assert getattr(module, "gradient", "straight-through") == "straight-through"
        assert not getattr(module, "rotation_trick", False)


@pytest.mark.parametrize("name", ["looc", "looc-8x256", "looc-8x256x2-sst", "rq-8x16", "fsq-4-st", "vq-4", ""])
def test_an_unknown_name_of_a_quantizer_is_refused(name):
    with pytest.raises(UserError, match=f"no quantizer '{name}'"):
        equal_bits.make_quantizer(name)


# Training -------------------------------------------------------------------------------------------------------------

SCHEDULE = {"learning_rate": 1e-3, "warm_up_steps": 4, "decay_to": 0.0, "max_grad_norm": 1.0}


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ("looc-32x4", {}),
        ("looc-32x4", {**SCHEDULE, "bf16": True}),
        ("rq-8", {}),
        ("fsq-8", {}),
        ("sq-512x64", {}),
    ],
)
def test_an_interrupted_training_ends_as_an_uninterrupted_one(row, settings, tmp_path):
    class Killed(Exception):
        pass

    def die(line: str):
        raise Killed

    whole, outcome = train(tmp_path / "whole.pt", row, **settings)
    with pytest.raises(Killed):
        train(tmp_path / "killed.pt", row, log=die, **settings)
    resumed, resumed_outcome = train(tmp_path / "killed.pt", row, **settings)
    assert_equal_tensors(whole.state_dict(), resumed.state_dict())
    assert outcome["curve"] == resumed_outcome["curve"]
    assert [images for images, _ in outcome["curve"]] == [40, 80, 96]
    assert outcome["validation_mse"] == min(error for _, error in outcome["curve"])


def test_the_learning_rate_is_constant_unless_the_schedule_says_otherwise():
    published = Training(images=8000, batch_size=8)
    assert {published.learning_rate_at(step) for step in (1, 500, 1000)} == {3e-4}
    annealed = Training(images=8000, batch_size=8, learning_rate=1.0, warm_up_steps=100, decay_to=0.0)
    rates = [annealed.learning_rate_at(step) for step in (50, 100, 500, 1000)]
    assert rates == pytest.approx([0.5 * 0.95, 0.9, 0.5, 0])


def test_the_optimizer_gets_the_learning_rate_of_each_step(tmp_path):
    torch.manual_seed(Training.seed)
    before = make_model("fsq-8", 12)
    after, _ = train(tmp_path / "a.pt", "fsq-8", warm_up_steps=1_000_000)
    moved = [(a - b).abs().max() for a, b in zip(after.parameters(), before.parameters(), strict=True)]
    assert 0 < max(moved) < 1e-6


def test_the_weights_are_those_of_the_lowest_held_out_error(tmp_path):
    """The learning rate spoils them after a while."""
    model, outcome = train(tmp_path / "a.pt", learning_rate=0.2)
    errors = [error for _, error in outcome["curve"]]
    assert errors[-1] > min(errors)  # else this test says nothing
    assert small_vqvae.held_out_error(model, noise(40)[-8:]) == pytest.approx(min(errors), rel=1e-5)


def test_held_out_images_are_not_trained_on(tmp_path, monkeypatch):
    """Other images in their place change no weight before the choice."""
    other = torch.cat([noise(32), noise(8, seed=1)])
    monkeypatch.setattr(small_vqvae, "held_out_error", lambda *_: 1.0)  # the first weights are chosen
    monkeypatch.setattr(torch.Tensor, "var", lambda self, *args, **kwargs: torch.ones(()))
    first, _ = train(tmp_path / "a.pt")
    second, _ = train(tmp_path / "b.pt", pixels=other)
    assert_equal_tensors(first.state_dict(), second.state_dict())


@pytest.mark.parametrize("change", [{"row": "looc-32x4-ema"}, {"learning_rate": 1e-3}])
def test_a_checkpoint_of_a_different_training_is_refused(tmp_path, change):
    train(tmp_path / "a.pt")
    with pytest.raises(UserError, match="remove it"):
        train(tmp_path / "a.pt", **change)


def test_settings_tell_the_librarys_quantizers_apart():
    for a, b in (
        (ResidualQuantizer(8, 16, 2), ResidualQuantizer(8, 16, 2, usage_decay=0.5)),
        (ResidualQuantizer(8, 16, 2), ResidualQuantizer(8, 32, 2)),
        (FiniteScalarQuantizer(8, (8, 5, 5)), FiniteScalarQuantizer(8, (5, 5, 8))),
    ):
        assert settings_of(a) != settings_of(b)
    settings = settings_of(LooCQuantizer(8, 16, 4))
    assert json.loads(json.dumps(settings)) == settings  # a result is read again as it was written


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The splits that were read of a set of 40 images to train on and 20 to test on."""
    splits = []

    def load_images(name, root, split):
        splits.append(split)
        return noise(40) if split == "train" else noise(20, seed=1)

    for script in (tables, equal_bits):
        monkeypatch.setattr(script, "load_images", load_images)
    return splits


@pytest.fixture
def run(read, tmp_path, monkeypatch):
    """Run the command on these images. Returns the splits that were read."""
    monkeypatch.setattr(tables, "check_files", lambda name, root: None)
    monkeypatch.chdir(tmp_path)

    def start(*arguments: str) -> list[str]:
        read.clear()
        monkeypatch.setattr("sys.argv", ["tables.py", *arguments, "--sets", "mnist", "--results", "results.jsonl"])
        tables.main()
        return list(read)

    return start


def test_a_row_leaves_a_result_once_and_its_command_repeats_it(run, tmp_path, monkeypatch, capsys):
    assert run("3", "--list") == []
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"--row looc-256x{dim} --sets mnist" for dim in (4, 8, 16, 32, 64)]
    arguments = ["5", "--row", "looc-32x4", "--images", "32", "--batch-size", "8", "--device", "cpu"]
    assert run(*arguments) == ["train", "test"]
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    result = json.loads(line)
    assert result["clean"]["bits_per_pixel"] == 49 * 160 / 784
    assert (result["clean"]["images"], result["paper"]["protocol"]) == (20, "paper")
    assert result["images_seen"] == 32
    capsys.readouterr()
    assert run(*arguments) == []
    printed = capsys.readouterr().out
    assert f"{result['clean']['psnr']:.2f} clean, {result['paper']['psnr']:.2f} protocol paper" in printed
    assert run(*arguments, "--seed", "43") == ["train", "test"]
    assert run(*arguments[:5], "--annealed", "--device", "cpu") == ["train", "test"]
    _, second, annealed = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    assert second["curve"] != result["curve"]
    assert annealed["training"] == asdict(small_vqvae.annealed(32))
    for found in (result, second, annealed):
        monkeypatch.setattr("sys.argv", shlex.split(found["command"])[1:])
        options = tables.parse()
        assert [(row.name, images) for row, images in options.jobs] == [("looc-32x4", "mnist")]
        assert asdict(tables.training_of("mnist", options)) == found["training"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--row", "vq-512x64"], "table 5 has the rows looc-16x4, looc-24x4,"),
        (["--annealed"], "not allowed with argument"),
        (["--batch-size", "64"], "--images 16 must be at least one batch of --batch-size 64"),
        (["--data", "nowhere"], "no train-images-idx3-ubyte or train-images-idx3-ubyte.gz in 'nowhere/mnist'"),
        (["--lpips-vgg-weights", "nowhere.pth", "--data", "images"], "nowhere.pth"),
    ],
)
def test_bad_input_is_refused_before_a_training(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tables, "train", lambda *_: pytest.fail("it trains"))
    (tmp_path / "images" / "mnist").mkdir(parents=True)
    for part in ("train", "t10k"):
        (tmp_path / "images" / "mnist" / f"{part}-images-idx3-ubyte").touch()
    command = ["tables.py", "5", "--row", "looc-32x4", "--sets", "mnist", "--results", "new.jsonl", "--device", "cpu"]
    monkeypatch.setattr("sys.argv", [*command, "--images", "16", "--batch-size", "16", *arguments])
    with pytest.raises(SystemExit) as exit:
        tables.main()
    assert exit.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new.jsonl").exists()


def test_equal_bits_measures_the_test_images_once_per_quantizer_set_and_seed(read, tmp_path, monkeypatch):
    arguments = "--sets fashion_mnist --quantizers fsq-1 --seeds 3 --images 32 --results a.jsonl --work checkpoints"
    monkeypatch.setattr("sys.argv", ["equal_bits.py", *arguments.split()])
    monkeypatch.chdir(tmp_path)
    errors = iter([0.04, 0.01])  # of the held-out and of the test images
    monkeypatch.setattr(small_vqvae, "held_out_error", lambda model, pixels: next(errors))
    monkeypatch.setattr(equal_bits, "held_out_error", lambda model, pixels: next(errors) if len(pixels) == 20 else None)
    for _ in range(2):
        equal_bits.main()
    assert read == ["train", "test"]
    (line,) = read_results(tmp_path / "a.jsonl")
    assert (line["set"], line["quantizer"], line["seed"], line["images"]) == ("fashion_mnist", "fsq-1", 3, 32)
    assert line["bits_per_pixel"] == pytest.approx(math.log2(200) / 16)
    assert (line["validation_psnr"], line["psnr"]) == pytest.approx((20, 10 * math.log10(400)))


# The page -------------------------------------------------------------------------------------------------------------


def result_of(row: str, psnr: float, rate: float, **training) -> dict:
    """Return what the page needs of a result on MNIST; the paper's protocol gives 1 dB less."""
    settings = Training(**{"images": 60_000, "batch_size": 16, **training})
    return {
        "row": row,
        "method": ROWS[row].method,
        "set": "mnist",
        "training": asdict(settings),
        "clean": {"psnr": psnr, "bits_per_pixel": rate},
        "paper": {"psnr": psnr - 1, "ssim": 0.9, "l1": 0.1},
    }


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def test_the_tables_of_the_pages_are_those_of_the_results(tmp_path):
    for file, filled in (
        ("docs/tables.md", tables_page.tables()),
        ("docs/benchmarks.md", benchmarks_page.measured_tables()),
        ("docs/choosing_sizes.md", equal_bits_page.tables()),
        ("README.md", {"equal bits": equal_bits_page.summary_table(equal_bits_page.runs())}),
    ):
        page = (ROOT / file).read_text()
        (tmp_path / "page.md").write_text(page)
        fill(tmp_path / "page.md", filled)
        assert (tmp_path / "page.md").read_text() == page
    with pytest.raises(UserError, match="must have the markers of 'x' once, got them 0 times"):
        fill(tmp_path / "page.md", {"x": "| new |"})


def test_every_row_is_compared_with_the_papers_figure_of_its_size():
    paper = load_paper()["tables"]
    results = [
        result_of("looc-32x4", 30.0, 10.0),
        result_of("looc-32x4", 32.0, 10.0, learning_rate=1e-3),
        result_of("looc-32x4-ema-rotation", 33.0, 10.0),
        result_of("looc-32x4", 31.0, 10.0, seed=1),
    ]
    lines = [(line[1], *line[3:6]) for line in cells(tables_page.paper_table(results, paper))]
    assert lines == [
        ("60,000 images, batch size 16", "29.00", "35.15", "-6.15"),
        ("60,000 images, batch size 16, learning rate 0.001", "31.00", "35.15", "-4.15"),
        ("60,000 images, batch size 16", "32.00", "35.15", "-3.15"),
    ]


def test_annealed_trainings_have_a_table_of_their_own():
    paper = load_paper()["tables"]
    results = [result_of("looc-32x4", 30.0, 10.0), result_of("looc-32x4-ema-euclidean", 36.0, 10.0, decay_to=0.0)]
    (line,) = cells(tables_page.level_table(results, paper))
    assert line[:3] == [
        "MNIST",
        "LooC 32×4, s=1, moving average, euclidean distance",
        "60,000 images, annealed, learning rate 0.0003, warm up steps 0, max grad norm None, bf16 False",
    ]
    assert line[3:] == ["10", "35.00", "35.15", "", "0.0083", "0.9000", "0.9961", "0.1000", "0.0082"]
    assert len(cells(tables_page.paper_table(results, paper))) == 1


def test_seeds_are_averaged_and_longer_trainings_have_a_table_of_their_own(tmp_path, monkeypatch):
    """And the plot has one panel for each set."""
    line = {"n_q": 128, "bits_per_pixel": 4.0, "images": equal_bits.IMAGES, "psnr": 30.0, "validation_psnr": 29.0}
    for change in (
        {"set": "fashion_mnist", "seed": 1},
        {"set": "fashion_mnist", "seed": 2, "psnr": 31.0},
        {"set": "fashion_mnist", "seed": 1, "psnr": 40.0, "images": 5 * equal_bits.IMAGES},
        {"set": "cifar10", "seed": 1, "psnr": 25.0},
        {"set": "fashion_mnist", "seed": 1, "quantizer": "fsq-8", "bits_per_pixel": 3.82},
    ):
        add_result(tmp_path / "results.jsonl", line | {"quantizer": "fsq-8x16x16"} | change)
    monkeypatch.setattr(equal_bits_page, "FILE", tmp_path / "results.jsonl")
    tables = equal_bits_page.tables()
    assert cells(tables["equal bits"]) == [["fsq-8x16x16", "4", "30.50 (30.00 to 31.00)", "25.00"]]
    assert cells(tables["longer"]) == [["fsq-8x16x16", "4", "40.00", ""]]
    figures = []
    monkeypatch.setattr(equal_bits_page, "new_figure", lambda height: figures.append(new_figure(height)) or figures[0])
    assert equal_bits_page.draw(equal_bits_page.runs()).startswith(b"\x89PNG")
    assert [axes.get_title(loc="left") or axes.get_title() for axes in figures[0].axes] == ["Fashion-MNIST", "CIFAR-10"]
    sizes = [["fsq-8", "3.82", "29.00", ""], ["fsq-8x16x16", "4", "29.00", "29.00"]]
    assert cells(tables["sizes"]) == sizes, "and the sizes that were tried have one, too"


def test_the_readme_shows_means_of_the_compared_sizes_with_the_best_in_bold():
    line = {"set": "cifar10", "n_q": 16, "bits_per_pixel": 4.0, "psnr": 30.0}
    lines = [
        line | change
        for change in (
            {"quantizer": "looc-8x256x2"},
            {"quantizer": "looc-8x256x2", "psnr": 31.0},
            {"quantizer": "fsq-8x16x16", "psnr": 30.2},
            {"quantizer": "looc-8x256x3", "psnr": 40.0},
        )
    ]
    assert cells(equal_bits_page.summary_table(lines)) == [["CIFAR-10", "4", "**30.5**", "30.2", "", "", ""]]
