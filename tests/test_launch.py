"""The files that runs are launched with: Accelerate's and SLURM's."""

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser

from ssl_vit.training.signals import EXIT_STOPPED, OUT_OF_TIME
from tests.conftest import ROOT

LAUNCHES = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
SBATCH = ROOT / "configs" / "slurm" / "pretrain.sbatch"
PROCESSES = {"cpu": 1, "one_gpu": 1, "eight_gpus": 8, "two_nodes_16_gpus": 16, "fsdp2": 8}


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_accelerate_loads_each_launch_file(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert config.num_processes == PROCESSES[path.stem]
    assert config.use_cpu is (path.stem == "cpu")
    assert (config.distributed_type == "FSDP") is (path.stem == "fsdp2")
    assert config.mixed_precision == "no"  # so that nothing contradicts the run's own precision


def test_there_is_a_launch_file_for_each_case() -> None:
    assert {path.stem for path in LAUNCHES} == set(PROCESSES)
    config = load_config_from_file(str(ROOT / "configs" / "accelerate" / "fsdp2.yaml"))
    assert isinstance(config, ClusterConfig)
    fsdp = config.fsdp_config or {}
    assert fsdp["fsdp_version"] == 2
    assert "fsdp_transformer_layer_cls_to_wrap" not in fsdp  # the objective names the blocks of its encoder


@pytest.mark.parametrize("path", LAUNCHES, ids=lambda path: path.stem)
def test_the_command_in_a_launch_file_is_one_that_accelerate_takes(path: Path) -> None:
    (command,) = re.findall(r"^# Run: accelerate launch (.*)$", path.read_text(), flags=re.MULTILINE)
    args = launch_command_parser().parse_args(shlex.split(command))
    assert args.config_file == f"configs/accelerate/{path.name}"
    assert (ROOT / args.training_script).exists()
    assert (ROOT / args.training_script_args[args.training_script_args.index("--config") + 1]).exists()


@pytest.fixture
def submit(tmp_path: Path):
    """Starts the batch script with stand-ins for srun, scontrol and python; SLURM itself is not there."""
    assert subprocess.run(["bash", "-n", SBATCH], check=False).returncode == 0
    tools = {
        # As srun, it forwards signals to its task and ends with the task's code.
        "srun": "trap 'kill -USR1 $task' USR1\nshift\nSLURM_PROCID=0 SLURM_LOCALID=0 \"$@\" &\ntask=$!\n"
        "while kill -0 $task 2>/dev/null; do wait $task; done\nwait $task",
        "scontrol": 'if [ "$1" = show ]; then printf "node1\\nnode2\\n"; else echo "$@" >> calls; fi',
        "python": "trap 'echo saved > saved; exit 138' USR1\n"
        'echo "$RANK $WORLD_SIZE $LOCAL_RANK $LOCAL_WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" > started\n'
        '[ "$2" = wait ] || exit "$2"\nwhile true; do sleep 0.05; done',
    }
    for name, text in tools.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "20007", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "16", "SLURM_NNODES": "2"}
    environment = {**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}"}

    def submit(argument: str) -> subprocess.Popen:
        words = ["bash", SBATCH, "script.py", argument]
        return subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)

    return submit


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_job_that_is_asked_to_leave_saves_and_queues_again(submit, tmp_path: Path, number: signal.Signals) -> None:
    with submit("wait") as job:
        while not (tmp_path / "started").exists():
            time.sleep(0.02)
        time.sleep(0.2)  # until its traps are set
        job.send_signal(number)
        text, _ = job.communicate(timeout=60)
    assert job.returncode == 0, text
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "calls").read_text() == "requeue 20007\n"
    assert (tmp_path / "started").read_text().split() == ["0", "16", "0", "8", "node1", "20007", "script.py", "wait"]


@pytest.mark.parametrize(
    ("code", "again"),
    [(EXIT_STOPPED[OUT_OF_TIME], True), (EXIT_STOPPED[signal.SIGTERM], False), (0, False), (1, False)],
)
def test_only_a_run_that_saved_for_want_of_time_queues_again(submit, tmp_path: Path, code: int, again: bool) -> None:
    with submit(str(code)) as job:
        job.communicate(timeout=60)
    assert (tmp_path / "calls").exists() is again
    assert job.returncode == (0 if again else code)


def test_the_script_knows_the_codes_of_a_run() -> None:
    for number in (signal.SIGUSR1, OUT_OF_TIME):
        assert f'"$code" -eq {EXIT_STOPPED[number]} ]' in SBATCH.read_text()
