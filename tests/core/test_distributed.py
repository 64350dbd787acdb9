import itertools
import os

import numpy as np
import pytest
import torch

from ssl_vit.core.distributed import _asked_processes, check_num_processes
from ssl_vit.core.machine import resolve_precision, use_all_cpus
from ssl_vit.training.step import seed_step

CPU = torch.device("cpu")


def test_auto_precision_is_bf16_only_in_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for supported, precision in ((True, "bf16"), (False, "no")):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda supported=supported: supported)
        assert resolve_precision("auto", CPU) == precision
    assert resolve_precision("bf16", CPU) == "bf16"


def test_fp16_needs_cuda() -> None:
    with pytest.raises(ValueError, match="precision='fp16': needs a CUDA device, this is cpu"):
        resolve_precision("fp16", CPU)


@pytest.mark.parametrize(("launcher", "threads"), [("1", 8), ("3", 5), ("4,2", 5), ("", 8), ("1,4", 8)])
def test_launchers_do_not_take_the_cores_away(monkeypatch: pytest.MonkeyPatch, launcher: str, threads: int) -> None:
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", launcher)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr("ssl_vit.core.machine.num_cpus", lambda: 16)
    torch.set_num_threads(5)
    try:
        use_all_cpus(CPU)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_what_is_drawn_on_the_device_follows_from_seed_step_and_process() -> None:
    def draw(*words: int) -> float:
        seed_step(*words)
        return torch.rand(()).item()

    draws = [draw(0, 0, 0, 0), draw(1, 0, 0, 0), draw(0, 1, 0, 0), draw(0, 0, 1, 0), draw(0, 0, 0, 1)]
    assert len(set(draws)) == 5
    assert draw(0, 0, 0, 0) == draws[0]


def test_the_number_of_processes_is_read_from_accelerates_command_line(tmp_path) -> None:
    python, launch = "python", ["accelerate", "launch"]
    assert _asked_processes([python, *launch, "--num_processes", "2", "scripts/a.py", "--num_processes", "9"]) == 2
    assert _asked_processes([python, *launch, "--num-processes=3", "--cpu", "scripts/a.py"]) == 3
    assert _asked_processes([python, *launch, "scripts/a.py", "--steps", "5"]) == 1
    (tmp_path / "cpu.yaml").write_text("num_processes: 4\n")
    assert _asked_processes([python, *launch, "--config_file", os.fspath(tmp_path / "cpu.yaml"), "scripts/a.py"]) == 4


def test_processes_that_do_not_know_of_each_other_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started and 1 found each other"):
        check_num_processes(1)
    check_num_processes(2)


def test_what_is_drawn_on_the_device_starts_from_integers_of_its_own() -> None:
    """Neither an epoch's order nor a sample's draws begin with the same ones, whatever the process."""
    starts = set()
    for step, micro, process in itertools.product(range(3), range(3), range(3)):
        seed_step(7, step, micro, process)
        starts.add(torch.initial_seed())
    assert len(starts) == 27
    others = [(7, epoch, *rest) for epoch in range(3) for rest in ((), (0,), (0, 1), (1, 1), (2, 1))]
    assert not starts & {int(np.random.SeedSequence(words).generate_state(1)[0]) for words in others}
