"""docs/cluster: Accelerate understands the files, and the SLURM script works."""

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env

from looc_ldm.training.checkpoints import checkpoints_in
from looc_ldm.training.config_parsing import config_text
from looc_ldm.utils.files import read_json

ROOT = Path(__file__).resolve().parent.parent.parent
CLUSTER = ROOT / "docs" / "cluster"
SCRIPT = CLUSTER / "train.slurm"
CONFIGS = sorted(CLUSTER.glob("*.yaml"))


def launch_arguments(*arguments: str, config: Path | None = None):
    """Return the arguments that `accelerate launch` makes of its flags and its config file."""
    given = ["--config_file", str(config), *arguments] if config else list(arguments)
    parsed, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(given))
    return parsed, defaults


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_accelerate_knows_every_key_of_a_config_file(file):
    settings = yaml.safe_load(file.read_text())
    parsed, defaults = launch_arguments("-m", "looc_ldm.training.diffusion", config=file)
    assert isinstance(defaults, ClusterConfig)  # which refuses unknown keys at the top
    assert parsed.num_processes == settings["num_processes"] > 1
    # Further down unknown keys are taken without a word.
    known = vars(launch_command_parser().parse_args(["script.py"]))
    for key, value in settings.get("fsdp_config", {}).items():
        assert key in known, key
        assert getattr(parsed, key) == value


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_the_flags_of_the_slurm_script_override_the_config_file(file):
    nodes = ["--num_machines", "4", "--num_processes", "32", "--machine_rank", "3"]
    address = ["--main_process_ip", "node0", "--main_process_port", "20007"]
    parsed, _ = launch_arguments(*nodes, *address, "-m", "looc_ldm.training.diffusion", "--seed", "1", config=file)
    assert parsed.use_fsdp == (file.stem == "fsdp")
    assert parsed.multi_gpu == (file.stem != "fsdp")
    prepare_multi_gpu_env(parsed)  # fills in what torchrun is given
    assert (parsed.nproc_per_node, parsed.nnodes, parsed.node_rank) == ("8", "4", 3)
    assert parsed.rdzv_endpoint == "node0:20007"
    assert parsed.training_script_args == ["--seed", "1"]


def test_fsdp_is_what_the_trainer_needs(monkeypatch):
    parsed, defaults = launch_arguments("-m", "looc_ldm.training.diffusion", config=CLUSTER / "fsdp.yaml")
    assert defaults.distributed_type == DistributedType.FSDP
    for name, value in prepare_multi_gpu_env(parsed).items():
        if name.startswith("FSDP_"):
            monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()  # as Accelerator makes it in a process that was launched
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.transformer_cls_names_to_wrap is None  # the model's `_no_split_modules` then say what is wrapped
    assert plugin.cpu_ram_efficient_loading is False


# The script's commands of SLURM, for nodes that are all this machine: `srun` starts the command once a node and fails
# when one fails, `scancel` signals those processes, `scontrol` names the first node and notes what is requeued.
CLUSTER_COMMANDS = {
    "srun": """
while [[ $1 == --* ]]; do shift; done
for node in $(seq 0 $((SLURM_NNODES - 1))); do
    SLURM_NODEID=$node "$@" &
    echo $! >> "$CLUSTER_STATE/tasks"
done
failed=0
for task in $(cat "$CLUSTER_STATE/tasks"); do wait "$task" || failed=1; done
exit $failed
""",
    "scancel": '[[ $1 == --signal=TERM && $2 == "$SLURM_JOB_ID" ]] && kill -TERM $(cat "$CLUSTER_STATE/tasks")',
    "scontrol": 'if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$@" >> "$CLUSTER_STATE/requeued"; fi',
}


def test_the_slurm_script_is_bash():
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


@pytest.mark.slow
def test_the_slurm_script_trains_on_two_nodes_saves_at_the_time_limit_and_goes_on(autoencoder_config, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in CLUSTER_COMMANDS.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    run = tmp_path / "run"
    config = tmp_path / "config.yaml"
    config.write_text(config_text(autoencoder_config(run, preview_every_images=10**7, checkpoint_every_images=10**7)))

    def submit(job: int, total_images: int) -> subprocess.Popen:
        environment = {
            **os.environ,
            "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "CLUSTER_STATE": str(tmp_path),
            "ACCELERATE_USE_CPU": "true",
            "SLURM_JOB_ID": str(job),
            "SLURM_JOB_NODELIST": "node[0-1]",
            "SLURM_NNODES": "2",
            "SLURM_GPUS_ON_NODE": "1",
            "SLURM_CPUS_PER_TASK": "1",
            "OMP_NUM_THREADS": "1",
        }
        (tmp_path / "tasks").unlink(missing_ok=True)
        command = ["bash", str(SCRIPT), "autoencoder", "--config", str(config), "--total_images", str(total_images)]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)

    # A run that the night is too short for
    script = submit(os.getpid(), 10_000_000)
    log = run / "metrics.jsonl"
    while not (log.is_file() and log.read_text().count("\n") > 3):
        assert script.poll() is None, script.stderr.read()[-3000:]
        with suppress(subprocess.TimeoutExpired):
            script.wait(0.5)
    script.send_signal(signal.SIGUSR1)
    _, errors = script.communicate(timeout=600)
    assert script.returncode != 0
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n", errors[-3000:]
    (checkpoint,) = checkpoints_in(run / "checkpoints")
    stopped_at = read_json(checkpoint / "run.json")["images_seen"]
    assert stopped_at >= 4 * 8

    # The job is started again; here it only has 64 images to go
    script = submit(os.getpid() + 1, stopped_at + 64)
    _, errors = script.communicate(timeout=600)
    assert script.returncode == 0, errors[-3000:]
    assert (run / "model" / "training.json").is_file()
    assert (tmp_path / "requeued").read_text().count("\n") == 1  # a run that is finished is not
