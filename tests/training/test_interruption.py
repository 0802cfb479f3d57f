"""Real processes that are stopped, killed and started again with the same command, alone and in pairs."""

import contextlib
import json
import os
import random
import runpy
import signal
import socket
import termios
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset

import tiny
from looc_ldm.commands import main as cli
from looc_ldm.training import autoencoder, diffusion
from looc_ldm.training.checkpoints import read_state, write_state
from looc_ldm.training.config_parsing import config_text
from looc_ldm.training.data import float_batches
from looc_ldm.training.log import VOLATILE_KEYS
from looc_ldm.training.stopping import StopSignals
from looc_ldm.utils.files import read_json

SCRIPT = Path(__file__).with_name("tiny_trainer.py")
config_of = tiny.import_file(SCRIPT).config_of
test_fsdp = tiny.import_file(Path(__file__).with_name("test_fsdp.py"))
log_lines = partial(tiny.log_lines, without=VOLATILE_KEYS)

LIMIT = 60  # seconds that a process may take


class Processes:
    """The processes of one run, in a process group each."""

    def __init__(self, context, config, ranks: int, own: dict[int, dict], settings: dict):
        variables = tiny.rank_variables(ranks) if ranks > 1 else [{}]
        self.logs = [Path(f"{config.output_dir}-{rank}.log") for rank in range(ranks)]
        self.processes = []
        for rank, log in enumerate(self.logs):
            log.unlink(missing_ok=True)
            common = {"config": config, "environment": variables[rank], "printed": str(log)}
            arguments = {"SETTINGS": {**common, **settings, **own.get(rank, {})}}
            self.processes.append(
                context.Process(target=runpy.run_path, args=(str(SCRIPT), arguments, "__main__"), daemon=False)
            )
        for process in self.processes:
            process.start()

    def join(self) -> list[int]:
        """Exit codes, when all have ended."""
        for process in self.processes:
            process.join(LIMIT)
        return [process.exitcode for process in self.processes]

    @property
    def alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def send(self, number: int, rank: int = 0) -> None:
        """A signal to one of the processes and all of its workers."""
        os.killpg(self.processes[rank].pid, number)

    def kill(self) -> None:
        """SIGKILL to all that still run."""
        for rank, process in enumerate(self.processes):
            if process.is_alive():
                self.send(signal.SIGKILL, rank)
        self.join()

    def printed(self, rank: int = 0) -> str:
        return self.logs[rank].read_text()


@pytest.fixture(scope="module")
def start():
    """`start(config, ranks=2, own={1: settings}, **settings)` of new processes, which have imported everything."""
    context = tiny.forkserver()
    started = []

    def start(config, ranks: int = 1, own=None, **settings) -> Processes:
        started.append(Processes(context, config, ranks, own or {}, settings))
        return started[-1]

    yield start
    for processes in started:
        processes.kill()


def wait_for(condition, processes: Processes) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert processes.alive, processes.printed()
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def newest(folder: Path) -> int:
    return int(checkpoints(folder)[-1])


def parts(name: str, value) -> Iterator[tuple[str, object]]:
    """Yield the parts of a nested value with their places."""
    if isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from parts(f"{name}.{key}", part)
    else:
        yield name, value.tolist() if isinstance(value, torch.Tensor | np.ndarray) else value


def state_of(checkpoint: Path) -> dict:
    """All that a checkpoint holds, by file and place: weights, optimizers, averages, random states."""
    read = {".safetensors": load_file, ".json": read_json}
    state = {}
    for file in sorted(checkpoint.iterdir()):
        content = read.get(file.suffix, partial(torch.load, weights_only=False))(file)
        state |= dict(parts(file.name, content))
    return state


def assert_same_run(one: Path, other: Path) -> None:
    """The same log, and the same last checkpoint to the last bit."""
    assert log_lines(one) == log_lines(other)
    assert checkpoints(one) == checkpoints(other)
    ours, theirs = (state_of(folder / "checkpoints" / checkpoints(folder)[-1]) for folder in (one, other))
    assert ours.keys() == theirs.keys()
    assert [name for name, value in ours.items() if value != theirs[name]] == []


# Killed ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory) -> Path:
    """An uninterrupted run, with loader workers."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert start(config_of(folder, num_workers=2)).join() == [0]
    return folder


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))])
def test_killed_at_random_moments_a_run_ends_as_an_uninterrupted_one(start, whole, tmp_path, seed):
    moments = random.Random(seed)
    config = config_of(tmp_path / "run", num_workers=2)
    for _ in range(3):
        processes = start(config, pause=0.02)
        time.sleep(moments.uniform(0.3, 0.9))
        processes.kill()
    assert start(config).join() == [0]
    assert_same_run(tmp_path / "run", whole)


def test_killed_while_it_writes_each_of_its_checkpoints_a_run_ends_as_an_uninterrupted_one(start, whole, tmp_path):
    config = config_of(tmp_path / "run", num_workers=2)
    cut_short = []
    for images in range(24, 128, 24):
        processes = start(config)
        folder = tmp_path / "run" / "checkpoints"
        written = folder / f"{images:09d}.partial"
        wait_for(lambda: written.exists(), processes)  # noqa: B023
        processes.kill()
        cut_short += [path.name for path in folder.glob("*.partial")]
    assert cut_short
    assert start(config).join() == [0]
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [autoencoder, diffusion])
def test_a_stage_killed_after_a_checkpoint_ends_as_an_uninterrupted_one(
    start, autoencoder_config, small_data, request, tmp_path, stage
):
    settings = {"data": replace(small_data, num_workers=2), "preview_every_images": 48}
    settings |= {"checkpoint_every_images": 16, "log_every_images": 24}
    if stage is autoencoder:
        settings["loss"] = {"adversarial_weight": 0.1, "adversarial_start_images": 16, "discriminator_channels": 8}
        make = partial(autoencoder_config, model={"anchor": "probrandom"}, **settings)
    else:
        make = partial(request.getfixturevalue("diffusion_config"), class_conditional=True, **settings)
    killed, whole = (make(tmp_path / name) for name in ("killed", "whole"))
    first, moments = tmp_path / "killed" / "checkpoints" / "000000016", random.Random(0)
    processes = start(killed, command=stage.train, arguments=killed)
    wait_for(first.exists, processes)
    for _ in range(5):
        time.sleep(moments.uniform(0, 0.3))
        processes.kill()
        processes = start(killed, command=stage.train, arguments=killed)
        time.sleep(moments.uniform(0, 2))
    assert processes.join() == [0], processes.printed()
    processes = start(whole, command=stage.train, arguments=whole)
    assert processes.join() == [0], processes.printed()
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    for file in tmp_path.glob("whole/*/**/*.safetensors"):
        ours, theirs = load_file(tmp_path / "killed" / file.relative_to(tmp_path / "whole")), load_file(file)
        assert [name for name, value in theirs.items() if not torch.equal(value, ours[name])] == []


# Stopped ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 143), (signal.SIGINT, 130)])
def test_a_signal_to_all_processes_ends_in_a_checkpoint_and_one_line_and_the_same_command_goes_on(
    start, whole, tmp_path, number, status
):
    config = config_of(tmp_path / "run", num_workers=2)
    processes = start(config, pause=0.05)
    wait_for((tmp_path / "run" / "metrics.jsonl").exists, processes)
    processes.send(number)
    time.sleep(0.01)
    processes.send(number)  # as a launcher does that passes on what everybody got already
    assert processes.join() == [status]
    *before, last = processes.printed().splitlines()
    images = newest(tmp_path / "run")
    assert last == f"stopped at {images} images; run the same command again to resume from checkpoint {images}"
    assert 16 <= images < 128
    assert [line for line in before if line and " INFO " not in line] == [
        "ending this step and writing a checkpoint; once more stops at once, without one"
    ]
    again = start(config)
    assert again.join() == [0]
    assert f"resuming from checkpoint {last.split()[2]}, processes: 1, cpu" in again.printed()
    assert_same_run(tmp_path / "run", whole)


def test_a_terminal_that_is_closed_ends_a_run_in_a_checkpoint(start, tmp_path):
    ours, theirs = os.openpty()
    processes = start(config_of(tmp_path / "run", num_workers=2), pause=0.05, terminal=os.ttyname(theirs))
    wait_for((tmp_path / "run" / "metrics.jsonl").exists, processes)
    os.close(theirs)
    os.close(ours)
    assert processes.join() == [143]
    assert 16 <= newest(tmp_path / "run") < 128


def test_under_nohup_a_closed_terminal_stops_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGHUP)
    signal.signal(signal.SIGHUP, before)
    assert not stop.received


def test_a_run_keeps_others_out_of_its_folder_until_it_ends_or_is_killed(start, whole, tmp_path):
    config = config_of(tmp_path / "run", num_workers=2)
    first = start(config, pause=0.1)
    wait_for((tmp_path / "run" / "metrics.jsonl").exists, first)
    second = start(config)
    assert second.join() == [2]
    pid = first.processes[0].pid
    assert f"/run' is in use by process {pid} on {socket.gethostname()}: wait for it" in second.printed()
    assert len(second.printed().splitlines()) == 1
    os.kill(pid, signal.SIGKILL)  # its workers live for some seconds more
    first.join()
    assert start(config).join() == [0]
    assert_same_run(tmp_path / "run", whole)


class Signalled(Dataset):
    """Grey images; whoever loads one gets the signals that all processes get."""

    def __len__(self):
        return 4

    def __getitem__(self, index: int):
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        return torch.zeros(1, 8, 8, dtype=torch.uint8), 0


def test_workers_that_load_images_to_measure_on_go_on_after_a_signal():
    with StopSignals():  # as a trainer has them
        assert [len(batch) for batch in float_batches(Signalled(), batch_size=2, num_workers=1)] == [2, 2]


def test_a_second_signal_ends_the_process_at_once(start, tmp_path):
    processes = start(config_of(tmp_path / "run"), pause=30)
    wait_for((tmp_path / "run" / "config.yaml").exists, processes)
    time.sleep(0.3)
    processes.send(signal.SIGTERM)
    time.sleep(1.2)
    assert processes.alive
    processes.send(signal.SIGTERM)
    began = time.monotonic()
    assert processes.join() == [-signal.SIGTERM]
    assert time.monotonic() - began < 5
    assert checkpoints(tmp_path / "run") == []


def test_the_command_line_shows_the_log_lines_and_no_bar_in_a_file(start, autoencoder_config, tmp_path):
    config = autoencoder_config(tmp_path / "run", total_images=16)
    (tmp_path / "config.yaml").write_text(config_text(config))
    arguments = ["train", "autoencoder", "--config", str(tmp_path / "config.yaml")]
    processes = start(config, command=cli.main, arguments=arguments)
    assert processes.join() == [0]
    printed = processes.printed().splitlines()
    lines = [line for line in printed if " INFO " in line]
    assert "a new run, processes: 1, cpu" in lines[0]
    assert "64 images, 16 held out, 10 classes" in lines[1]
    progress = [line for line in lines if " images/s" in line]
    assert [line.split()[2] for line in progress] == ["16/16"]  # the first step says nothing about the speed
    assert not any("it/s]" in line or "autoencoder:" in line for line in printed)
    assert printed[-1] == str(tmp_path / "run" / "model")


def test_on_a_terminal_log_lines_stand_above_the_bar(start, tmp_path):
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 120))
    processes = start(config_of(tmp_path / "run"), pause=0.1, terminal=os.ttyname(theirs))
    assert processes.join() == [0]
    os.set_blocking(ours, False)
    screen = b""
    with contextlib.suppress(BlockingIOError):
        while True:
            screen += os.read(ours, 4096)
    lines = [line.rsplit("\r", 1)[-1] for line in screen.decode().split("\r\n")]  # as they stand there in the end
    said = [line for line in lines if " images/s" in line]
    assert [line.split()[2] for line in said] == [f"{images}/128" for images in range(16, 129, 8)]
    assert not [line for line in said if "tiny" in line]
    assert "tiny:  50%" in screen.decode()


# Two processes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(start, tmp_path_factory) -> Path:
    """An uninterrupted run of two processes."""
    folder = tmp_path_factory.mktemp("pair") / "run"
    assert start(config_of(folder), ranks=2).join() == [0, 0]
    return folder


def test_two_processes_write_every_line_once(pair):
    printed = [Path(f"{pair}-{rank}.log").read_text() for rank in range(2)]
    assert printed[0].count(" images/s") == 15
    assert printed[1] == ""
    assert [line["images"] for line in log_lines(pair)] == list(range(16, 129, 16))


def test_two_processes_killed_together_end_as_an_uninterrupted_pair(start, pair, tmp_path):
    config = config_of(tmp_path / "run")
    processes = start(config, ranks=2, pause=0.02)
    wait_for((tmp_path / "run" / "checkpoints" / "000000024").exists, processes)
    processes.kill()
    assert start(config, ranks=2).join() == [0, 0]
    assert_same_run(tmp_path / "run", pair)


def test_the_cursors_of_two_processes_are_the_newest_of_each_lane_also_after_a_resumption(start, tmp_path):
    folder = tmp_path / "run"
    for images in (48, 128):
        assert start(config_of(folder, total_images=images), ranks=2).join() == [0, 0]
    state = json.loads((folder / "checkpoints" / "000000128" / "run.json").read_text())
    assert {int(lane): cursor[-1] for lane, cursor in state["cursors"].items()} == {0: 127, 1: 111, 2: 119}


def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(start, pair, tmp_path):
    config = config_of(tmp_path / "run")
    processes = start(config, ranks=2, pause=0.05)
    wait_for((tmp_path / "run" / "metrics.jsonl").exists, processes)
    processes.send(signal.SIGTERM, rank=1)
    assert processes.join() == [143, 143]
    assert processes.printed(0).splitlines()[-1].startswith(f"stopped at {newest(tmp_path / 'run')} images")
    assert processes.printed(1) == ""
    assert start(config, ranks=2).join() == [0, 0]
    assert log_lines(tmp_path / "run") == log_lines(pair)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_another_number_of_processes_continues_count_and_schedule(start, pair, tmp_path, before, after):
    optimizer = {"schedule": "cosine"}
    folder = tmp_path / "run"
    processes = start(config_of(folder, optimizer=optimizer), ranks=before, pause=0.02)
    wait_for((folder / "checkpoints" / "000000048").exists, processes)
    processes.kill()
    assert start(config_of(folder, optimizer=optimizer), ranks=after).join() == [0] * after
    assert start(config_of(tmp_path / "whole", optimizer=optimizer)).join() == [0]
    ours, theirs = (log_lines(tmp_path / name) for name in ("run", "whole"))
    for key in ("images", "learning_rate", "skipped_steps"):
        assert [line[key] for line in ours] == [line[key] for line in theirs]
    names = {path.name for path in (folder / "checkpoints" / "000000128").iterdir()}
    assert {name for name in names if name.startswith("random")} == {f"random_states_{i}.pkl" for i in range(after)}


def test_a_checkpoint_of_fsdp_is_refused_under_ddp_by_all_processes_in_one_line(start, tmp_path):
    folder = tmp_path / "run"
    assert start(config_of(folder, total_images=24), ranks=2).join() == [0, 0]
    checkpoint = folder / "checkpoints" / "000000024"
    state = read_state(checkpoint)
    assert state["distributed"] == "DDP"
    write_state(checkpoint, {**state, "distributed": "FSDP"})
    processes = start(config_of(folder), ranks=2)
    assert processes.join() == [2, 2]
    assert "has distributed=FSDP, not DDP" in processes.printed()
    assert "Traceback" not in processes.printed() + processes.printed(1)


# A full disk -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "largest",
    [
        pytest.param(40_000, id="in the weights"),  # 35 x 2000 floats
        pytest.param(400_000, id="in the optimizer's state, of twice their size"),
    ],
)
def test_a_checkpoint_that_does_not_fit_stops_the_run_in_one_line_and_leaves_the_others(start, tmp_path, largest):
    folder = tmp_path / "run"
    fits, grows = (config_of(folder, total_images=images, keep_last=1) for images in (24, 128))
    assert start(fits, width=2000).join() == [0]
    before = {path: path.read_bytes() for path in (folder / "checkpoints").rglob("*.*")}
    lines = log_lines(folder)
    processes = start(grows, width=2000, largest_file=largest)
    assert processes.join() == [2]
    last = processes.printed().splitlines()[-1]
    assert last.startswith(f"error: cannot write checkpoint 48 in '{folder}/checkpoints': ")
    assert "Traceback" not in processes.printed()
    assert {path: path.read_bytes() for path in (folder / "checkpoints").rglob("*.*")} == before
    assert log_lines(folder)[: len(lines)] == lines
    assert start(grows, width=2000).join() == [0]
