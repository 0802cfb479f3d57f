"""Commands on a CPU take the fastest number of threads for their work, unless they are told a number."""

import os

import pytest

from looc_ldm.commands import shared
from looc_ldm.commands.main import main
from tiny import tiny_autoencoder, tiny_pipeline


@pytest.fixture
def measured(monkeypatch):
    """The pieces of work that were timed; each is done once."""
    works = []

    def use_fastest_threads(step, seconds):
        step()
        works.append(step)

    monkeypatch.setattr(shared, "use_fastest_threads", use_fastest_threads)
    return works


@pytest.mark.parametrize("kind", ["unconditional", "num_class_embeds", "cross_attention"])
def test_the_work_of_sampling_and_of_reconstructing_is_timed(measured, kind):
    shared.use_fastest_threads_to_sample(tiny_pipeline(kind), 2)
    shared.use_fastest_threads_to_reconstruct(tiny_autoencoder())
    assert len(measured) == 2


def test_threads_given_at_the_command_line_decide(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # is put back after the test
    run_of = ["sample", "starter", "--images", "1", "--labels", "0", "--steps", "1"]
    main([*run_of, "--threads", "3", "--output", str(tmp_path / "samples")])
    assert os.environ["OMP_NUM_THREADS"] == "3"
