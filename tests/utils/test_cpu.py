"""The number of threads that a run on a CPU takes, and the kernel of attention."""

import os
import time

import pytest
import torch

from looc_ldm.utils.cpu import SpeedWatch, use_fastest_threads


@pytest.fixture
def four_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("fastest", [1, 2, 4])
def test_the_fastest_number_of_threads_is_taken(four_cores, fastest, monkeypatch):
    """On a busy machine that is one, whatever the number of cores."""
    clock = [0.0]  # a real one would depend on what else the machine does
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def step():
        clock[0] += 0.01 * (1 + abs(torch.get_num_threads() - fastest))

    assert use_fastest_threads(step, seconds=0.02) == fastest == torch.get_num_threads()


def test_the_environment_decides_if_it_says_a_number(four_cores, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    torch.set_num_threads(3)
    assert use_fastest_threads(lambda: pytest.fail("nothing is measured")) == 3


@pytest.mark.parametrize(("times_slower", "collapsed"), [(2, False), (5, True)])
def test_a_collapse_of_the_speed_is_noticed_and_the_loss_of_half_a_core_is_none(times_slower, collapsed):
    clock = [0.0]
    watch = SpeedWatch(lambda: clock[0])

    def noticed(steps: int, seconds: float) -> bool:
        answers = []
        for _ in range(steps):
            clock[0] += seconds
            answers.append(watch.collapsed())
        return any(answers)

    assert not noticed(300, 0.1)
    assert noticed(300, 0.1 * times_slower) == collapsed
