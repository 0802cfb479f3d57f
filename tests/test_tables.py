"""What measures the paper's tables: rows, their place in the paper, and a training that resumes exactly."""

import json
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    """Modules of the folder benchmarks."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import small_vqvae
    import table_rows
    import tables

    return small_vqvae, table_rows, tables


def test_every_row_stands_beside_a_row_of_the_paper(scripts):
    _, table_rows, _ = scripts
    paper = json.loads((BENCHMARKS / "paper_tables.json").read_text())["tables"]
    for table in ("1", "3", "4", "5"):
        beside = table_rows.PAPER_ROWS[table]
        assert list(beside) == table_rows.TABLES[table]
        assert set(beside.values()) <= paper[table].keys()
    assert {name for names in table_rows.TABLES.values() for name in names} == table_rows.ROWS.keys()


@pytest.mark.parametrize(
    ("row", "bits", "scalars"),
    [
        ("looc-32x4", 160, 128),  # paper, Tab. 5: m log2 K
        ("looc-256x4", 256, 1024),
        ("looc-256x4-s2", 1024, 1024),
        ("looc-8192x4", 416, 32768),
        ("cvq-512x64", 9, 32768),
        ("pq-32x8x4", 96, 1024),
        ("rq-256x128-depth4", 32, 32768),
        ("lfq-2x8bits", 16, 0),
    ],
)
def test_rates_and_sizes_of_rows_are_those_of_the_tables(scripts, row, bits, scalars):
    _, table_rows, tables = scripts
    model = tables.make_model(table_rows.ROWS[row], 1, 28)
    assert model.quantize.bits_per_position == bits
    assert model.quantize.codebook_scalars == scalars
    assert model.bits_per_image(28, 28) == 49 * bits


@pytest.mark.parametrize("row", ["looc-32x4", "rq-256x128-depth2", "fsq-2x8-5-5"])
def test_an_interrupted_training_ends_as_an_uninterrupted_one(scripts, row, tmp_path, monkeypatch):
    small_vqvae, table_rows, tables = scripts
    monkeypatch.setattr(small_vqvae, "HELD_OUT", 8)
    pixels = torch.randint(0, 256, (40, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def trained(name: str, say=lambda line: None):
        make = lambda: tables.make_model(table_rows.ROWS[row], 1, 28)  # noqa: E731
        training = small_vqvae.Training(images=96, batch_size=8, validations=3)
        return small_vqvae.train(make, pixels, training, tmp_path / name, torch.device("cpu"), say)

    class Killed(Exception):
        pass

    def dies(line: str):
        raise Killed

    whole, happened = trained("whole.pt")
    with pytest.raises(Killed):
        trained("killed.pt", dies)
    resumed, resumed_happened = trained("killed.pt")
    assert happened["images_seen"] == resumed_happened["images_seen"] == 96
    assert len(happened["curve"]) == 3
    for name, weights in whole.state_dict().items():
        assert torch.equal(weights, resumed.state_dict()[name]), name
    assert happened["curve"] == resumed_happened["curve"]
    assert happened["validation_mse"] == min(error for _, error in happened["curve"])
